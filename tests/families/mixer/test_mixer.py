"""MLP-Mixer's layouts, sizes and strictness."""

import numpy as np
import pytest
from family_files import load, outputs, rewrite, without

from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families.family import RandomOptions
from vit_convert.families.mixer.architecture import SIZES, Mixer, leaf_shapes, parameter_count
from vit_convert.families.mixer.family import MixerFamily

FAMILY = MixerFamily()
# vit_jax/models_test.py (1000 classes, 224 pixels); S is counted from the sizes of the published files
# (gs://mixer_models/gsam).
COUNTS = {
    ("B", 16, 1000): 59_880_472,
    ("B", 32, 1000): 60_293_428,
    ("L", 16, 1000): 208_196_168,
    ("B", 16, 21843): 59_880_472 + (21_843 - 1_000) * (768 + 1),  # imagenet21k: a row and a bias a class
    ("L", 16, 21843): 208_196_168 + (21_843 - 1_000) * (1_024 + 1),
}


@pytest.fixture
def tiny(tmp_path):
    def write(layout="mixer", variant="Mixer-mu/16", **options):
        path = tmp_path / f"{layout}.npz"
        FAMILY.write_random(
            path, variant, RandomOptions(**{"image_size": (64, 64), "num_classes": 10, "layout": layout, **options})
        )
        return path

    return write


@pytest.mark.parametrize(("letter", "patch", "classes"), COUNTS)
def test_published_counts(letter, patch, classes):
    sizes = SIZES[letter]
    model = Mixer(
        "", sizes.width, sizes.depth, sizes.tokens_mlp_dim, sizes.channels_mlp_dim, patch, (224, 224), classes
    )
    assert parameter_count(model) == COUNTS[letter, patch, classes]
    assert sum(np.prod(shape) for shape in leaf_shapes(model).values()) == COUNTS[letter, patch, classes]
    assert len(leaf_shapes(model)) == 12 * sizes.depth + 6


def test_both_layouts_are_one_model(tiny):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    new, old = outputs(FAMILY, tiny(), images), outputs(FAMILY, tiny("mixer_old"), images)
    assert set(np.load(tiny("mixer_old"))) & set(np.load(tiny())) == {"head/kernel", "head/bias"}
    for name, values in new.items():
        np.testing.assert_array_equal(old[name], values)


def test_sizes_are_read_from_the_shapes(tiny):
    found = load(FAMILY, tiny(variant="Mixer-S/8", depth=1, num_classes=21843))
    arch = found.architecture
    assert (arch.width, arch.depth, arch.tokens_mlp_dim, arch.channels_mlp_dim, arch.patch_size) == (
        512,
        1,
        256,
        2048,
        8,
    )
    assert (found.variant, found.num_classes, found.image_size, found.preprocess) == (
        "custom",
        21843,
        (64, 64),
        "vit_jax",
    )


def test_a_random_file_is_for_224_pixels_unless_another_size_is_asked_for(tmp_path):
    FAMILY.write_random(tmp_path / "f.npz", "Mixer-mu/16", RandomOptions())
    assert load(FAMILY, tmp_path / "f.npz").image_size == (224, 224)


def test_without_a_head(tiny):
    images = np.zeros((1, 64, 64, 3), np.float32)
    assert outputs(FAMILY, tiny(), images, outputs="features")["features"].shape == (1, 32)
    headless = tiny(num_classes=0)
    assert outputs(FAMILY, headless, images, outputs="features")["features"].shape == (1, 32)
    with pytest.raises(CheckpointError, match="no head/kernel"):
        load(FAMILY, headless)


def test_a_head_of_zeros_is_told(tiny):
    path = rewrite(tiny(), lambda arrays: arrays | {"head/kernel": 0 * arrays["head/kernel"]})
    found = load(FAMILY, path)
    assert found.zero_head
    assert "head/kernel is all zeros" in found.warnings[0]


