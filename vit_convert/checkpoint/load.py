"""From a file to canonical parameters: everything present, nothing left over, every shape right, every value finite."""

import concurrent.futures
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable

import numpy as np

from vit_convert.checkpoint import layouts, posemb
from vit_convert.checkpoint.architecture import Architecture
from vit_convert.checkpoint.containers import Leaf, Leaves, read_container, split_subtree, verify
from vit_convert.checkpoint.infer import Grid, find_position_table, infer_architecture
from vit_convert.checkpoint.layouts import Layout
from vit_convert.checkpoint.match import Expected, require_match
from vit_convert.checkpoint.shapes import BLOCK, leaf_shapes, parameter_count
from vit_convert.core.bundle import hash_file
from vit_convert.core.errors import CheckpointError, UsageError, nearest

FAMILIES = ("vit",)
OUTPUTS = ("logits", "features")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, understood and verified.

    Attributes:
        path: the file.
        layout: how its parameters were named.
        architecture: the model, at the image size asked for.
        params: float32 parameters by canonical name, read on access: views of the file where it stores float32 uncompressed.
            `params.leaves[name].shape` tells a shape without reading.
        source_image_size: (height, width) in pixels that the stored position table is for.
        num_params: number of stored parameters that the model uses.
        hashing: of the file, in a thread; `sha256` waits for it.
        warnings: what a person should know, one sentence each.
        preprocess: the family by whose rule its images were prepared.
        zero_head: whether every class gets the same logit.
    """

    path: pathlib.Path
    layout: Layout
    architecture: Architecture
    params: Leaves
    source_image_size: tuple[int, int]
    num_params: int
    hashing: concurrent.futures.Future[str]
    warnings: list[str]
    preprocess: str
    zero_head: bool

    @property
    def sha256(self) -> str:
        """The file's sha256, in hex."""
        return self.hashing.result()


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    family: str = "auto",
    variant: str = "auto",
    image_size: tuple[int, int] | None = None,
    outputs: str = "logits",
    posemb_grid: Grid | None = None,
) -> Checkpoint:
    """Loads a ViT checkpoint of any layout, strictly.

    Args:
        path: `.npz` or `.safetensors`; `file.npz:img` takes one sub-tree, as in big_vision.
        family: "auto" or "vit".
        variant: "auto" reads it from the shapes; a name such as "B/32" is checked against them.
        image_size: (height, width) in pixels to resample the position table for; None keeps the checkpoint's.
        outputs: "logits", or "features" to leave the head out.
        posemb_grid: (rows, columns) of the stored position table where it is not square.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: the file does not hold, leaf for leaf, the model that it should.
        UsageError: an argument has no meaning for this model.
    """
    if family not in ("auto", *FAMILIES):
        raise UsageError(f"family {family!r}: unknown.{nearest(family, FAMILIES)}", fix=f"Use auto or {', '.join(FAMILIES)}.")
    if outputs not in OUTPUTS:
        raise UsageError(f"outputs {outputs!r}: unknown.{nearest(outputs, OUTPUTS)}", fix=f"Use {' or '.join(OUTPUTS)}.")
    name, subtree = split_subtree(path)
    file = pathlib.Path(name)
    everything = read_container(file).leaves
    prefix, stored = layouts.select(everything, subtree, str(file))
    layout = layouts.detect(stored, str(file))
    leaves = layouts.canonicalize(stored, str(file))
    architecture, found = infer_architecture(leaves, variant)
    _require_sizes(file, architecture)
    table, class_row = find_position_table(leaves, layout, architecture.patch_size, image_size, posemb_grid, file)
    source_size = (table[0] * architecture.patch_size, table[1] * architecture.patch_size)
    architecture = dataclasses.replace(architecture, image_size=source_size)
    rows = math.prod(table) + class_row if "pos_embedding" in leaves else 0

    def on_disk(name: str) -> str:
        return prefix + layouts.stored_name(name, layout)

    require_match(leaves, _expected(file, architecture, rows, on_disk, "" if variant == "auto" else found))
    pool = concurrent.futures.ThreadPoolExecutor(1)
    hashing = pool.submit(hash_file, file)
    pool.shutdown(wait=False)
    verify(file, stored.values())

    preprocess = layouts.preprocessing(layout, architecture.pool, architecture.num_classes, prefix, everything)
    warnings, zero_head = [], False
    if class_row:
        leaves = layouts.fold_class_row(leaves)
    if outputs == "features":
        architecture = dataclasses.replace(architecture, num_classes=0)
        leaves = {name: leaf for name, leaf in leaves.items() if not name.startswith("head/")}
    elif not architecture.num_classes:
        raise CheckpointError(f"{file}: no head/kernel, so there are no logits", fix="Set outputs='features'.")
    elif not leaves["head/kernel"].read().any():
        zero_head = True
        warnings.append(
            f"{file.name}: head/kernel is all zeros, so every class gets the same logit; outputs='features' leaves the head out."
        )
    num_params = parameter_count(architecture, rows)
    if image_size is not None:
        architecture = dataclasses.replace(architecture, image_size=image_size)
    if rows and architecture.grid != table:
        leaves["pos_embedding"] = _resampled(leaves["pos_embedding"], table, architecture.grid)
        old, new = ("x".join(map(str, size)) for size in (source_size, architecture.image_size))
        warnings.append(
            f"{file.name}: position table resampled from {old} to {new} pixels; accuracy drops unless the model was trained for both."
        )
    elif not rows:
        if architecture.width % 4 or architecture.width < 8:
            raise CheckpointError(f"{file}: no position table, and sincos2d has none for width {architecture.width}: 8, 12, 16, …")
        leaves["pos_embedding"] = _constant("pos_embedding", posemb.sincos2d(architecture.grid, architecture.width))
    params = {name: leaves[name].as_float32() for name in leaf_shapes(architecture)}
    return Checkpoint(file, layout, architecture, Leaves(params), source_size, num_params, hashing, warnings, preprocess, zero_head)


def _require_sizes(file: pathlib.Path, architecture: Architecture) -> None:
    """Refuses a file that lacks every leaf which would tell a size."""
    told_by = {
        "width": "embedding/kernel",
        "patch_size": "embedding/kernel",
        "depth": f"{BLOCK}0/…",
        "mlp_dim": f"{BLOCK}0/MlpBlock_0/Dense_0/kernel",
        "num_heads": f"{BLOCK}0/MultiHeadDotProductAttention_0/query/kernel",
    }
    for size, leaf in told_by.items():
        if getattr(architecture, size) < 1:
            raise CheckpointError(
                f"{file}: nothing tells the model's {size}, {leaf} is missing or empty",
                fix="Save the model's parameters whole, under the names its project uses.",
            )


def _constant(name: str, value: np.ndarray) -> Leaf:
    return Leaf(name, value.shape, value.dtype, lambda: value)


def _resampled(leaf: Leaf, old: Grid, new: Grid) -> Leaf:
    return _constant(leaf.name, posemb.resample(leaf.as_float32().read(), old, new))


def _expected(file: pathlib.Path, architecture: Architecture, rows: int, stored_name: Callable[[str], str], found: str) -> Expected:
    """The stored parameters: the position table with the rows that the file has, and none where it stores none."""
    shapes = leaf_shapes(architecture)
    if rows:
        shapes["pos_embedding"] = (1, rows, architecture.width)
    else:
        del shapes["pos_embedding"]
    return Expected(file, architecture.variant, shapes, parameter_count(architecture, rows), stored_name, found)
