"""TIPS: both files, sizes, strictness, and both towers against a float64 forward pass."""

import math

import numpy as np
import pytest
from family_files import rewrite, without
from float64_towers import attention, blocks, dense, float64, gelu, norm, patches, unit

from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families.family import RandomOptions
from vit_convert.families.load import load_checkpoint, towers_in
from vit_convert.families.tips.family import TIPS
from vit_convert.families.tips.layouts import sinusoids
from vit_convert.families.tips.variants import GRIDS, image_tower, parse_variant, text_tower
from vit_convert.families.towers.architecture import parameter_count
from vit_convert.families.towers.tables import half_pixel_weights, resample_half_pixel

# google-deepmind/tips's README and its own modules' shapes: the image tower's, with its table of 16 or 32 rows.
COUNTS = {"TIPS-B/14": 85_706_496, "TIPSv2-B/14": 86_296_320, "TIPS-g/14": 1_134_646_784}


@pytest.fixture
def tiny(tmp_path):
    def write(variant="TIPS-mu/14", towers="image", **options):
        path = tmp_path / f"{variant.replace('/', '')}-{towers}.npz"
        TIPS.write_random(path, variant, RandomOptions(**{"image_size": (56, 56), "towers": towers, **options}))
        return path

    return write


def run(path, fed, **options):
    loaded = load_checkpoint(path, **options)
    return loaded.family.model(loaded).run(fed)


def close(ours, expected):
    """At 1e-5 of the scale: float32 sums differ by about 1e-6 after three blocks."""
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("variant", COUNTS)
def test_published_counts(variant):
    parsed = parse_variant(variant)
    side = GRIDS[parsed.kind] * 14
    assert parameter_count(image_tower("", parsed.image, 14, (side, side))) == COUNTS[variant]


def test_the_text_towers_count():
    parsed = parse_variant("TIPS-B/14")
    assert parameter_count(text_tower("", parsed.text, 32_000, 64), 0) == 109_632_000


