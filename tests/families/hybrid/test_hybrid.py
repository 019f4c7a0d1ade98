"""The R+ViT hybrids' layouts, sizes and strictness."""

import dataclasses

import numpy as np
import pytest
from family_files import load, outputs, rewrite, without

from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families.family import RandomOptions
from vit_convert.families.hybrid.architecture import (
    HYBRIDS,
    Hybrid,
    feature_size,
    leaf_shapes,
    num_tokens,
    parameter_count,
)
from vit_convert.families.hybrid.family import HybridFamily
from vit_convert.families.hybrid.layouts import standardize

FAMILY = HybridFamily()
# vit_jax/models_test.py: 1000 classes, 224 pixels; and the arrays of each file: 16 a block, 9 a unit and 3 a stage, 3
# the stem's, 8.
PUBLISHED = {
    "R+ViT-Ti/16": (6_337_704, 50, 16 * 12 + 8 + 3),
    "R26+ViT-S/32": (36_431_912, 50, 16 * 12 + 8 + 3 + 9 * 8 + 3 * 4),
    "R26+ViT-B/32": (101_383_976, 50, 16 * 12 + 8 + 3 + 9 * 8 + 3 * 4),
    "R50+ViT-B/16": (98_659_112, 197, 16 * 12 + 8 + 156),
    "R50+ViT-L/32": (328_994_856, 50, 16 * 24 + 8 + 3 + 9 * 16 + 3 * 4),
}


@pytest.fixture
def tiny(tmp_path):
    def write(variant="R8+ViT-mu/8", **options):
        path = tmp_path / "tiny.npz"
        FAMILY.write_random(path, variant, RandomOptions(**{"image_size": (64, 64), "num_classes": 10, **options}))
        return path

    return write


def described(variant, size=(224, 224)):
    from vit_convert.families.vit.variants import architecture_of

    row = HYBRIDS[variant]
    trunk = architecture_of(f"{row.letters}/{row.patch_size}", feature_size(size, row.stages))
    return Hybrid(variant, row.stages, size, trunk)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_counts(variant):
    count, tokens, leaves = PUBLISHED[variant]
    model = described(variant)
    assert num_tokens(model) == tokens
    assert parameter_count(model, tokens) == count
    # the class token's row, folded
    assert sum(np.prod(shape) for shape in leaf_shapes(model).values()) == count - model.trunk.width
    assert len(leaf_shapes(model)) == leaves


@pytest.mark.parametrize("variant", ["R8+ViT-mu/8", "R+ViT-mu/16"])
@pytest.mark.parametrize("layout", FAMILY.layouts)
def test_sizes_are_read_from_the_shapes(tiny, variant, layout):
    found = load(FAMILY, tiny(variant, layout=layout))
    assert (found.variant, found.num_classes, found.preprocess) == (variant, 10, "vit_jax")
    assert found.image_size == found.source_image_size == (64, 64)
    assert found.architecture.stages == HYBRIDS[variant].stages
    assert found.patch_size == {"R8+ViT-mu/8": 8, "R+ViT-mu/16": 32}[variant]


def test_both_shapes_of_group_norm_are_one_model(tiny):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    old = outputs(FAMILY, tiny(layout="vit_jax"), images)
    assert np.load(tiny(layout="vit_jax"))["block1/unit1/gn_proj/scale"].shape == (1, 1, 1, 256)
    new = outputs(FAMILY, tiny(layout="vit_jax_linen"), images)
    assert np.load(tiny(layout="vit_jax_linen"))["block1/unit1/gn_proj/scale"].shape == (256,)
    for name, values in old.items():
        np.testing.assert_array_equal(new[name], values)


def test_epsilon_is_added_to_the_deviation():
    """A kernel whose deviation is the epsilon tells where it goes: 1/2 here, 1/sqrt(2) or 0.003 under the variance."""
    kernel = np.array([1e-5, -1e-5] * 8, np.float32).reshape(4, 2, 2, 1)
    np.testing.assert_allclose(standardize(kernel), kernel / 2e-5, rtol=1e-5)


def test_standardising_is_by_output():
    kernel = np.random.default_rng(0).normal(3, [0.1, 1.0, 10.0], (3, 3, 5, 3)).astype(np.float32)
    result = standardize(kernel)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(result.std((0, 1, 2)), 1, rtol=2e-4)


def test_another_image_size(tiny):
    found = load(FAMILY, tiny(), image_size=(96, 64))
    assert (found.image_size, found.source_image_size) == ((96, 64), (64, 64))
    assert found.params["pos_embedding"].shape == (1, 12 * 8, 32)
    assert "position table resampled from 64x64 to 96x64 pixels" in found.warnings[0]
    assert load(FAMILY, tiny(), image_size=(60, 61)).warnings == ()  # the feature map is as large
    with pytest.raises(UsageError, match=r"112x64: a feature map of 28x16, which patches of 8 do not tile") as refusal:
        load(FAMILY, tiny("R+ViT-mu/16"), image_size=(112, 64))
    assert refusal.value.fix == "The nearest that they do: 128x64."


