"""SigLIP's layouts, sizes, strictness and what its towers give."""

import math

import numpy as np
import pytest
from family_files import rewrite, without
from safetensors.numpy import load_file, save_file

from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.core.token_samples import sample_texts
from vit_convert.families.family import RandomOptions
from vit_convert.families.load import load_checkpoint, towers_in
from vit_convert.families.siglip.family import SIGLIP
from vit_convert.families.siglip.variants import image_tower, name_of, parse_variant, text_tower
from vit_convert.families.towers.architecture import leaf_shapes, parameter_count
from vit_convert.families.towers.load import image_size_of

# Both towers of published files without `t` and `b`: variant, side in pixels, number of parameters, head behind the
# text.
COUNTS = [
    ("SigLIP-B/16", 224, 203_155_968, True),
    ("SigLIP-So400m/14", 384, 877_960_496, True),
    ("SigLIP2-B/16", 224, 375_187_968, True),
    ("SigLIP2-g-opt/16", 384, 1_871_885_424, True),
]


@pytest.fixture
def tiny(tmp_path):
    def write(layout="siglip", variant="SigLIP-mu/16", **options):
        path = tmp_path / (f"{layout}.safetensors" if layout == "siglip_transformers" else f"{layout}.npz")
        SIGLIP.write_random(
            path,
            variant,
            RandomOptions(**{"image_size": (48, 48), "depth": 2, "length": 8, "layout": layout, **options}),
        )
        return path

    return write


def images(side=48):
    return np.random.default_rng(0).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)


def run(path, **options):
    """The tower's results on seeded inputs."""
    loaded = load_checkpoint(path, **options)
    model = loaded.family.model(loaded)
    taken = model.signature.inputs[0]
    fed = images(taken.shape[1]) if taken.is_image else sample_texts(taken, 2, np.random.default_rng(0))
    return model.run(fed)


@pytest.mark.parametrize(("variant", "side", "count", "head"), COUNTS)
def test_published_counts(variant, side, count, head):
    parsed = parse_variant(variant)
    towers = [image_tower(parsed, (side, side)), text_tower(parsed, 64, head=head)]
    assert sum(map(parameter_count, towers)) == count
    assert sum(math.prod(shape) for tower in towers for shape in leaf_shapes(tower).values()) == count
    assert name_of(towers[0].encoder, parsed.kind, parsed.patch_size) == variant
    headless = text_tower(parsed, 64, head=False)
    product = (headless.encoder.width + 1) * towers[0].encoder.width
    assert headless.head == 0 and parameter_count(headless) == parameter_count(towers[1]) - product


@pytest.mark.parametrize("tower", ["img", "txt"])
def test_every_layout_of_a_seed_is_one_model(tiny, tower):
    plain = load_checkpoint(f"{tiny()}:{tower}")
    for other in (tiny("siglip_scan"), tiny("siglip_scan", prefix="params/"), tiny("siglip_transformers")):
        found = load_checkpoint(f"{other}:{tower}")
        assert found.architecture.encoder == plain.architecture.encoder and {*found.params} == {*plain.params}
        for name, values in found.params.items():
            np.testing.assert_array_equal(plain.params[name], values)


@pytest.mark.parametrize("layout", ["siglip", "siglip_scan"])
def test_in_bfloat16(tiny, layout):
    path = tiny(layout, dtype="bfloat16")
    assert str(np.load(path)["img/embedding/kernel"].dtype) == "|V2"
    found = load_checkpoint(f"{path}:img").params["embedding/kernel"]
    assert found.dtype == np.float32
    exact = load_checkpoint(f"{tiny(layout)}:img").params["embedding/kernel"]
    assert 0 < np.abs(found - exact).max() <= 2**-8 * np.abs(exact).max()


