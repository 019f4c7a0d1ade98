"""Sizes, pooling and grid from the shapes of leaves alone, with every size different, so that none can stand for
another."""

import math
import pathlib

import numpy as np
import pytest

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families.vit.architecture import Architecture
from vit_convert.families.vit.infer import find_position_table, infer_architecture
from vit_convert.families.vit.layouts import Layout
from vit_convert.families.vit.shapes import leaf_shapes, parameter_count

FILE = pathlib.Path("f.npz")


def small(pool="tok", representation=7, num_classes=5):
    """Names and shapes of Flax's ViT as its own code makes them: width 12, MLP 20, 3 heads of 4, patches of 4, 2 x 6 of
    them."""
    attention = {
        f"{name}/{leaf}": shape
        for name in ("query", "key", "value")
        for leaf, shape in (("kernel", (12, 3, 4)), ("bias", (3, 4)))
    }
    attention |= {"out/kernel": (3, 4, 12), "out/bias": (12,)}
    attention = {f"MultiHeadDotProductAttention_0/{name}": shape for name, shape in attention.items()}
    mlp = {"Dense_0/kernel": (12, 20), "Dense_0/bias": (20,), "Dense_1/kernel": (20, 12), "Dense_1/bias": (12,)}
    mlp = {f"MlpBlock_0/{name}": shape for name, shape in mlp.items()}
    norms = [{f"LayerNorm_{i}/scale": (12,), f"LayerNorm_{i}/bias": (12,)} for i in range(2)]
    shapes = {"embedding/kernel": (4, 4, 3, 12), "embedding/bias": (12,), "pos_embedding": (1, 12, 12)}
    if pool == "tok":
        shapes["cls"] = (1, 1, 12)
    for i in range(2):
        shapes |= {
            f"Transformer/encoderblock_{i}/{name}": shape
            for name, shape in (norms[0] | attention | norms[1] | mlp).items()
        }
    shapes |= {"Transformer/encoder_norm/scale": (12,), "Transformer/encoder_norm/bias": (12,)}
    if pool == "map":
        shapes |= {
            f"MAPHead_0/{name}": shape for name, shape in ({"probe": (1, 1, 12)} | attention | norms[0] | mlp).items()
        }
    if representation:
        shapes |= {"pre_logits/kernel": (12, representation), "pre_logits/bias": (representation,)}
    if num_classes:
        shapes |= {"head/kernel": (representation or 12, num_classes), "head/bias": (num_classes,)}
    return shapes


def leaves(shapes):
    return {name: Leaf(name, shape, np.dtype(np.float32), lambda: np.zeros(0)) for name, shape in shapes.items()}


VARIATIONS = [
    (pool, representation, num_classes)
    for pool in ("tok", "gap", "map")
    for representation in (0, 7)
    for num_classes in (0, 5)
]


@pytest.mark.parametrize("variation", VARIATIONS)
def test_shapes_and_count_are_those_of_the_model(variation):
    shapes = small(*variation)
    architecture = Architecture("vit", "custom", 12, 2, 20, 3, 4, (8, 24), variation[2], variation[0], variation[1])
    assert list(leaf_shapes(architecture).items()) == list(shapes.items())
    assert parameter_count(architecture, 12) == sum(math.prod(shape) for shape in shapes.values())
    assert parameter_count(architecture, 0) == parameter_count(architecture, 13) - 13 * 12


@pytest.mark.parametrize("variation", VARIATIONS)
def test_sizes_are_read_from_the_shapes(variation):
    pool, representation, num_classes = variation
    # not the one that the module holds
    found, name = infer_architecture(leaves(small(*variation)), "".join(["au", "to"]))
    assert found == Architecture("vit", "custom", 12, 2, 20, 3, 4, (0, 0), num_classes, pool, representation)
    assert name == "custom" and (found.gelu, found.norm_epsilon) == ("tanh", 1e-6)  # Flax's defaults


