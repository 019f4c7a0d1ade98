"""What a hybrid's names, spellings and sizes say, each by hand."""

import pathlib

import numpy as np
import pytest

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families.hybrid.architecture import (
    HYBRIDS,
    Hybrid,
    Row,
    Unit,
    feature_size,
    leaf_shapes,
    name_variant,
    num_tokens,
    stride_of,
)
from vit_convert.families.hybrid.infer import check_image_size, infer_architecture, parse_variant
from vit_convert.families.hybrid.layouts import canonicalize, detect, is_hybrid, standardize, stored_name
from vit_convert.families.vit.layouts import Layout
from vit_convert.families.vit.variants import architecture_of

FILE = pathlib.Path("none/r.npz")


def held(shapes):
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: Leaf(name, value.shape, value.dtype, lambda value=value: value) for name, value in arrays.items()}


def described(stages=(1, 2), patch=1, size=(64, 64), root_width=64):
    trunk = architecture_of(f"mu/{patch}", feature_size(size, stages), 10)
    return Hybrid("R8+ViT-mu/8", stages, size, trunk, root_width)


NAMES = {
    "conv_root/kernel": "conv_root/kernel",
    "gn_root/scale": "gn_root/scale",
    "stage_1/block_0/conv_proj/kernel": "block1/unit1/conv_proj/kernel",
    "stage_3/block_11/gn2/bias": "block3/unit12/gn2/bias",
    "embedding/kernel": "embedding/kernel",
    "Transformer/encoderblock_1/LayerNorm_0/scale": "Transformer/encoderblock_1/LayerNorm_0/scale",
    "pos_embedding": "Transformer/posembed_input/pos_embedding",
}


@pytest.mark.parametrize("canonical", NAMES)
def test_names_on_disk(canonical):
    assert stored_name(canonical, Layout.VIT_JAX) == NAMES[canonical]


@pytest.mark.parametrize("layout", [Layout.VIT_JAX, Layout.VIT_JAX_LINEN])
def test_every_name_is_found_again(layout):
    model = described()
    leaves = held({stored_name(name, layout): shape for name, shape in leaf_shapes(model).items()})
    found = canonicalize(leaves, "r.npz")
    assert {name: leaf.shape for name, leaf in found.items()} == leaf_shapes(model)
    assert detect(leaves) is layout and is_hybrid(leaves)
    trunk = [name for name in leaves if not name.startswith(("conv_root", "gn_root", "block"))]
    assert not is_hybrid(trunk) and detect(trunk) is None
    assert is_hybrid(["gn_root/scale"]) and not is_hybrid(["x/gn_root/scale", "block/unit1/conv1/kernel", "block1"])


def test_only_kernels_are_standardised_and_norms_have_one_axis():
    shapes = {
        "Transformer/encoderblock_0/LayerNorm_0/scale": (32,),
        "conv_root/kernel": (7, 7, 3, 32),
        "gn_root/scale": (1, 1, 1, 32),
        "gn_root/bias": (32,),
        "block1/unit1/conv1/kernel": (32, 32),  # of another model: as it is, for the message
        "block1/unit1/gn1/scale": (1, 1, 32),
        "block1/unit1/conv2/bias": (3, 3, 4, 4),
    }
    leaves = held(shapes)
    found = canonicalize(leaves, "r.npz")
    np.testing.assert_array_equal(found["conv_root/kernel"].read(), standardize(leaves["conv_root/kernel"].read()))
    np.testing.assert_array_equal(found["gn_root/scale"].read(), leaves["gn_root/scale"].read().ravel())
    assert found["gn_root/scale"].shape == (32,)
    for ours, theirs in {
        "gn_root/bias": "gn_root/bias",
        "stage_1/block_0/conv1/kernel": "block1/unit1/conv1/kernel",
        "stage_1/block_0/gn1/scale": "block1/unit1/gn1/scale",
        "stage_1/block_0/conv2/bias": "block1/unit1/conv2/bias",
    }.items():
        np.testing.assert_array_equal(found[ours].read(), leaves[theirs].read())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("R26+ViT-S/32", "R26+ViT-S/32"),
        ("R50_L_32", "R50+ViT-L/32"),
        ("R+ViT-Ti/16", "R+ViT-Ti/16"),
        ("R_Ti/16", "R+ViT-Ti/16"),
        ("R8+ViT-mu_8", "R8+ViT-mu/8"),
    ],
)
def test_spellings_of_variants(text, name):
    assert parse_variant(text) == (name, HYBRIDS[name])


@pytest.mark.parametrize("text", ["R26+ViT-S/16", "ViT-S/32", "R26", "xR26+ViT-S/32", "R26+ViT-S/32x", ""])
def test_what_is_no_variant(text):
    with pytest.raises(UsageError, match="no hybrid") as error:
        parse_variant(text)
    assert error.value.fix.startswith("Use one of R+ViT-Ti/16, R26+ViT-S/32, R26+ViT-B/32, R50+ViT-B/16, R50+ViT-L/32")


