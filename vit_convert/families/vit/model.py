"""A ViT as a `Model` for the exporter."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_convert.core.model import Arrays, Model
from vit_convert.core.stack import Stack
from vit_convert.families import run as parts
from vit_convert.families.vit.architecture import Architecture, signature_of
from vit_convert.families.vit.module import EncoderBlock, ViT, param_shapes
from vit_convert.families.vit.posemb import resample
from vit_convert.families.vit.shapes import BLOCK


def vit_model(architecture: Architecture, params: Mapping[str, np.ndarray]) -> Model:
    """Our own ViT with canonical parameters.

    Only two blocks are traced, since the others compute the same function with other parameters; the reference runs
    them all.

    Args:
        architecture: from the checkpoint.
        params: canonical parameters, from the checkpoint.

    Returns:
        The model.
    """
    stack = Stack(f"{BLOCK}{{}}/", architecture.depth)
    traced = dataclasses.replace(architecture, depth=stack.traced)
    names = architecture.given
    norm = [] if gives_norm(architecture) else ["encoder_norm"]  # otherwise it is an output
    traced_taps = [*_block_names(stack.cut()), *norm]

    def apply(leaves: Arrays, images: jax.Array) -> Arrays:
        return parts.by_name(ViT(traced).apply(parts.nested(leaves), images), names, traced_taps)

    return Model(
        signature=signature_of(architecture),
        params=params,
        taps=[*_block_names(stack), *norm],
        apply=apply,
        traced_shapes=param_shapes(traced),
        traced_taps=traced_taps,
        run=_vit_runner(architecture, params, stack),
        stacks=(stack,),
        kind=architecture,
        pooled_token=0 if architecture.pool == "tok" else None,
        position_table="pos_embedding",
    )


def gives_norm(architecture: Architecture) -> bool:
    """Whether an output is exactly the result of the last norm."""
    bare = architecture.pool == "none" and not architecture.representation_size
    tokens = architecture.pool != "tok" and "tokens" in architecture.given
    return tokens or (bare and "features" in architecture.given)


def _block_names(stack: Stack) -> list[str]:
    return [stack.tap(i) for i in range(stack.depth)]


def _vit_runner(
    architecture: Architecture, params: Mapping[str, np.ndarray], stack: Stack
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Runs a ViT one block at a time: a single block is compiled, and only one block's weights are on the device at a
    time."""
    block = parts.compiled(EncoderBlock(architecture))

    @functools.cache
    def outer_parts(image_size: tuple[int, int]) -> list[Callable[..., Any]]:
        vit = ViT(dataclasses.replace(architecture, image_size=image_size))
        return [parts.compiled(vit, method) for method in (ViT.embed, ViT.normalize, ViT.classify)]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        embed, normalize, classify = outer_parts((images.shape[1], images.shape[2]))
        grid = (images.shape[1] // architecture.patch_size, images.shape[2] // architecture.patch_size)
        variables, results = parts.outside(params, [BLOCK]), {}
        variables["params"]["pos_embedding"] = jnp.asarray(resample(params["pos_embedding"], architecture.grid, grid))
        with jax.default_matmul_precision("highest"):
            x: Any = embed(variables, jnp.asarray(images))
            for i in range(stack.depth):
                x = block({"params": parts.under(params, stack.prefix(i))}, x)
                results[stack.tap(i)] = np.asarray(x)
            x = normalize(variables, x)
            results["encoder_norm"] = np.asarray(x)
            results |= {name: np.asarray(value) for name, value in classify(variables, x).items()}
        return results

    return run
