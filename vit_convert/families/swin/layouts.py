"""Distinguishes the layouts in which Swins were saved (PyTorch's names and shapes), and renames them to a single one.
No array is read."""

import enum
import functools
import re
from collections.abc import Collection, Mapping

import numpy as np

from vit_convert.checkpoint.containers import Leaf
from vit_convert.families.swin.architecture import Shape, Swin, leaf_shapes
from vit_convert.families.swin.windows import attention_bias, bias_shape

_BUFFERS = re.compile(r"(relative_position_index|attn_mask)$")
_BLOCK = re.compile(r"stage_(?P<stage>\d+)/block_(?P<block>\d+)/")
_PARTS = ("query", "key", "value")
_TRANSFORMERS = {
    "patch_embed/proj": "embeddings.patch_embeddings.projection",
    "patch_embed/norm": "embeddings.norm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn/out": "attention.output.dense",
    "attn": "attention.self",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
    "norm": "layernorm",
    "head": "classifier",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "table": "relative_position_bias_table"}


class Layout(enum.Enum):
    """How a Swin's parameters are named on disk. Matrices are [outputs, inputs], convolutions [outputs, inputs, height,
    width]."""

    MICROSOFT = "swin_microsoft"
    """microsoft/Swin-Transformer (2021): `layers.0.blocks.1.attn.qkv`, a stage's merging at its end; buffers among the
    parameters."""

    TIMM = "swin_timm"
    """timm since 0.9 (2023): the merging at the beginning of the next stage, the head inside `head.fc`."""

    TRANSFORMERS = "swin_transformers"
    """transformers: `swin.encoder.layers.0.blocks.1.attention.self.query`, query, key and value apart."""


def detect(names: Collection[str]) -> Layout | None:
    """Recognises the layout by the names of the leaves; None if they are not a Swin's."""
    if not any(name.endswith("relative_position_bias_table") for name in names):
        return None
    inner = {_inner(name) for name in names}
    if any(name.startswith("encoder.layers.0.blocks.0.") for name in inner):
        return Layout.TRANSFORMERS
    if not any(name.startswith("layers.0.blocks.0.attn.") for name in inner):
        return None
    is_timm = any(name.startswith("head.fc.") for name in inner) or not any(
        name.startswith("layers.0.downsample.") for name in inner
    )
    return Layout.TIMM if is_timm else Layout.MICROSOFT


def inner_leaves(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Leaves without the prefix of their names, and without the buffers that Microsoft saves: index and mask follow
    from the window."""
    return {_inner(name): leaf for name, leaf in leaves.items() if not _BUFFERS.search(name)}


def outer_name(inner: str, leaves: Collection[str]) -> str:
    """The name that a leaf of `inner_leaves` has in a file with these leaves: transformers' head is beside the
    model."""
    blocks = (name for name in leaves if _inner(name).startswith(("encoder.", "layers.")))
    folder = next((name.removesuffix(_inner(name)) for name in blocks), "")
    return (folder.removesuffix("swin.") if inner.startswith("classifier.") else folder) + inner


def _inner(name: str) -> str:
    return name.removeprefix("model.").removeprefix("swin.")


def stored_name(canonical: str, layout: Layout) -> str:
    """The name of a canonical parameter on disk, without prefix.

    Args:
        canonical: such as "stage_0/block_1/attn/query/kernel".
        layout: of the file.

    Returns:
        Such as "layers.0.blocks.1.attn.qkv.weight", which also holds two others.
    """
    scope, _, leaf = canonical.rpartition("/")
    if match := _BLOCK.match(canonical):
        outer, scope = f"layers.{match['stage']}.blocks.{match['block']}.", scope[match.end() :]
    elif match := re.match(r"stage_(\d+)/downsample/", canonical):
        stage = int(match[1]) + (layout is Layout.TIMM)
        outer, scope = f"layers.{stage}.downsample.", scope[match.end() :]
        return f"{'encoder.' * (layout is Layout.TRANSFORMERS)}{outer}{scope}.{_LEAVES[leaf]}"
    else:
        outer = ""
    if layout is Layout.TRANSFORMERS:
        inner = next(
            (
                new + scope[len(old) :]
                for old, new in _TRANSFORMERS.items()
                if scope == old or scope.startswith(f"{old}/")
            ),
            scope,
        )
        outer = f"encoder.{outer}" if outer else outer
    else:
        inner = re.sub(r"^attn/(query|key|value)$", "attn/qkv", scope).replace("attn/out", "attn/proj")
        inner = "head/fc" if inner == "head" and layout is Layout.TIMM else inner
    return f"{outer}{inner.replace('/', '.')}.{_LEAVES[leaf]}"


def stored_shapes(architecture: Swin, layout: Layout) -> dict[str, Shape]:
    """Shape of every stored parameter, by its name on disk."""
    shapes: dict[str, Shape] = {}
    for name, shape in leaf_shapes(architecture).items():
        stored = stored_name(name, layout)
        turned = (
            shape if name.endswith("table") else (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
        )
        first = shapes[stored][0] if stored in shapes else 0
        shapes[stored] = (first + turned[0], *turned[1:])
    return shapes


def prepare(leaves: Mapping[str, Leaf], architecture: Swin, layout: Layout) -> dict[str, Leaf]:
    """The model's parameters, computed from the stored leaves when they are read.

    The factor 1/√d is folded into the query's weights, and the bias table is expanded to what each block adds to its
    scores.

    Args:
        leaves: by name on disk, from `inner_leaves`; they match `stored_shapes`.
        architecture: the model.
        layout: of the file.

    Returns:
        float32 leaves by the names of `module.SwinTransformer`'s parameters.
    """
    prepared: dict[str, Leaf] = {}
    for name, shape in leaf_shapes(architecture).items():
        leaf = leaves[stored_name(name, layout)].as_float32()
        match = _BLOCK.match(name)
        if name.endswith("attn/table") and match is not None:
            place = int(match["stage"]), int(match["block"])
            fold = functools.partial(attention_bias, architecture=architecture, stage=place[0], block=place[1])
            prepared[name.replace("table", "bias")] = leaf.derive(bias_shape(architecture, *place), fold)
        else:
            part = next((i for i, part in enumerate(_PARTS) if f"/attn/{part}/" in name), None)
            heads = architecture.num_heads[int(match["stage"])] if match is not None else 1
            factor = np.float32((shape[-1] / heads) ** -0.5) if part == 0 else None
            piece = part if part is not None and layout is not Layout.TRANSFORMERS else None
            prepared[name] = leaf.derive(shape, functools.partial(_turned, shape=shape, piece=piece, factor=factor))
    return prepared


def _turned(array: np.ndarray, shape: Shape, piece: int | None, factor: np.float32 | None) -> np.ndarray:
    """Query, key or value from the combined array, in Flax's order of axes instead of PyTorch's, times a factor."""
    if piece is not None:
        array = array[piece * shape[-1] : (piece + 1) * shape[-1]]
    array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return array if factor is None else factor * array