@pytest.mark.parametrize(
    ("stages", "patch", "letters", "name"),
    [((1, 2), 1, "mu", "R8+ViT-mu/8"), ((1, 2), 2, "mu", "custom"), ((2, 1), 1, "mu", "custom"), ((), 8, "", "custom")],
)
def test_names_of_sizes(stages, patch, letters, name):
    assert name_variant(stages, patch, letters) == name


@pytest.mark.parametrize(
    ("stages", "stride", "channels", "map_of_100x64"),
    [
        ((), 4, 64, (25, 16)),
        ((2,), 4, 256, (25, 16)),
        ((1, 2), 8, 512, (13, 8)),
        ((3, 4, 9), 16, 1024, (7, 4)),
        ((2, 2, 2, 2), 32, 2048, (4, 2)),
    ],
)
def test_sizes_of_the_feature_map(stages, stride, channels, map_of_100x64):
    """Every step of two rounds up."""
    assert stride_of(stages) == stride and feature_size((100, 64), stages) == map_of_100x64
    model = described(stages)
    assert (model.stride, model.channels) == (stride, channels)


def test_units():
    assert list(described((1, 2)).units()) == [
        Unit("stage_1/block_0/", 64, 64, 1, True),
        Unit("stage_2/block_0/", 256, 128, 2, True),
        Unit("stage_2/block_1/", 512, 128, 1, False),
    ]
    assert list(described(()).units()) == []
    # as many channels as it gives: no shortcut but where it strides
    assert [unit.projects for unit in Hybrid("", (1,), (8, 8), described().trunk, 64).units()] == [True]
    assert num_tokens(described()) == 8 * 8 + 1


@pytest.mark.parametrize(
    ("size", "stages", "patch", "near"),
    [
        ((64, 64), (1, 2), 1, None),
        ((60, 61), (1, 2), 1, None),  # rounded up
        ((1, 1), (1, 2), 1, None),
        ((64, 96), (), 8, None),
        ((112, 64), (), 8, "128x64"),
        ((64, 100), (), 8, "64x96"),
        ((4, 64), (), 8, "32x64"),
    ],
)
def test_image_sizes_that_patches_tile(size, stages, patch, near):
    if near is None:
        return check_image_size(size, stages, patch)
    with pytest.raises(UsageError, match=f"image_size {size[0]}x{size[1]}: a feature map of") as error:
        check_image_size(size, stages, patch)
    assert error.value.fix == f"The nearest that they do: {near}."
    return None


def inferred(model, variant="auto"):
    return infer_architecture(held(leaf_shapes(model)), variant, FILE)


def test_sizes_from_shapes():
    found, name = inferred(described())
    assert (found.variant, name, found.stages, found.root_width) == ("R8+ViT-mu/8", "R8+ViT-mu/8", (1, 2), 64)
    assert (found.image_size, found.trunk.family, found.trunk.variant) == ((0, 0), "vit", "R8+ViT-mu/8")
    found, name = inferred(described((2,)))
    assert (found.variant, name, found.stages) == ("custom", "custom", (2,))
    found, name = inferred(described(), "R26_S_32")
    assert (found.variant, name, found.stages) == ("R26+ViT-S/32", "R8+ViT-mu/8", (2, 2, 2, 2))
    assert (found.trunk.width, found.trunk.depth, found.trunk.patch_size) == (384, 12, 1)
    assert HYBRIDS["R26+ViT-S/32"] == Row((2, 2, 2, 2), 1, "S")
    for unknown in ("mu", "x", "R26"):
        with pytest.raises(UsageError, match="no hybrid"):
            inferred(described(), unknown)


@pytest.mark.parametrize("gone", ["conv_root/kernel", "gn_root/"])
def test_either_leaf_tells_the_stem(gone):
    """What is missing is said by its name, and not as a size that nothing tells."""
    kept = {name: shape for name, shape in leaf_shapes(described()).items() if not name.startswith(gone)}
    assert infer_architecture(held(kept), "auto", FILE)[0].root_width == 64


def test_a_stem_that_is_no_whole_groups():
    with pytest.raises(CheckpointError, match="a stem of 48 channels, which are no 32 groups"):
        inferred(described(root_width=48))
    assert inferred(described(root_width=32))[0].root_width == 32


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("conv_root gn_root", "nothing tells the model's stem"),
        ("stage_1", "nothing tells the model's stage 1"),
        ("Transformer/encoderblock", "nothing tells the model's depth"),
    ],
)
def test_what_nothing_tells(gone, said):
    kept = {name: shape for name, shape in leaf_shapes(described()).items() if not name.startswith(tuple(gone.split()))}
    with pytest.raises(CheckpointError, match=said):
        infer_architecture(held(kept), "auto", FILE)
