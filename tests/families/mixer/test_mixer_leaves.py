"""A Mixer's names, sizes and one image size from leaves alone, every size different so that none can stand for
another."""

import math
import pathlib

import numpy as np
import pytest

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families.mixer.architecture import (
    PUBLISHED,
    SIZES,
    Mixer,
    Sizes,
    leaf_shapes,
    name_variant,
    parameter_count,
)
from vit_convert.families.mixer.infer import infer_architecture, parse_variant
from vit_convert.families.mixer.layouts import Layout, canonicalize, detect, stored_name

FILE = pathlib.Path("f.npz")
# vit_jax/configs/models.py and big_vision/models/mlp_mixer.py, by kind.
LETTERS = ("S", "B", "L", "H")
TABLE = {
    "width": (512, 768, 1024, 1280),
    "depth": (8, 12, 24, 32),
    "tokens_mlp_dim": (256, 384, 512, 640),
    "channels_mlp_dim": (2048, 3072, 4096, 5120),
}


def small(num_classes=5):
    """Names and shapes as vit_jax's module makes them: width 12, MLPs of 7 and 20, patches of 4, 2 x 3 of them, two
    blocks."""
    shapes = {"stem/kernel": (4, 4, 3, 12), "stem/bias": (12,)}
    for i in range(2):
        for norm, mlp, width, hidden in ((0, "token_mixing", 6, 7), (1, "channel_mixing", 12, 20)):
            block = {f"LayerNorm_{norm}/scale": (12,), f"LayerNorm_{norm}/bias": (12,)}
            block |= {f"{mlp}/Dense_0/kernel": (width, hidden), f"{mlp}/Dense_0/bias": (hidden,)}
            block |= {f"{mlp}/Dense_1/kernel": (hidden, width), f"{mlp}/Dense_1/bias": (width,)}
            shapes |= {f"MixerBlock_{i}/{name}": shape for name, shape in block.items()}
    shapes |= {"pre_head_layer_norm/scale": (12,), "pre_head_layer_norm/bias": (12,)}
    return shapes | ({"head/kernel": (12, num_classes), "head/bias": (num_classes,)} if num_classes else {})


def leaves(shapes):
    return {name: Leaf(name, shape, np.dtype(np.float32), lambda: np.zeros(0)) for name, shape in shapes.items()}


def mixer(**changes):
    sizes = {
        "width": 12,
        "depth": 2,
        "tokens_mlp_dim": 7,
        "channels_mlp_dim": 20,
        "patch_size": 4,
        "image_size": (8, 12),
        "num_classes": 5,
    }
    return Mixer(**{"variant": "custom", **sizes, **changes})


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", TABLE)
def test_sizes_are_those_of_the_projects(size):
    assert {letter: getattr(SIZES[letter], size) for letter in LETTERS} == dict(zip(LETTERS, TABLE[size], strict=True))


def test_the_tiny_one_of_tests():
    assert SIZES["mu"] == Sizes(32, 2, 16, 64) and set(SIZES) == {"mu", *LETTERS}


@pytest.mark.parametrize("num_classes", [0, 5])
def test_shapes_and_count_are_those_of_the_model(num_classes):
    architecture = mixer(num_classes=num_classes)
    assert list(leaf_shapes(architecture).items()) == list(small(num_classes).items())
    assert parameter_count(architecture) == sum(math.prod(shape) for shape in small(num_classes).values())
    assert (architecture.grid, architecture.num_tokens, architecture.norm_epsilon) == ((2, 3), 6, 1e-6)


@pytest.mark.parametrize("num_classes", [0, 5])
def test_sizes_are_read_from_the_shapes(num_classes):
    auto = "".join(["au", "to"])  # not the one that the module holds
    assert infer_architecture(leaves(small(num_classes)), auto, (8, 12), FILE) == (
        mixer(num_classes=num_classes),
        "custom",
    )


@pytest.mark.parametrize("ending", ["/bias", "/scale"])
def test_sizes_are_read_where_a_kind_of_leaf_is_missing(ending):
    shapes = {name: shape for name, shape in small().items() if not name.endswith(ending)}
    assert infer_architecture(leaves(shapes), "auto", (8, 12), FILE)[0] == mixer()


