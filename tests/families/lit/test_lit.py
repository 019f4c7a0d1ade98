"""LiT's layouts, sizes and strictness."""

import dataclasses
import math

import numpy as np
import pytest
from family_files import rewrite, without

from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families.family import RandomOptions
from vit_convert.families.lit.family import LIT
from vit_convert.families.lit.variants import LENGTH, VARIANTS, encoder_of, image_tower, name_of, text_tower
from vit_convert.families.load import load_checkpoint, towers_in
from vit_convert.families.towers.architecture import parameter_count

# vit_jax's model cards: both towers and the temperature.
COUNTS = {
    "LiT-B16B": 195_871_489,
    "LiT-B16B_2": 195_280_897,
    "LiT-L16L": 638_443_521,
    "LiT-L16S": 331_140_353,
    "LiT-L16Ti": 311_913_089,
}


@pytest.fixture
def tiny(tmp_path):
    def write(variant="LiT-mu", layout="lit", **options):
        path = tmp_path / f"{variant}-{layout}.npz"
        LIT.write_random(path, variant, RandomOptions(**{"image_size": (48, 48), "layout": layout, **options}))
        return path

    return write


@pytest.mark.parametrize("variant", COUNTS)
def test_published_counts(variant):
    row = VARIANTS[variant]
    image, text = image_tower(variant, row, (224, 224)), text_tower(variant, row, LENGTH)
    rows = row.text.positions + 2 * row.text.bert  # and two segments
    assert parameter_count(image, 197) + parameter_count(text, rows) + 1 == COUNTS[variant]


@pytest.mark.parametrize("variant", COUNTS)
def test_published_names(variant):
    """Towers that several models share are told apart by the file's other tower, and by the image tower's product."""
    row = VARIANTS[variant]
    image, text = encoder_of(row.image), encoder_of(row.text.sizes, bert=row.text.bert)
    whole = {"image_head": row.image_head}
    assert name_of("image", image, 16, **whole, other=text.width) == variant
    assert name_of("text", text, **whole, other=image.width) == variant
    assert VARIANTS[name_of("image", image, 16)].image == row.image  # of a file with one tower: the first that has it
    assert VARIANTS[name_of("text", text)].text == row.text
    assert name_of("image", image, 16, other=7) != "custom" == name_of("image", image, 14)


@pytest.mark.parametrize("variant", ["LiT-mu", "LiT-muV"])
@pytest.mark.parametrize("layout", LIT.layouts)
def test_both_towers_of_a_file_are_one_model(tiny, variant, layout):
    path = tiny(variant, layout)
    assert [load_checkpoint(f"{path}:{tower}").variant for tower in ("img", "txt")] == [variant] * 2
    assert load_checkpoint(f"{path}:img", variant=variant).variant == variant


@pytest.mark.parametrize(("variant", "asked"), [("LiT-mu", "LiT-muV"), ("LiT-muV", "LiT-mu")])
def test_an_image_tower_of_the_other_end_is_not_the_one_asked_for(tiny, variant, asked):
    with pytest.raises(CheckpointError, match=rf"img/head/.*variant {asked}.*Did you mean {variant}\?"):
        load_checkpoint(f"{tiny(variant)}:img", variant=asked)


@pytest.mark.parametrize("vocabulary, start", [(30522, 101), (102, 101), (101, 100), (50, 49)])
def test_a_text_starts_with_a_token_of_its_vocabulary(vocabulary, start):
    row = VARIANTS["LiT-mu"]
    assert row.text.bert
    small = dataclasses.replace(row, text=dataclasses.replace(row.text, vocabulary=vocabulary))
    assert text_tower("LiT-mu", small, LENGTH).start == start


@pytest.mark.parametrize("variant", ["LiT-mu", "LiT-muV"])
@pytest.mark.parametrize("tower", ["img", "txt"])
def test_both_layouts_are_one_model(tiny, variant, tower):
    old, new = (load_checkpoint(f"{tiny(variant, layout)}:{tower}") for layout in ("lit", "lit_linen"))
    assert old.params.keys() == new.params.keys() and old.num_params == new.num_params
    for name in old.params:
        np.testing.assert_array_equal(old.params[name], new.params[name])
    assert tower == "txt" or (old.layout.value, new.layout.value) == ("lit", "lit_linen")


def test_what_the_towers_are_as_a_pair(tiny):
    path = tiny()
    assert towers_in(path) == ("image", "text")
    pair = load_checkpoint(f"{path}:txt").pair
    assert (pair.similarity, pair.logit_bias, pair.tokenizer, pair.length) == ("softmax", None, "bert", 16)
    assert (pair.start, pair.end, pair.pad, pair.lower) == (101, -1, 0, True)
    assert pair.logit_scale == pytest.approx(math.exp(4.6), rel=1e-6)
    other = load_checkpoint(f"{tiny('LiT-muV')}:txt").pair
    assert (other.tokenizer, other.start, other.end, other.pad, other.lower) == ("sentencepiece", -1, 1, 1, False)
    image = load_checkpoint(f"{path}:img")
    assert (image.preprocess, image.output, image.architecture.head) == ("lit", "embedding", 32)
    assert load_checkpoint(f"{tiny('LiT-muV')}:img").architecture.head == 0


def test_what_fills_up_changes_nothing(tiny):
    loaded = load_checkpoint(f"{tiny()}:txt")
    assert loaded.attentions == ()  # no kernel that knows no mask may serve it
    model, tokens = loaded.family.model(loaded), np.zeros((1, 16), np.int32)
    tokens[0, :4] = (101, 7, 8, 9)
    results = model.run(tokens)
    plain = results["embedding"]
    assert "pooled_token" not in results  # the first of every text
    loaded.params.leaves["Embed_0/embedding"].read()  # the row of token 0 is not looked at
    changed = dict(loaded.params)
    changed["Embed_0/embedding"] = changed["Embed_0/embedding"].copy()
    changed["Embed_0/embedding"][0] += 3
    from vit_convert.families.towers.model import tower_model

    np.testing.assert_array_equal(tower_model(loaded.architecture, changed).run(tokens)["embedding"], plain)


@pytest.mark.parametrize(
    ("variant", "tower", "leaf"),
    [
        ("LiT-mu", "txt", "txt/BertEncoder_0/embedder/embedders_segment_ids/embedding"),
        ("LiT-mu", "txt", "txt/BertEncoder_0/encoder_block/layer_sequence/layers_1/mlp_block/mlp/dense_layer/kernel"),
        ("LiT-mu", "img", "img/head/bias"),
        ("LiT-mu", "img", "img/Transformer/encoderblock_0/LayerNorm_2/bias"),
        ("LiT-muV", "txt", "txt/Encoder_0/encoderblock_1/MlpBlock_3/Dense_0/kernel"),
    ],
)
def test_strict(tiny, variant, tower, leaf):
    path = tiny(variant)
    rewrite(path, lambda arrays: without(arrays, leaf))
    with pytest.raises(CheckpointError, match=f"{leaf}: missing"):
        load_checkpoint(f"{path}:{tower}")


def test_a_given_variant_is_held_against_the_file(tiny):
    assert load_checkpoint(f"{tiny()}:txt", variant="LiT-mu").variant == "LiT-mu"
    with pytest.raises(CheckpointError, match="variant LiT-B16B needs"):
        load_checkpoint(f"{tiny()}:txt", variant="LiT-B16B")
    with pytest.raises(UsageError, match="no LiT"):
        load_checkpoint(f"{tiny()}:img", variant="LiT-Q")