@pytest.mark.parametrize("variant", ["TIPS-mu/14", "TIPSv2-mug/14"])
@pytest.mark.parametrize("side", [56, 84])
def test_image_float64(tiny, variant, side):
    path = tiny(variant, depth=3)
    leaves, tokens = float64(dict(np.load(path)), "encoder/"), "ToTokenSequence_0"
    gated = "mug" in variant
    fed = np.random.default_rng(0).uniform(0, 1, (2, side, side, 3)).astype(np.float32)
    table = leaves[f"{tokens}/posembed_input"]
    if side != 56:  # between half-pixel centres: jax.image.resize
        import jax

        with jax.enable_x64(True):
            table = np.asarray(jax.image.resize(table, (1, side // 14, side // 14, 32), "bilinear"))

    def mlp(x, block):
        if not gated:
            return dense(gelu(dense(x, leaves, f"{block}/MlpBlock_0/Dense_0")), leaves, f"{block}/MlpBlock_0/Dense_1")
        ffn = f"{block}/FFNSwiGluFused_0"
        gate = dense(x, leaves, f"{ffn}/Dense_0")
        return dense(gate / (1 + np.exp(-gate)) * dense(x, leaves, f"{ffn}/Dense_1"), leaves, f"{ffn}/Dense_2")

    expected = []
    for image in fed:
        x = patches(image.astype(np.float64), leaves, f"{tokens}/embedding") + table.reshape(-1, 32)
        x = np.concatenate([leaves[f"{tokens}/cls"][0], x])
        for i in range(3):
            x = _block(x, leaves, f"transformer/encoderblock_{i}", mlp)
        expected.append(norm(x, leaves, "encoder_norm"))
    given = run(path, fed, image_size=(side, side), outputs="tokens,class_tokens")
    found = np.concatenate([given["class_tokens"], given["tokens"]], axis=1)
    close(found, np.stack(expected))
    close(run(path, fed, image_size=(side, side))["embedding"], unit(np.stack(expected)[:, 0]))


def _block(x, leaves, block, mlp):
    x = x + attention(norm(x, leaves, f"{block}/LayerNorm_0"), leaves, f"{block}/MultiHeadDotProductAttention_0")
    return x + mlp(norm(x, leaves, f"{block}/LayerNorm_1"), block)


def test_text_float64(tiny):
    path = tiny(towers="text", depth=3)
    leaves = float64(dict(np.load(path)))
    tokens = np.random.default_rng(1).integers(1, 80, (3, 64)).astype(np.int32)
    tokens[0, 4:], tokens[1, 63:] = 0, 0
    place, half = np.arange(64)[:, None], 16
    angles = place * np.exp(-np.arange(half) * math.log(10_000) / (half - 1))
    expected = []
    for text in tokens:
        x = leaves["token_emb/emb_var"][text] * math.sqrt(32)
        x = x + np.concatenate([np.sin(angles), np.cos(angles)], 1)
        streams = blocks(x, leaves, "transformer/encoderblock_{}", 3, lambda y: np.maximum(y, 0), text != 0)
        x = norm(streams[-1], leaves, "text_encoder_norm")
        expected.append(unit(x[text != 0].sum(0) / ((text != 0).sum() + 1e-8)))
    close(run(path, tokens)["embedding"], np.stack(expected))


def test_both_files(tiny):
    image, text = load_checkpoint(tiny()), load_checkpoint(tiny(towers="text"))
    assert (image.variant, image.preprocess, image.pair) == ("TIPS-mu/14", "tips", None)
    assert (text.variant, text.attentions, text.takes) == ("TIPS-mu", (), "64 tokens")
    assert text.pair.logit_scale == pytest.approx(100, rel=1e-6) and not text.pair.sticky_end
    assert towers_in(tiny()) == ("image",) and towers_in(tiny(towers="text")) == ("text",)
    assert not image.resizable  # a range of sizes resamples tables between corners
    assert load_checkpoint(tiny("TIPSv2-mug/14", image_size=(448, 448))).variant == "TIPSv2-mug/14"


@pytest.mark.parametrize(
    ("towers", "leaf"),
    [
        ("image", "encoder/transformer/encoderblock_1/FFNSwiGluFused_0/Dense_1/bias"),
        ("image", "encoder/ToTokenSequence_0/cls"),
        ("image", "encoder/encoder_norm/scale"),
        ("text", "transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"),
        ("text", "text_encoder_norm/bias"),
    ],
)
def test_strict(tiny, towers, leaf):
    path = rewrite(tiny("TIPS-mug/14", towers), lambda arrays: without(arrays, leaf))
    with pytest.raises(CheckpointError, match=f"{leaf}: missing"):
        load_checkpoint(path)


def test_given_variants_and_tables(tiny):
    with pytest.raises(CheckpointError, match="variant TIPS-B/14 needs"):
        load_checkpoint(tiny(), variant="TIPS-B/14")
    with pytest.raises(UsageError, match="no TIPS"):
        load_checkpoint(tiny(), variant="TIPS-Q/14")
    table = "encoder/ToTokenSequence_0/posembed_input"
    path = rewrite(tiny(), lambda arrays: arrays | {table: arrays[table].reshape(1, 16, 32)})
    with pytest.raises(CheckpointError, match=r"posembed_input: checkpoint \(1, 16, 32\), needed is \(1, rows, col"):
        load_checkpoint(path)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (5, 5), (1, 3), (3, 1)])
def test_tables_as_jax_resizes_them(old, new):
    import jax

    values = np.random.default_rng(0).standard_normal((1, old * 2, 3)).astype(np.float32)
    expected = np.asarray(jax.image.resize(values.reshape(old, 2, 3), (new, 2, 3), "linear")).reshape(1, -1, 3)
    np.testing.assert_allclose(resample_half_pixel(values, (old, 2), (new, 2)), expected, atol=1e-6)
    np.testing.assert_allclose(half_pixel_weights(old, new).sum(1), 1)


@pytest.mark.parametrize(
    ("rows", "columns", "kind"),
    [(4, 4, "TIPS"), (3, 5, "TIPS"), (32, 32, "TIPSv2"), (32, 16, "TIPSv2"), (16, 32, "TIPS"), (40, 40, "TIPS")],
)
def test_the_table_tells_size_and_kind(tiny, rows, columns, kind):
    """TIPSv2 was trained with 32 rows of patches; a table need not be square."""
    table = np.random.default_rng(0).standard_normal((1, rows, columns, 32)).astype(np.float32)
    name = "encoder/ToTokenSequence_0/posembed_input"
    loaded = load_checkpoint(rewrite(tiny(), lambda arrays: arrays | {name: table}))
    assert (loaded.variant, loaded.source_image_size) == (f"{kind}-mu/14", (14 * rows, 14 * columns))
    np.testing.assert_array_equal(loaded.params["pos_embedding"], table.reshape(1, rows * columns, 32))


@pytest.mark.parametrize("prefix", ["", "params/"])
def test_a_text_tower_without_its_temperature(tiny, prefix):
    name = f"{prefix}temperature_contrastive"
    path = rewrite(tiny(towers="text", prefix=prefix), lambda arrays: without(arrays, name))
    with pytest.raises(CheckpointError, match=f"npz: {name}: missing") as error:
        load_checkpoint(path)
    assert error.value.fix == "Save the text tower whole."


@pytest.mark.parametrize("width", [4, 6, 8, 32])
def test_places_of_a_text_by_their_formula(width):
    """tips/scenic/models/text.py: sin and cos of place times 10000^(-k / (width / 2 - 1))."""
    found, half = sinusoids(7, width), width // 2
    assert found.shape == (1, 7, width) and found.dtype == np.float32
    for place in range(7):
        for k in range(half):
            angle = place * 10_000 ** (-k / (half - 1))
            assert found[0, place, [k, half + k]] == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-6)
