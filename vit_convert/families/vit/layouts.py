"""Distinguishes the layouts in which ViT checkpoints were saved, and renames them to a single one.

Everything known about old checkpoints is here, each fix with its era and reason. No array is read:
renaming, slicing and folding build leaves that are computed when they are read.
"""

import enum
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.match import require_blocks
from vit_convert.core.errors import CheckpointError
from vit_convert.families.vit.shapes import BLOCK

_SCAN = "Transformer/encoderblock/"
_POSEMBED_INPUT = "Transformer/posembed_input/pos_embedding"
_POSEMBED_ENCODER = "Transformer/pos_embedding"
_MAP_HEAD_PARTS = ("probe", "MultiHeadDotProductAttention_", "LayerNorm_", "MlpBlock_")


class Layout(enum.Enum):
    """How a ViT's parameters are named on disk."""

    VIT_JAX = "vit_jax"
    """vit_jax's published files (2020 on): one counter numbers all sub-modules of a block (`LayerNorm_0`,
    `MultiHeadDotProductAttention_1`, `LayerNorm_2`, `MlpBlock_3`); position table in `posembed_input`, its first row
    the class token's."""

    VIT_JAX_LINEN = "vit_jax_linen"
    """The same saved by Flax Linen code: one counter for each kind of module."""

    BIG_VISION = "big_vision"
    """big_vision since 2022: `pos_embedding` on top, without a row for the class token; or no table at all
    (sincos2d)."""

    BIG_VISION_OLD = "big_vision_old"
    """big_vision before 2022: the position table inside `Transformer`, with the class token's row first."""

    BIG_VISION_SCAN = "big_vision_scan"
    """big_vision with `scan=True` (2023 on): one `encoderblock` whose leaves have a leading layer axis."""


_BIG_VISION = (Layout.BIG_VISION, Layout.BIG_VISION_SCAN)


def detect(names: Collection[str]) -> Layout | None:
    """Recognises the layout by the names of the leaves; None if they are not a ViT's."""
    if "embedding/kernel" not in names and not any(name.startswith((BLOCK, _SCAN)) for name in names):
        return None
    if any(name.startswith(_SCAN) for name in names):
        return Layout.BIG_VISION_SCAN
    if any(re.match(rf"{BLOCK}\d+/(LayerNorm_2|MlpBlock_3|MultiHeadDotProductAttention_1)/", name) for name in names):
        return Layout.VIT_JAX
    if _POSEMBED_INPUT in names:
        return Layout.VIT_JAX_LINEN
    return Layout.BIG_VISION_OLD if _POSEMBED_ENCODER in names else Layout.BIG_VISION


def preprocessing(layout: Layout, pool: str, num_classes: int, prefix: str, names: Iterable[str]) -> str:
    """The rule by which the images of such a checkpoint were prepared, a key of `images.preprocess`.

    Towers of image-text models were trained on images resized directly to a square, whatever the layout of the file;
    classifiers of big_vision on a central crop.

    Args:
        layout: of the leaves.
        pool: how the model pools.
        num_classes: outputs of its head; 0 for none.
        prefix: what `select` stripped.
        names: of all leaves of the file.

    Returns:
        Such as "siglip", "lit" or "big_vision".
    """
    if prefix.endswith("img/"):
        outer = prefix.removesuffix("img/")
        beside = {name.removeprefix(outer).split("/")[0] for name in names if name.startswith(outer)}
        if "llm" in beside:
            return "paligemma"
        # SigLIP's loss has a bias `b` besides the temperature `t`; CLIPPO has no text tower, but the same rule.
        return "lit" if "txt" in beside and "b" not in beside else "siglip"
    if layout in _BIG_VISION and pool == "map" and not num_classes:
        return "siglip"  # SigLIP's image tower, saved by itself: big_vision's own MAP-pooled classifiers have a head
    return layout.value


def canonicalize(leaves: Mapping[str, Leaf], path: str) -> dict[str, Leaf]:
    """Renames leaves of any layout to the canonical names; the position table keeps the class token's row for
    `fold_class_row`.

    Args:
        leaves: leaves as `select` returned them.
        path: the file, for messages.

    Returns:
        Leaves by canonical name; those that belong to nothing keep their own.

    Raises:
        CheckpointError: blocks are missing, stacked leaves disagree about the depth, or two leaves claim one name.
    """
    if "embedding/kernel" in leaves and len(leaves["embedding/kernel"].shape) == 2:
        raise CheckpointError(f"{path}: a NaFlex model (its patch embedding is a matrix), which is not supported")
    leaves = _unstack(leaves, path)
    renamed: dict[str, Leaf] = {}
    numbers = _numbering(_outer_name(name) for name in leaves)
    for name, leaf in leaves.items():
        canonical = _renumber(_outer_name(name), numbers)
        if canonical in renamed:
            raise CheckpointError(f"{path}: {leaf.name} and {renamed[canonical].name} are the same parameter")
        renamed[canonical] = leaf
    require_blocks(renamed, rf"{BLOCK}(\d{{1,6}})/", "encoder block", path)
    return renamed


