"""A tower as a `Model` for the exporter."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_convert.core.model import POOLED, Arrays, Model
from vit_convert.core.stack import Stack
from vit_convert.families import run as parts
from vit_convert.families.towers.architecture import (
    BLOCK,
    OF_TEXT,
    ImageTower,
    PatchTower,
    TextTower,
    Tower,
    leaf_shapes,
    signature_of,
)
from vit_convert.families.towers.module import Block, first_of, module_of
from vit_convert.families.towers.tables import RESAMPLERS

_NODES = 1.6  # times a ViT's: for a gate, an activation in primitives, or a mask


def tower_model(tower: Tower, params: Mapping[str, np.ndarray]) -> Model:
    """The model with canonical parameters; two of its blocks are traced, and the graph repeats the second.

    Args:
        tower: what to build.
        params: canonical parameters.

    Returns:
        The model.
    """
    # If a mask is computed beside the stream, the graph alone does not show where its first block begins.
    start = ["embedded"] if _masks(tower) else []
    stack = Stack(f"{BLOCK}{{}}/", tower.encoder.depth, start="".join(start), nodes=_NODES)
    traced = dataclasses.replace(tower, encoder=dataclasses.replace(tower.encoder, depth=stack.traced))
    # If nothing follows, it is an output itself, with a name of its own.
    names = tower.outputs
    norm = [] if tower.encoder.post_norm or _gives_norm(tower) else ["encoder_norm"]
    traced_taps = [*start, *(stack.tap(i) for i in range(stack.traced)), *norm]

    def apply(leaves: Arrays, *inputs: jax.Array) -> Arrays:
        return parts.by_name(module_of(traced).apply(parts.nested(leaves), *inputs), names, traced_taps)

    return Model(
        signature=signature_of(tower),
        params=params,
        taps=[*start, *(stack.tap(i) for i in range(stack.depth)), *norm],
        apply=apply,
        traced_shapes=leaf_shapes(traced),
        traced_taps=traced_taps,
        run=_runner(tower, params, stack),
        stacks=(stack,),
        kind=tower,
        pooled_token=_pooled_token(tower),
        position_table=None if isinstance(tower, PatchTower) else "pos_embedding",
    )


def _gives_norm(tower: Tower) -> bool:
    """Whether an output is exactly the result of the last block and its norm."""
    tokens = not isinstance(tower, ImageTower) or (not tower.class_tokens and tower.pool != "avg4")
    if tower.pools or not tower.head:
        return tokens and not {"tokens", *OF_TEXT.values()}.isdisjoint(tower.outputs)
    return tokens and "features" in tower.outputs


def _masks(tower: Tower) -> bool:
    """Whether attention uses a mask that is computed from the inputs."""
    return isinstance(tower, PatchTower) or (isinstance(tower, TextTower) and tower.mask == "padding")


def _pooled_token(tower: Tower) -> int | str | None:
    if isinstance(tower, TextTower):
        tokens: dict[str, int | str] = {"first": 0, "last": tower.length - 1, "end": POOLED}
        return tokens.get(tower.pool)
    return 0 if tower.pool == "tok" else None


def _runner(tower: Tower, params: Mapping[str, np.ndarray], stack: Stack) -> Callable[..., dict[str, np.ndarray]]:
    """Runs a tower one block at a time: a single block is compiled, and only one block's weights are on the device at a
    time."""
    block = parts.compiled(Block(tower.encoder))

    @functools.cache
    def outer_parts(shape: Any) -> list[Callable[..., Any]]:
        sized = tower
        if isinstance(tower, ImageTower):
            sized = dataclasses.replace(tower, image_size=shape)
        elif isinstance(tower, TextTower):
            sized = dataclasses.replace(tower, length=shape[0])
        module = module_of(sized)
        names = ("embed", "mask", "normalize", "finish")
        return [parts.compiled(module, name) for name in names]

    def run(*inputs: np.ndarray) -> dict[str, np.ndarray]:
        embed, mask_of, normalize, finish = outer_parts(inputs[0].shape[1:3])
        variables, results = parts.outside(params, [BLOCK]), {}
        if isinstance(tower, ImageTower):
            grid = tuple(side // tower.patch_size for side in inputs[0].shape[1:3])
            table = RESAMPLERS[tower.table](params["pos_embedding"], tower.grid, (grid[0], grid[1]))
            variables["params"]["pos_embedding"] = jnp.asarray(table)
        elif isinstance(tower, TextTower):
            variables["params"]["pos_embedding"] = variables["params"]["pos_embedding"][:, : inputs[0].shape[1]]
        given = [jnp.asarray(array) for array in inputs]
        with jax.default_matmul_precision("highest"):
            x, mask = embed(variables, *given), mask_of(variables, *given)
            if stack.start:
                results[stack.start] = np.asarray(x)
            for i in range(stack.depth):
                x = block({"params": parts.under(params, stack.prefix(i))}, x, mask)
                results[stack.tap(i)] = np.asarray(x)
            if not tower.encoder.post_norm:
                x = normalize(variables, x)
                results["encoder_norm"] = np.asarray(x)
            results |= {name: np.asarray(value) for name, value in finish(variables, x, *given).items()}
            if isinstance(tower, TextTower) and tower.pool == "end":
                results[POOLED] = np.argmax(np.asarray(first_of(given[0], tower.end)), axis=1)
        return results

    return run