def test_the_width_is_told_by_the_norms_too():
    shapes = {name: shape for name, shape in small().items() if name != "stem/kernel"}
    found, _ = infer_architecture(leaves(shapes), "auto", (2, 3), FILE)
    # without it nothing tells the patch, and the missing leaf is said next
    assert (found.width, found.patch_size) == (12, 1)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (("/scale", "stem/kernel"), "width, stem/kernel"),
        (("Dense_1/bias", "Dense_1/kernel"), "number of tokens, MixerBlock_0/token_mixing/Dense_1/bias"),
    ],
)
def test_a_size_that_nothing_tells(missing, said):
    shapes = {name: shape for name, shape in small().items() if not name.endswith(missing)}
    with pytest.raises(CheckpointError) as error:
        infer_architecture(leaves(shapes), "auto", (8, 12), FILE)
    assert (
        str(error.value) == f"f.npz: nothing tells the model's {said} is missing or empty"
        and "whole" in error.value.fix
    )


def test_a_file_without_a_block():
    shapes = {name: shape for name, shape in small().items() if "Block" not in name}
    with pytest.raises(CheckpointError, match="nothing tells the model's depth, MixerBlock_0/… is missing"):
        infer_architecture(leaves(shapes), "auto", None, FILE)


@pytest.mark.parametrize("tokens", [16, 6])
@pytest.mark.parametrize("asked", [None, (16, 16), (8, 32), (8, 12), (12, 8), (24, 4), (10, 12), (8, 13), (12, 12)])
def test_the_one_size_that_the_weights_are_for(tokens, asked):
    """Patches of 4: 16 of them are a square of 16 pixels, or 8 x 32; 6 are no square."""
    shapes = {
        name: (tokens,) if name.endswith("token_mixing/Dense_1/bias") else shape for name, shape in small().items()
    }
    fits = asked is not None and not (asked[0] % 4 or asked[1] % 4) and asked[0] * asked[1] // 16 == tokens
    if fits or (asked is None and tokens == 16):
        assert infer_architecture(leaves(shapes), "auto", asked, FILE)[0].image_size == (asked or (16, 16))
    elif asked is None:
        with pytest.raises(
            CheckpointError, match=r"f\.npz: token mixing over 6 patches, which is not a square grid"
        ) as error:
            infer_architecture(leaves(shapes), "auto", asked, FILE)
        assert "image_size" in error.value.fix
    else:
        with pytest.raises(
            UsageError, match=rf"image_size {asked[0]}x{asked[1]}: a Mixer takes one size, .* {tokens} patches of 4x4"
        ) as error:
            infer_architecture(leaves(shapes), "auto", asked, FILE)
        own = "16x16" if tokens == 16 else "any of 6 patches"
        assert error.value.fix == f"Leave image_size open, or set it to {own}."


def test_a_given_variant_overrules_the_shapes():
    shapes = {name: (49,) if name.endswith("token_mixing/Dense_1/bias") else shape for name, shape in small().items()}
    found, name = infer_architecture(leaves(shapes), "Mixer-B/32", None, FILE)
    assert (name, found.variant, found.image_size, found.num_classes) == ("custom", "Mixer-B/32", (224, 224), 5)
    assert (found.width, found.depth, found.tokens_mlp_dim, found.channels_mlp_dim, found.patch_size) == (
        768,
        12,
        384,
        3072,
        32,
    )


@pytest.mark.parametrize(
    ("text", "letters", "patch"),
    [("Mixer-B/16", "B", 16), ("Mixer-L_32", "L", 32), ("S/8", "S", 8), ("mu_16", "mu", 16)],
)
def test_spellings(text, letters, patch):
    assert parse_variant(text) == (SIZES[letters], patch)
    assert name_variant(*parse_variant(text)) == f"Mixer-{letters}/{patch}"


@pytest.mark.parametrize("text", ["Mixer-Q/16", "B16", "Mixer-B/0", "mixer-B/16", "Mixer-B/16-gap", "ViT-B/16"])
def test_spellings_that_are_none(text):
    with pytest.raises(UsageError, match=f"variant '{text}': no Mixer") as error:
        parse_variant(text)
    assert "mu, S, B, L, H" in error.value.fix
    assert name_variant(Sizes(1, 2, 3, 4), 16) == "custom"
    assert all(parse_variant(name) for name in PUBLISHED)


# --- names ------------------------------------------------------------------------------------------------------------