@pytest.mark.parametrize("ending", ["/bias", "/kernel", "/scale"])
def test_sizes_are_read_where_a_kind_of_leaf_is_missing(ending):
    """A model without biases, or whose norms have no scale: another kind tells the same size."""
    shapes = {name: shape for name, shape in small().items() if not name.endswith(ending) or name == "embedding/kernel"}
    found, _ = infer_architecture(leaves(shapes), "auto")
    assert found == Architecture("vit", "custom", 12, 2, 20, 3, 4, (0, 0), 5, "tok", 7)


@pytest.mark.parametrize("wrong", sorted(small()))
def test_one_leaf_that_is_transposed_changes_no_size_that_others_tell(wrong):
    whole = small()
    found, _ = infer_architecture(leaves(whole | {wrong: whole[wrong][::-1]}), "auto")
    assert (found.width, found.depth, found.mlp_dim, found.num_heads, found.patch_size, found.pool) == (
        12,
        2,
        20,
        3,
        4,
        "tok",
    )


def test_a_given_variant_overrules_the_shapes():
    found, name = infer_architecture(leaves(small(pool="map")), "S/32")
    assert (found.variant, found.width, found.depth, found.mlp_dim, found.num_heads, found.patch_size) == (
        "S/32",
        384,
        12,
        1536,
        6,
        32,
    )
    assert (name, found.pool, found.representation_size, found.num_classes) == ("custom", "map", 7, 5)
    for given, width in (("mu/8", 32), ("g-opt/14", 1536), ("e/14", 1792), ("Ti/16", 192)):  # in capitals and not
        assert infer_architecture(leaves(small()), given)[0].width == width
    found, _ = infer_architecture(leaves(small()), "ViT-S_32-gap-norep")
    assert (found.variant, found.pool, found.representation_size) == ("S/32", "gap", 0)


def test_grid_and_tokens():
    for pool, tokens in (("tok", 13), ("gap", 12), ("map", 12), ("none", 12)):
        architecture = Architecture("vit", "custom", 12, 2, 20, 3, 4, (8, 24), 5, pool)
        assert (architecture.grid, architecture.num_tokens, architecture.representation_size) == ((2, 6), tokens, 0)
    # what the patches do not reach
    assert Architecture("vit", "custom", 12, 2, 20, 3, 4, (11, 7), 5, "gap").grid == (2, 1)


# --- the position table -----------------------------------------------------------------------------------------------


def table(rows, layout, *, cls=True, image_size=None, given=None, shape=None):
    shapes = ({"cls": (1, 1, 12)} if cls else {}) | (
        {"pos_embedding": (1, rows, 12) if shape is None else shape} if rows else {}
    )
    return find_position_table(leaves(shapes), layout, 4, image_size, given, FILE)


IN_MODULE = [Layout.VIT_JAX, Layout.VIT_JAX_LINEN]
ON_TOP = [Layout.BIG_VISION, Layout.BIG_VISION_OLD, Layout.BIG_VISION_SCAN]


@pytest.mark.parametrize("layout", IN_MODULE)
def test_a_table_in_its_module_begins_with_the_class_token(layout):
    assert table(17, layout) == ((4, 4), 1)
    assert table(16, layout, cls=False) == ((4, 4), 0)
    assert table(13, layout, given=(2, 6)) == table(13, layout, image_size=(8, 24)) == ((2, 6), 1)
    assert table(2, layout) == ((1, 1), 1)
    with pytest.raises(CheckpointError) as error:
        table(16, layout)
    assert "which is not a square grid and a class token's row" in str(error.value)
    assert error.value.fix.startswith("It is 4x4 patches: the row of the class token, which the model has, was lost.")
    with pytest.raises(CheckpointError) as error:
        table(13, layout)
    assert (
        "a square grid and a class token's row" in str(error.value)
        and error.value.fix == "Set posemb_grid to its (rows, columns)."
    )