def test_both_towers_and_what_they_are_as_a_pair(tiny):
    path = tiny()
    assert towers_in(path) == ("image", "text") and towers_in(f"{path}:txt") == ("text",)
    image, text = load_checkpoint(f"{path}:img"), load_checkpoint(f"{path}:txt")
    assert image.pair == text.pair
    pair = text.pair
    assert (pair.logit_bias, pair.similarity, pair.embedding) == (-16.5, "sigmoid", 32)
    assert pair.logit_scale == pytest.approx(math.exp(4.75))
    assert (pair.tokenizer, pair.length, pair.vocabulary, pair.end, pair.pad) == ("sentencepiece", 8, 96, 1, 1)
    assert (image.preprocess, image.output, image.judge, image.image_size) == (
        "siglip",
        "embedding",
        "embedding",
        (48, 48),
    )
    assert (text.image_size, text.takes, text.attentions) == ((), "8 tokens", ((16, 8),))


def test_embeddings_have_norm_one_unless_asked(tiny):
    path = tiny()
    for tower in ("img", "txt"):
        unit, plain = run(f"{path}:{tower}")["embedding"], run(f"{path}:{tower}", normalize=False)["embedding"]
        np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, rtol=1e-6)
        np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=-1, keepdims=True), rtol=1e-5)


def test_other_outputs(tiny):
    path = tiny()
    found = run(f"{path}:txt", outputs="tokens")["token_features"]
    assert found.shape == (2, 8, 32)
    np.testing.assert_array_equal(run(f"{path}:txt", outputs="features")["features"], found[:, -1])
    assert run(f"{path}:img", outputs="tokens")["tokens"].shape == (2, 9, 32)
    with pytest.raises(UsageError, match="this tower has no logits, but embedding, features, tokens or grid"):
        load_checkpoint(f"{path}:img", outputs="logits")


def test_without_a_head_or_a_tower(tiny):
    headless = tiny(text_head=False)
    assert "txt/head/kernel" not in np.load(headless)
    assert run(f"{headless}:txt")["embedding"].shape == (2, 32)
    alone = tiny(towers="image")
    assert load_checkpoint(alone).output == "embedding" and towers_in(alone) == ("image",)
    with pytest.raises(UsageError, match="has no such tower"):
        load_checkpoint(f"{alone}:txt")
    with pytest.raises(CheckpointError, match="an image tower and a text tower") as error:
        load_checkpoint(tiny())
    assert ":img and " in error.value.fix and error.value.fix.endswith(":txt.")


def test_a_second_table_of_the_text_is_added(tiny):
    path = tiny()
    second = np.random.default_rng(1).standard_normal((1, 8, 32)).astype(np.float32)
    expected = np.load(path)["txt/pos_embedding"] + second
    rewrite(path, lambda arrays: arrays | {"txt/Encoder_0/pos_embedding": second})
    np.testing.assert_array_equal(load_checkpoint(f"{path}:txt").params["pos_embedding"], expected)


def test_another_image_size(tiny):
    path = tiny()
    larger = load_checkpoint(f"{path}:img", image_size=(64, 32))
    assert larger.params.leaves["pos_embedding"].shape == (1, 8, 32) and "resampled" in larger.warnings[0]
    with pytest.raises(UsageError, match="a tower that takes no images of one size"):
        load_checkpoint(f"{path}:txt", image_size=(64, 64))


def test_the_size_that_a_grid_stands_for():
    assert image_size_of((27, 27), 14) == (384, 384)  # of which 6 pixels are left out
    assert image_size_of((16, 16), 14) == (224, 224) and image_size_of((14, 14), 16) == (224, 224)
    assert image_size_of((3, 5), 16) == (48, 80)