def fold_class_row(leaves: dict[str, Leaf]) -> dict[str, Leaf]:
    """Moves the class token's row of the position table into the class token: `cls += table[:, :1]`, `table = table[:,
    1:]`.

    vit_jax, and big_vision before 2022, put the class token in front and then added a table with one more row than the
    grid; adding the constant row beforehand is the same function, and makes the table independent of the pooling.

    Args:
        leaves: canonical leaves whose position table has that row.

    Returns:
        The leaves with the two replaced.
    """
    cls, table = leaves["cls"].as_float32(), leaves["pos_embedding"].as_float32()
    rows, width = table.shape[1:]
    return leaves | {
        "cls": cls.derive(cls.shape, lambda value: value + table.read()[:, :1]),
        "pos_embedding": table.derive((1, rows - 1, width), lambda value: value[:, 1:]),
    }


def stored_name(canonical: str, layout: Layout) -> str:
    """The name of a canonical parameter on disk, without prefix: the inverse of `canonicalize`.

    Args:
        canonical: such as "Transformer/encoderblock_3/MlpBlock_0/Dense_0/kernel".
        layout: of the file.

    Returns:
        Such as "Transformer/encoderblock_3/MlpBlock_3/Dense_0/kernel"; for a stacked layout the name of the whole
        stack.
    """
    if canonical == "pos_embedding":
        places = {
            Layout.VIT_JAX: _POSEMBED_INPUT,
            Layout.VIT_JAX_LINEN: _POSEMBED_INPUT,
            Layout.BIG_VISION_OLD: _POSEMBED_ENCODER,
        }
        return places.get(layout, canonical)
    if layout is Layout.BIG_VISION_SCAN:
        return re.sub(rf"^{BLOCK}\d+/", _SCAN, canonical)
    if layout is Layout.VIT_JAX and canonical.startswith(BLOCK):
        for linen, old in (
            ("LayerNorm_1/", "LayerNorm_2/"),
            ("MultiHeadDotProductAttention_0/", "MultiHeadDotProductAttention_1/"),
            ("MlpBlock_0/", "MlpBlock_3/"),
        ):
            canonical = canonical.replace(linen, old)
    return canonical


def _outer_name(name: str) -> str:
    """Undoes two changes of names: the table moved out of its module, and (during ViT-G's development) the MAP head
    inlined at the top level."""
    if name in (_POSEMBED_INPUT, _POSEMBED_ENCODER):
        return "pos_embedding"
    return f"MAPHead_0/{name}" if name.startswith(_MAP_HEAD_PARTS) else name


_NUMBERED = re.compile(rf"(?P<scope>{BLOCK}\d{{1,6}}|MAPHead_0)/(?P<module>[A-Za-z]+)_(?P<number>\d{{1,6}})/")
_Numbers = Mapping[tuple[str, str], list[int]]


def _numbering(names: Iterable[str]) -> _Numbers:
    # Over all blocks together, so that a leaf missing from one block does not shift the numbers of its neighbours.
    seen: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name in names:
        if match := _NUMBERED.match(name):
            seen[match["scope"][:3], match["module"]].add(int(match["number"]))
    return {key: sorted(found) for key, found in seen.items()}


def _renumber(name: str, numbers: _Numbers) -> str:
    """Numbers a block's modules kind by kind, as in Linen (2021); before that, one counter ran over all of them.

    This ignores the literal numbers: `LayerNorm_2` in old files and `LayerNorm_1` in new ones are the same layer.
    """
    if (match := _NUMBERED.match(name)) is None:
        return name
    number = numbers[match["scope"][:3], match["module"]].index(int(match["number"]))
    return f"{match['scope']}/{match['module']}_{number}/{name[match.end() :]}"


def _unstack(leaves: Mapping[str, Leaf], path: str) -> Mapping[str, Leaf]:
    stacks = {name: leaf for name, leaf in leaves.items() if name.startswith(_SCAN)}
    if not stacks:
        return leaves
    depth = Counter(leaf.shape[0] for leaf in stacks.values() if leaf.shape).most_common(1)[0][0]
    flat = {name: leaf for name, leaf in leaves.items() if name not in stacks}
    for name, leaf in stacks.items():
        if leaf.shape[:1] != (depth,):
            raise CheckpointError(
                f"{path}: {leaf.name}: checkpoint {leaf.shape}, the other leaves are stacks of {depth} blocks"
            )
        for i in range(depth):
            flat[f"{BLOCK}{i}/{name.removeprefix(_SCAN)}"] = leaf.derive(
                leaf.shape[1:], operator.itemgetter(i), f"[{i}]"
            )
    return flat
