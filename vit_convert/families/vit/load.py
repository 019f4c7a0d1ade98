"""From the leaves of a ViT's checkpoint to its canonical parameters, strictly."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from vit_convert.checkpoint.containers import Leaf, Leaves
from vit_convert.checkpoint.match import Expected, require_match, require_size
from vit_convert.core.errors import CheckpointError
from vit_convert.families.family import Asked, Loaded
from vit_convert.families.head import settle_head
from vit_convert.families.vit import layouts, posemb
from vit_convert.families.vit.architecture import Architecture
from vit_convert.families.vit.infer import find_position_table, infer_architecture
from vit_convert.families.vit.layouts import Layout
from vit_convert.families.vit.shapes import BLOCK, leaf_shapes, parameter_count


def load_vit(stored: Mapping[str, Leaf], layout: Layout, asked: Asked) -> Loaded:
    """Compares leaves with the ViT inferred from their shapes, and adapts them to the request.

    Args:
        stored: by their names on disk, without prefix.
        layout: of the file.
        asked: variant, image size and outputs.

    Returns:
        The checkpoint, with its position table resampled to the requested image size.

    Raises:
        CheckpointError: the leaves are not exactly the model's.
        UsageError: a request has no meaning for this model.
    """
    file = asked.file
    leaves = layouts.canonicalize(stored, str(file))
    architecture, found = infer_architecture(leaves, asked.variant)
    _require_sizes(file, architecture)
    table, class_row = find_position_table(
        leaves, layout, architecture.patch_size, asked.image_size, asked.posemb_grid, file
    )
    source_size = (table[0] * architecture.patch_size, table[1] * architecture.patch_size)
    architecture = dataclasses.replace(architecture, image_size=source_size)
    rows = math.prod(table) + class_row if "pos_embedding" in leaves else 0

    def on_disk(name: str) -> str:
        return asked.prefix + layouts.stored_name(name, layout)

    require_match(leaves, _expected(file, architecture, rows, on_disk, asked.instead_of(found)))
    preprocess = layouts.preprocessing(layout, architecture.pool, architecture.num_classes, asked.prefix, asked.names)
    if class_row:
        leaves = layouts.fold_class_row(leaves)
    beside = ("tokens", "grid") if architecture.pool != "none" else ()
    head = settle_head(leaves, architecture.num_classes, asked.outputs, file, beside)
    leaves, warnings = head.leaves, list(head.warnings)
    architecture = dataclasses.replace(architecture, num_classes=head.num_classes, outputs=head.outputs)
    num_params = parameter_count(architecture, rows)
    if asked.image_size is not None:
        architecture = dataclasses.replace(architecture, image_size=asked.image_size)
    if rows and architecture.grid != table:
        leaves["pos_embedding"] = posemb.resampled(leaves["pos_embedding"], table, architecture.grid)
        warnings.append(posemb.resampling_warning(file.name, source_size, architecture.image_size))
    elif not rows:
        if architecture.width % 4 or architecture.width < 8:
            raise CheckpointError(
                f"{file}: no position table, and sincos2d has none for width {architecture.width}: 8, 12, 16, …"
            )
        leaves["pos_embedding"] = _constant("pos_embedding", posemb.sincos2d(architecture.grid, architecture.width))
    return Loaded(
        title="ViT",
        variant=architecture.variant,
        layout=layout,
        architecture=architecture,
        params=Leaves({name: leaves[name].as_float32() for name in leaf_shapes(architecture)}),
        num_params=num_params,
        image_size=architecture.image_size,
        source_image_size=source_size,
        num_classes=architecture.num_classes,
        preprocess=preprocess,
        patch_size=architecture.patch_size,
        resizable=True,
        attentions=((architecture.width // architecture.num_heads, architecture.num_tokens),),
        zero_head=head.is_zero,
        warnings=tuple(warnings),
        output=head.output,
    )


def _require_sizes(file: pathlib.Path, architecture: Architecture) -> None:
    """Refuses a file without any leaf from which some size could be inferred."""
    told_by = {
        "width": "embedding/kernel",
        "patch_size": "embedding/kernel",
        "depth": f"{BLOCK}0/…",
        "mlp_dim": f"{BLOCK}0/MlpBlock_0/Dense_0/kernel",
        "num_heads": f"{BLOCK}0/MultiHeadDotProductAttention_0/query/kernel",
    }
    for size, leaf in told_by.items():
        require_size(file, size, getattr(architecture, size), leaf)


def _constant(name: str, value: np.ndarray) -> Leaf:
    return Leaf(name, value.shape, value.dtype, lambda: value)


def _expected(
    file: pathlib.Path, architecture: Architecture, rows: int, stored_name: Callable[[str], str], found: str
) -> Expected:
    """The stored parameters: the position table with the file's number of rows, or without one if it stores none."""
    shapes = leaf_shapes(architecture)
    if rows:
        shapes["pos_embedding"] = (1, rows, architecture.width)
    else:
        del shapes["pos_embedding"]
    return Expected(file, architecture.variant, shapes, parameter_count(architecture, rows), stored_name, found)