@pytest.mark.parametrize(
    ("tower", "leaf"),
    [
        ("img", "img/Transformer/encoderblock_1/LayerNorm_1/bias"),
        ("img", "img/MAPHead_0/probe"),
        ("img", "img/embedding/bias"),
        ("txt", "txt/Encoder_0/encoderblock_0/MlpBlock_0/Dense_1/kernel"),
        ("txt", "txt/Encoder_0/encoder_norm/scale"),
        ("txt", "txt/head/bias"),
    ],
)
def test_missing_and_extra(tiny, tower, leaf):
    path = tiny()
    stored = np.load(path)[leaf]
    rewrite(path, lambda arrays: without(arrays, leaf))
    with pytest.raises(CheckpointError, match=f"{leaf}: missing"):
        load_checkpoint(f"{path}:{tower}")
    rewrite(path, lambda arrays: arrays | {leaf: stored, f"{tower}/gate": stored})
    with pytest.raises(CheckpointError, match=f"{tower}/gate: belongs to no part"):
        load_checkpoint(f"{path}:{tower}")


def test_a_given_variant_is_held_against_the_file(tiny):
    assert load_checkpoint(f"{tiny(depth=1)}:img", variant="SigLIP-mu_16").variant == "SigLIP-mu/16"
    with pytest.raises(CheckpointError, match="variant SigLIP-B/16 needs"):
        load_checkpoint(f"{tiny()}:txt", variant="SigLIP-B/16")
    with pytest.raises(UsageError, match="no SigLIP"):
        load_checkpoint(f"{tiny()}:img", variant="SigLIP-Q/16")


def test_clippo(tiny):
    path = tiny("clippo")
    assert towers_in(path) == ("image",) and {"t", "img/head/kernel"} <= set(np.load(path)) and "b" not in np.load(path)
    loaded = load_checkpoint(f"{path}:img")
    pair = loaded.pair
    assert (loaded.output, loaded.preprocess, pair.similarity, pair.logit_bias) == (
        "embedding",
        "siglip",
        "softmax",
        None,
    )
    assert run(path)["embedding"].shape == (2, 32)


def test_what_transformers_leaves_beside_a_model(tiny):
    path = tiny("siglip_transformers")
    assert load_checkpoint(f"{path}:img").architecture.encoder.num_heads == 2  # as models of this width have
    path.with_name("config.json").write_text('{"vision_config": {"num_attention_heads": 4}}')
    assert load_checkpoint(f"{path}:img").architecture.encoder.num_heads == 4
    assert load_checkpoint(f"{path}:txt").architecture.encoder.num_heads == 2


@pytest.mark.parametrize("layout", ["siglip", "siglip_scan", "siglip_transformers"])
def test_naflex(tiny, layout):
    path = tiny(layout, variant="SigLIP2-mu/16-naflex", depth=1)
    found = load_checkpoint(f"{path}:img")
    assert (found.variant, found.takes, found.image_size) == ("SigLIP-mu/16-naflex", "256 patches", ())
    assert found.attentions == () and found.params.leaves["pos_embedding"].shape == (1, 256, 32)
    taken = load_checkpoint(f"{path}:img").family.model(found).signature.inputs
    assert [tensor.name for tensor in taken] == ["patches", "coordinates", "mask"]
    assert found.num_params == 768 * 32 + 32 + 256 * 32 + 2 * 32 + 12_704 + 12_704 - 64 + 32
    text = load_checkpoint(f"{path}:txt")
    assert text.variant == "SigLIP-mu" if layout == "siglip_transformers" else text.variant == found.variant
    with pytest.raises(UsageError, match="takes no images of one size"):
        load_checkpoint(f"{path}:img", image_size=(48, 48))


@pytest.mark.parametrize("gone", ["logit_scale", "logit_bias"])
def test_half_of_what_compares_two_towers(tiny, gone):
    """Both belong to a pair, and neither to a tower that was saved alone."""
    path = tiny("siglip_transformers")
    save_file(without(load_file(path), gone), path)
    with pytest.raises(CheckpointError, match=rf"safetensors: {gone}: missing") as error:
        load_checkpoint(f"{path}:img")
    assert error.value.fix
    save_file({name: array for name, array in load_file(path).items() if not name.startswith("logit")}, path)
    assert load_checkpoint(f"{path}:img").pair is None
