"""What the exporter needs to know of a model, and how our own ViT and a user's module provide it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vit_convert.checkpoint.architecture import Architecture
from vit_convert.checkpoint.posemb import resample
from vit_convert.models.vit import EncoderBlock, ViT, param_shapes

Arrays = Mapping[str, Any]
_TRACED_DEPTH = 2


@dataclasses.dataclass(frozen=True)
class Model:
    """A JAX model, ready to trace and to compute its own reference.

    Attributes:
        params: float32 parameters under their `/`-joined names.
        output: name of the output that is judged: "logits" or "features", or what a user's own model calls it.
        taps: names of the taps of the whole model, in order.
        apply: maps (parameters, images) to {output or tap: array}; what is traced.
        traced_shapes: shapes of the parameters that `apply` reads.
        traced_taps: names of the taps that `apply` returns.
        depth: encoder blocks of the whole model when `apply` computes only two of them, None when it computes all.
        has_blocks: whether it is known to be made of encoder blocks, which lower precisions are then limited to by default.
        name: of a user's own model.
        identity: of a user's own model, what tells it from another: changes with the function or any parameter.
        warnings: what the user should know of it.
        run: maps images float32 [batch, height, width, 3] to {output or tap: numpy array} of the whole model, in float32 and
            at the highest matmul precision. A ViT takes images of any size that its patches tile, with its position table resampled.
    """

    params: Mapping[str, np.ndarray]
    output: str
    taps: Sequence[str]
    apply: Callable[[Arrays, jax.Array], Arrays]
    traced_shapes: Mapping[str, Sequence[int]]
    traced_taps: Sequence[str]
    depth: int | None
    run: Callable[[np.ndarray], dict[str, np.ndarray]]
    has_blocks: bool = False
    name: str = ""
    identity: str = ""
    warnings: Sequence[str] = ()


def vit_model(architecture: Architecture, params: Mapping[str, np.ndarray]) -> Model:
    """Our own ViT on canonical parameters.

    Only two blocks are traced, since the others compute the same function of other parameters; the reference runs them all.

    Args:
        architecture: from the checkpoint.
        params: canonical parameters, from the checkpoint.

    Returns:
        The model.
    """
    traced = dataclasses.replace(architecture, depth=min(architecture.depth, _TRACED_DEPTH))
    output = "logits" if architecture.num_classes else "features"
    unpooled = architecture.pool == "none" and not architecture.num_classes and not architecture.representation_size
    norm = [] if unpooled else ["encoder_norm"]  # else it is the output
    traced_taps = [*_block_names(traced.depth), *norm]

    def apply(leaves: Arrays, images: jax.Array) -> Arrays:
        result, taps = ViT(traced).apply({"params": traverse_util.unflatten_dict(dict(leaves), sep="/")}, images)
        return {output: result, **{name: taps[name] for name in traced_taps}}

    return Model(
        params=params,
        output=output,
        taps=[*_block_names(architecture.depth), *norm],
        apply=apply,
        traced_shapes=param_shapes(traced),
        traced_taps=traced_taps,
        depth=architecture.depth if architecture.depth > traced.depth else None,
        run=_vit_runner(architecture, params, output),
        has_blocks=True,
    )


def _block_names(depth: int) -> list[str]:
    return [f"block_{i:02d}" for i in range(depth)]


def _vit_runner(architecture: Architecture, params: Mapping[str, np.ndarray], output: str) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Runs a ViT one block at a time: one block is compiled once and one block's weights are on the device at a time."""
    block = EncoderBlock(architecture)
    step = jax.jit(lambda leaves, x: block.apply({"params": leaves}, x))

    @functools.cache
    def outer_parts(image_size: tuple[int, int]) -> list[Callable[..., jax.Array]]:
        vit = ViT(dataclasses.replace(architecture, image_size=image_size))
        return [jax.jit(functools.partial(vit.apply, method=method)) for method in (ViT.embed, ViT.normalize, ViT.classify)]

    def part(prefix: str) -> Any:
        leaves = {name.removeprefix(prefix): jnp.asarray(params[name]) for name in params if name.startswith(prefix)}
        return traverse_util.unflatten_dict(leaves, sep="/")

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        outside = {name: jnp.asarray(params[name]) for name in params if not name.startswith("Transformer/encoderblock_")}
        embed, normalize, classify = outer_parts((images.shape[1], images.shape[2]))
        grid = (images.shape[1] // architecture.patch_size, images.shape[2] // architecture.patch_size)
        outside["pos_embedding"] = jnp.asarray(resample(params["pos_embedding"], architecture.grid, grid))
        variables = {"params": traverse_util.unflatten_dict(outside, sep="/")}
        results = {}
        with jax.default_matmul_precision("highest"):
            x = embed(variables, jnp.asarray(images))
            for i, name in enumerate(_block_names(architecture.depth)):
                x = step(part(f"Transformer/encoderblock_{i}/"), x)
                results[name] = np.asarray(x)
            x = normalize(variables, x)
            results["encoder_norm"] = np.asarray(x)
            results[output] = np.asarray(classify(variables, x))
        return results

    return run