def test_one_size_and_it_says_so(tiny):
    assert load(FAMILY, tiny(), image_size=(64, 64)).image_size == (64, 64)
    # as many patches: nothing else tells them apart
    assert load(FAMILY, tiny(), image_size=(32, 128)).image_size == (32, 128)
    with pytest.raises(
        UsageError, match=r"96x96: a Mixer takes one size, its token mixing has weights for 16 patches of 16x16 pixels"
    ):
        load(FAMILY, tiny(), image_size=(96, 96))
    oblong = tiny(image_size=(32, 96))
    with pytest.raises(CheckpointError, match="12 patches, which is not a square grid"):
        load(FAMILY, oblong)
    assert load(FAMILY, oblong, image_size=(32, 96)).image_size == (32, 96)
    with pytest.raises(UsageError, match="no position table"):
        load(FAMILY, tiny(), posemb_grid=(4, 4))


@pytest.mark.parametrize(
    ("layout", "leaf", "told"),
    [
        ("mixer", "MixerBlock_1/token_mixing/Dense_1/bias", "MixerBlock_1/token_mixing/Dense_1/bias: missing"),
        (
            "mixer_old",
            "Mixer/encoderblock_1/token_mixing_phase_0/bias2",
            "Mixer/encoderblock_1/token_mixing_phase_0/bias2: missing",
        ),
        ("mixer_old", "Mixer/encoderblock_0/LayerNorm_2/scale", "Mixer/encoderblock_0/LayerNorm_2/scale: missing"),
        ("mixer_old", "Mixer/encoder_norm/scale", "Mixer/encoder_norm/scale: missing"),
        ("mixer", "stem/bias", "stem/bias: missing"),
        ("mixer", "head/bias", "head/bias: missing"),
    ],
)
def test_missing(tiny, layout, leaf, told):
    path = rewrite(tiny(layout), lambda arrays: without(arrays, leaf))
    with pytest.raises(CheckpointError, match=told):
        load(FAMILY, path)


def test_extra_and_wrong_shape(tiny):
    path = rewrite(tiny(), lambda arrays: arrays | {"MixerBlock_0/gate": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match="MixerBlock_0/gate: belongs to no part of variant Mixer-mu/16"):
        load(FAMILY, path)
    kernel = "MixerBlock_0/channel_mixing/Dense_0/kernel"
    path = rewrite(tiny(), lambda arrays: arrays | {kernel: arrays[kernel].T})
    with pytest.raises(
        CheckpointError, match=r"checkpoint \(64, 32\), variant Mixer-mu/16 needs \(32, 64\)\. It looks transposed"
    ):
        load(FAMILY, path)


def test_a_whole_block_missing(tiny):
    path = rewrite(
        tiny(), lambda arrays: {name: array for name, array in arrays.items() if "MixerBlock_0/" not in name}
    )
    with pytest.raises(CheckpointError, match="Mixer block 0 missing, blocks up to 1 found"):
        load(FAMILY, path)


def test_two_leaves_of_one_name(tiny):
    both = dict(np.load(tiny("mixer_old"))) | {"pre_head_layer_norm/scale": np.ones(32, np.float32)}
    path = rewrite(tiny("mixer_old"), lambda arrays: both)
    with pytest.raises(CheckpointError, match="are the same parameter"):
        load(FAMILY, path)


def test_a_given_variant_is_held_against_the_file(tiny):
    assert load(FAMILY, tiny(), variant="Mixer-mu_16").variant == "Mixer-mu/16"
    with pytest.raises(CheckpointError, match=r"variant Mixer-B/16 needs .* Did you mean Mixer-mu/16\?"):
        load(FAMILY, tiny(), variant="Mixer-B/16")
    with pytest.raises(UsageError, match=r"variant 'Mixer-Q/16': no Mixer"):
        load(FAMILY, tiny(), variant="Mixer-Q/16")


def test_what_is_no_mixer():
    assert FAMILY.match(["embedding/kernel", "Transformer/encoderblock_0/LayerNorm_0/scale"]) is None
    assert FAMILY.has_variant("Mixer-B_16")
    assert not FAMILY.has_variant("B/16")


def test_options_without_meaning(tmp_path):
    with pytest.raises(UsageError, match="pre_logits=True: has no meaning for family mixer"):
        FAMILY.write_random(tmp_path / "x.npz", "Mixer-mu/16", RandomOptions(pre_logits=True))
