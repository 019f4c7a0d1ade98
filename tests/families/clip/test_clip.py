"""CLIP's layouts, sizes, strictness and what its towers give."""

import math
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families.clip.family import CLIP
from vit_convert.families.clip.variants import encoder_of, image_tower, name_of, parse_variant, text_tower
from vit_convert.families.family import RandomOptions
from vit_convert.families.load import load_checkpoint, towers_in
from vit_convert.families.towers.architecture import parameter_count

LAYOUTS = ("clip_transformers", "clip_flax", "clip_openai", "clip_scenic")
# Whole models with `logit_scale`: variant, side in pixels, number of parameters.
COUNTS = [
    ("CLIP-B/32", 224, 151_277_313),
    ("CLIP-B/16", 224, 149_620_737),
    ("CLIP-L/14", 224, 427_616_513),
    ("CLIP-L/14", 336, 427_944_193),
]


@pytest.fixture
def tiny(tmp_path):
    def write(layout="clip_transformers", variant="CLIP-mu/16", **options):
        (tmp_path / layout).mkdir(exist_ok=True)
        path = tmp_path / layout / "model.safetensors"
        CLIP.write_random(path, variant, RandomOptions(**{"image_size": (32, 48), "layout": layout, **options}))
        return path

    return write


@pytest.mark.parametrize(("variant", "side", "count"), COUNTS)
def test_published_counts(variant, side, count):
    parsed = parse_variant(variant)
    image, text = encoder_of(parsed, "image"), encoder_of(parsed, "text")
    sizes = parsed.sizes.embedding
    towers = image_tower("", image, sizes, parsed.patch_size, (side, side)), text_tower("", text, sizes, 49_408, 77)
    rows = (side // parsed.patch_size) ** 2 + 1
    assert parameter_count(towers[0], rows) + parameter_count(towers[1]) + 1 == count
    assert (name_of(image, "image", parsed.patch_size), name_of(text, "text")) == (variant, variant.split("/")[0])


@pytest.mark.parametrize("tower", ["img", "txt"])
def test_every_layout_of_a_seed_is_one_model(tiny, tower):
    grid = {"posemb_grid": (2, 3)} if tower == "img" else {}
    plain = load_checkpoint(f"{tiny()}:{tower}", **grid)
    assert plain.variant == "CLIP-mu/16" if tower == "img" else plain.variant == "CLIP-mu"
    for layout in LAYOUTS[1:]:
        found = load_checkpoint(f"{tiny(layout)}:{tower}", **grid)
        assert (found.layout.value, found.num_params) == (layout, plain.num_params)
        assert found.architecture == plain.architecture and {*found.params} == {*plain.params}
        for name, values in found.params.items():
            np.testing.assert_array_equal(plain.params[name], values)


def test_what_the_towers_are_as_a_pair(tiny):
    path = tiny()
    assert towers_in(path) == ("image", "text")
    pair = load_checkpoint(f"{path}:txt").pair
    assert (pair.similarity, pair.logit_bias, pair.embedding) == ("softmax", None, 20)
    assert pair.logit_scale == pytest.approx(100, rel=1e-6)
    assert (pair.tokenizer, pair.length, pair.vocabulary, pair.start, pair.end) == ("clip", 12, 96, 94, 95)
    text = load_checkpoint(f"{path}:txt")
    assert text.attentions == () and text.architecture.mask == "causal"  # no kernel that knows no mask may serve it
    assert load_checkpoint(f"{path}:img", posemb_grid=(2, 3)).preprocess == "clip"


def test_the_activation_is_told_by_config_json_or_the_variant(tiny):
    assert load_checkpoint(f"{tiny()}:txt").architecture.encoder.activation == "quick"
    laion = tiny(variant="OpenCLIP-mu/16")
    found = load_checkpoint(f"{laion}:txt")
    assert found.architecture.encoder.activation == "erf" and found.variant == "OpenCLIP-mu" and not found.warnings
    bare = tiny("clip_openai")
    assert "QuickGELU" in load_checkpoint(f"{bare}:txt").warnings[0]
    given = load_checkpoint(f"{bare}:txt", variant="OpenCLIP-mu/16")
    assert given.architecture.encoder.activation == "erf" and not given.warnings
    laion.with_name("config.json").write_text('{"text_config": {"hidden_act": "swish"}}')
    with pytest.raises(CheckpointError, match=r"config.json: hidden_act 'swish' is not known"):
        load_checkpoint(f"{laion}:txt")
    laion.with_name("config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read"):
        load_checkpoint(f"{laion}:txt")


def test_only_what_stands_before_the_end_counts(tiny):
    """The first end token's place is pooled, and the mask lets it see what is before it alone."""
    loaded = load_checkpoint(f"{tiny()}:txt")
    model = loaded.family.model(loaded)
    tokens = np.array([[94, 5, 6, 95, 0, 0, 0, 0, 0, 0, 0, 0]], np.int32)
    plain = model.run(tokens)
    assert plain["pooled_token"].tolist() == [3]
    for other in (95, 7):
        changed = tokens.copy()
        changed[0, 4:] = other
        np.testing.assert_array_equal(model.run(changed)["embedding"], plain["embedding"])
    changed = tokens.copy()
    changed[0, 1] = 7
    assert np.abs(model.run(changed)["embedding"] - plain["embedding"]).max() > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strict(tiny, layout):
    path = tiny(layout)
    arrays = load_file(path)
    leaf = next(name for name in arrays if re.match(r"(text_model[./]encoder|text/trans|trans)", name))
    save_file({name: array for name, array in arrays.items() if name != leaf}, path)
    with pytest.raises(CheckpointError, match=f"{leaf}: missing"):
        load_checkpoint(f"{path}:txt")
    save_file(arrays | {leaf.replace("1", "1.gate", 1): arrays[leaf]}, path)
    with pytest.raises(CheckpointError, match="belongs to no part"):
        load_checkpoint(f"{path}:txt")


def test_buffers_are_left_out(tiny):
    path = tiny()
    ids = {f"{model}_model.embeddings.position_ids": np.arange(7)[None] for model in ("text", "vision")}
    save_file(load_file(path) | ids, path)
    assert load_checkpoint(f"{path}:txt").num_params == load_checkpoint(f"{tiny('clip_openai')}:txt").num_params


def test_underscores_in_scenics_names(tiny):
    path = tiny("clip_scenic")
    save_file({name.replace("resblocks.", "resblocks_"): array for name, array in load_file(path).items()}, path)
    assert load_checkpoint(f"{path}:txt").layout.value == "clip_scenic"


def test_one_tower_alone_and_a_given_variant(tiny):
    path = tiny(towers="image", image_size=(32, 32))
    loaded = load_checkpoint(path)
    assert loaded.output == "embedding" and loaded.pair.towers == ("image",)
    assert loaded.num_params == math.prod((16, 16, 3, 32)) + 32 * (5 + 1 + 4) + 2 * 8544 + 32 * 20
    with pytest.raises(CheckpointError, match="variant CLIP-B/32 needs"):
        load_checkpoint(path, variant="CLIP-B/32")
    with pytest.raises(UsageError, match="no CLIP"):
        load_checkpoint(path, variant="CLIP-Q/32")