OLD = {  # big_vision/models/mlp_mixer.py, `_restore_checkpoint`'s other name for each
    "stem/kernel": "embedding/kernel",
    "pre_head_layer_norm/scale": "Mixer/encoder_norm/scale",
    "MixerBlock_3/LayerNorm_0/scale": "Mixer/encoderblock_3/LayerNorm_0/scale",
    "MixerBlock_3/LayerNorm_1/bias": "Mixer/encoderblock_3/LayerNorm_2/bias",
    "MixerBlock_3/token_mixing/Dense_0/kernel": "Mixer/encoderblock_3/token_mixing_phase_0/kernel1",
    "MixerBlock_3/token_mixing/Dense_1/bias": "Mixer/encoderblock_3/token_mixing_phase_0/bias2",
    "MixerBlock_3/channel_mixing/Dense_0/bias": "Mixer/encoderblock_3/channel_mixing_phase_0/bias1",
    "MixerBlock_3/channel_mixing/Dense_1/kernel": "Mixer/encoderblock_3/channel_mixing_phase_0/kernel2",
    "head/kernel": "head/kernel",
}


@pytest.mark.parametrize("name", OLD)
def test_names_on_disk(name):
    assert stored_name(name, Layout.MIXER) == name and stored_name(name, Layout.MIXER_OLD) == OLD[name]


def test_names_of_old_files_become_the_new_ones():
    others = [f"MixerBlock_{i}/x" for i in range(3)]
    old = {OLD[name]: (1, 2, 1, 3) for name in OLD} | {
        name.replace("MixerBlock_", "Mixer/encoderblock_"): (2,) for name in others
    }
    renamed = canonicalize(leaves(old), Layout.MIXER_OLD, "f.npz")
    assert set(renamed) == {*OLD, *others}
    for name in OLD:  # an MLP's arrays had axes of one beside their own
        assert renamed[name].name == OLD[name] and renamed[name].shape == (
            (2, 3) if "_mixing" in name else (1, 2, 1, 3)
        )


def test_norms_are_counted_and_not_taken_by_their_numbers():
    for numbers in ((0, 1), (0, 2), (3, 5)):
        names = [f"Mixer/encoderblock_0/LayerNorm_{number}/bias" for number in numbers]
        assert list(canonicalize(leaves(dict.fromkeys(names, (2,))), Layout.MIXER_OLD, "f")) == [
            "MixerBlock_0/LayerNorm_0/bias",
            "MixerBlock_0/LayerNorm_1/bias",
        ]


def test_values_of_old_files_are_the_same_in_fewer_axes():
    values = np.arange(6, dtype=np.float32).reshape(1, 2, 1, 3)
    held = {
        name: Leaf(name, values.shape, values.dtype, lambda: values)
        for name in ("Mixer/encoderblock_0/token_mixing_phase_0/kernel1",)
    }
    (leaf,) = canonicalize(held, Layout.MIXER_OLD, "f").values()
    assert leaf.shape == leaf.read().shape == (2, 3) and leaf.read().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_arrays_without_an_axis_of_one_are_left_alone():
    held = leaves({"Mixer/encoderblock_0/token_mixing_phase_0/kernel1": (2, 3)})
    assert list(canonicalize(held, Layout.MIXER_OLD, "f").values()) == list(held.values())


def test_new_names_are_left_alone():
    held = leaves(small())
    assert canonicalize(held, Layout.MIXER, "f") == held


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((1, 2), "0 missing, blocks up to 2"),
        ((0, 3), "1, 2 missing, blocks up to 3"),
        ((5,), "0, 1 missing"),
        ((), "0 missing, no block found"),
    ],
)
def test_blocks_that_are_missing(numbers, said):
    with pytest.raises(CheckpointError, match=f"f: Mixer block {said}"):
        canonicalize(leaves({"stem/bias": (1,)} | {f"MixerBlock_{i}/x": (1,) for i in numbers}), Layout.MIXER, "f")


def test_two_leaves_of_one_name():
    both = {"Mixer/encoder_norm/scale": (2,), "pre_head_layer_norm/scale": (2,), "Mixer/encoderblock_0/x": (1,)}
    with pytest.raises(
        CheckpointError, match="f: pre_head_layer_norm/scale and Mixer/encoder_norm/scale are the same parameter"
    ):
        canonicalize(leaves(both), Layout.MIXER_OLD, "f")


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["stem/kernel", "MixerBlock_0/x"], Layout.MIXER),
        (["Mixer/encoderblock_0/x"], Layout.MIXER_OLD),
        (["Mixer/x", "MixerBlock_0/x"], Layout.MIXER_OLD),
        (["stem/kernel"], None),
        (["MixerBlock_x/y", "a/MixerBlock_0/x", "MixerX"], None),
        ([], None),
    ],
)
def test_layouts(names, layout):
    assert detect(names) is layout