@pytest.mark.parametrize("layout", ON_TOP)
def test_of_a_table_on_top_the_grid_decides(layout):
    assert table(16, layout) == table(16, layout, cls=False) == ((4, 4), 0)
    assert table(17, layout) == ((4, 4), 1)
    assert table(12, layout, given=(2, 6)) == ((2, 6), 0)
    assert table(13, layout, given=(2, 6)) == ((2, 6), 1)
    with pytest.raises(CheckpointError) as error:
        table(13, layout)
    assert str(error.value) == "f.npz: pos_embedding: checkpoint (1, 13, 12), which is not a square grid"
    assert error.value.fix == "Set posemb_grid to its (rows, columns)."
    with pytest.raises(CheckpointError, match=r"is not a square grid$"):
        table(17, layout, cls=False)


@pytest.mark.parametrize("layout", list(Layout))
def test_a_grid_that_is_given_is_the_only_one(layout):
    """Also where the rows are a square, and fit the size asked for."""
    assert table(16, layout, cls=False, given=(2, 8)) == ((2, 8), 0)
    assert table(16, layout, cls=False, given=(2, 8), image_size=(16, 16)) == ((2, 8), 0)
    for given in ((3, 5), (4, 5), (0, 5), (-4, -4)):
        with pytest.raises(CheckpointError, match=f"which is not posemb_grid {given[0]}x{given[1]}"):
            table(16, layout, cls=False, given=given)


@pytest.mark.parametrize("layout", list(Layout))
def test_a_size_that_fits_beside_the_square_is_asked_about(layout):
    assert table(16, layout, cls=False, image_size=(16, 16)) == ((4, 4), 0)
    assert table(16, layout, cls=False, image_size=(24, 24)) == ((4, 4), 0)  # resampled afterwards
    with pytest.raises(UsageError) as error:
        table(16, layout, cls=False, image_size=(8, 32))
    assert "16 rows may be 4x4 patches, resampled for the image size asked for, or 2x8 as that has" in str(error.value)
    assert error.value.fix == "Set posemb_grid to what the model was trained with: (4, 4) or (2, 8)."


@pytest.mark.parametrize("layout", list(Layout))
def test_no_table(layout):
    """sincos2d came with big_vision; the files of vit_jax always have a table, and one that lacks it was not saved
    whole."""
    if layout is Layout.VIT_JAX:
        with pytest.raises(
            CheckpointError, match=r"f\.npz: Transformer/posembed_input/pos_embedding: missing"
        ) as error:
            table(0, layout, image_size=(8, 24))
        assert "whole" in error.value.fix
        return
    assert table(0, layout, image_size=(8, 24)) == ((2, 6), 0)
    with pytest.raises(
        UsageError, match=r"stores no position table \(sincos2d\), so it does not tell its image size"
    ) as error:
        table(0, layout)
    assert "image_size" in error.value.fix


@pytest.mark.parametrize("rows", [0, 16])
def test_a_size_that_the_patches_do_not_tile(rows):
    for image_size in ((10, 8), (8, 10), (0, 8), (2, 8)):
        with pytest.raises(
            UsageError, match=f"image_size {image_size[0]}x{image_size[1]}: not a multiple of the patch size 4"
        ):
            table(rows, Layout.BIG_VISION, image_size=image_size)


@pytest.mark.parametrize("shape", [(16, 12), (16,), (), (1, 1, 16, 12)])
def test_a_table_with_other_axes(shape):
    with pytest.raises(CheckpointError) as error:
        table(1, Layout.BIG_VISION, shape=shape)
    assert str(error.value) == f"f.npz: pos_embedding: checkpoint {shape}, needed is (1, rows, width)"


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("layout", list(Layout))
def test_a_table_without_a_row(layout, cls):
    for shape in ((1, 0, 12), (1, 1, 12))[: 1 if not cls else 2 if layout in IN_MODULE else 1]:
        with pytest.raises(CheckpointError, match="which is not a square grid"):
            table(1, layout, cls=cls, shape=shape)