def test_a_file_that_is_not_square(tiny):
    """5 by 7 tokens and the class token's row; as many parameters as the file holds numbers."""
    path = tiny(image_size=(40, 56))
    found = load(FAMILY, path, posemb_grid=(5, 7))
    assert found.image_size == found.source_image_size == found.architecture.image_size == (40, 56)
    assert found.architecture.trunk.image_size == (5, 7) and found.attentions == ((16, 36),)
    assert found.params["pos_embedding"].shape == (1, 35, 32) and found.warnings == ()
    assert found.num_params == sum(array.size for array in np.load(path).values())
    other = load(FAMILY, path, posemb_grid=(5, 7), image_size=(56, 40))
    assert (other.image_size, other.source_image_size) == ((56, 40), (40, 56))
    assert "from 40x56 to 56x40 pixels" in other.warnings[0] and other.num_params == found.num_params


def test_without_a_head(tiny):
    images = np.zeros((1, 64, 64, 3), np.float32)
    assert outputs(FAMILY, tiny(), images, outputs="features")["features"].shape == (1, 32)
    with pytest.raises(CheckpointError, match="no head/kernel"):
        load(FAMILY, tiny(num_classes=0))


def test_pre_logits(tiny):
    images = np.zeros((1, 64, 64, 3), np.float32)
    found = outputs(FAMILY, tiny(pre_logits=True), images, outputs="features")["features"]
    assert np.abs(found).max() <= 1


@pytest.mark.parametrize(
    ("leaf", "told"),
    [
        ("conv_root/kernel", "conv_root/kernel: missing"),
        ("block2/unit2/gn2/bias", "block2/unit2/gn2/bias: missing"),
        ("block1/unit1/conv_proj/kernel", "block1/unit1/conv_proj/kernel: missing"),
        (
            "Transformer/encoderblock_0/MlpBlock_3/Dense_1/bias",
            "Transformer/encoderblock_0/MlpBlock_3/Dense_1/bias: missing",
        ),
        ("Transformer/posembed_input/pos_embedding", "Transformer/posembed_input/pos_embedding: missing"),
    ],
)
def test_missing(tiny, leaf, told):
    path = rewrite(tiny(), lambda arrays: without(arrays, leaf))
    with pytest.raises(CheckpointError, match=told):
        load(FAMILY, path)


def test_a_stage_that_is_missing(tiny):
    path = rewrite(tiny(), lambda arrays: {name.replace("block2/", "block3/"): array for name, array in arrays.items()})
    with pytest.raises(CheckpointError, match="nothing tells the model's stage 2, block2/unit1/"):
        load(FAMILY, path)


def test_extra_and_wrong_shape(tiny):
    path = rewrite(
        tiny(), lambda arrays: arrays | {"block2/unit2/conv_proj/kernel": np.zeros((1, 1, 512, 512), np.float32)}
    )
    with pytest.raises(
        CheckpointError, match=r"block2/unit2/conv_proj/kernel: belongs to no part of variant R8\+ViT-mu/8"
    ):
        load(FAMILY, path)
    path = rewrite(
        tiny(), lambda arrays: arrays | {"block2/unit1/conv2/kernel": np.zeros((1, 1, 128, 128), np.float32)}
    )
    with pytest.raises(
        CheckpointError, match=r"unit1/conv2/kernel: checkpoint \(1, 1, 128, 128\), variant .* needs \(3, 3, 128, 128\)"
    ):
        load(FAMILY, path)


def test_a_given_variant_is_held_against_the_file(tiny):
    with pytest.raises(CheckpointError, match=r"variant R26\+ViT-S/32 needs .* Did you mean R8\+ViT-mu/8\?"):
        load(FAMILY, tiny(), variant="R26_S_32")
    with pytest.raises(UsageError, match=r"variant 'R26_Q_32': no hybrid"):
        load(FAMILY, tiny(), variant="R26_Q_32")


def test_spellings():
    for name in ("R26+ViT-S/32", "R26+ViT-S_32", "R26_S_32", "R26+S/32", "R_Ti_16"):
        assert FAMILY.has_variant(name)
    for name in ("S/32", "Mixer-S/32", "R26", "RN50"):
        assert not FAMILY.has_variant(name)


def test_what_is_no_hybrid(tiny):
    assert FAMILY.match(["embedding/kernel", "Transformer/encoderblock_0/LayerNorm_0/scale"]) is None


def test_canonical_names_are_what_the_module_reads(tiny):
    from vit_convert.families.hybrid.module import module_of
    from vit_convert.families.run import param_shapes

    model = dataclasses.replace(described("R8+ViT-mu/8", (64, 64)))
    assert param_shapes(module_of(model), (64, 64)) == leaf_shapes(model)
