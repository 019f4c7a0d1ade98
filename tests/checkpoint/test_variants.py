import dataclasses
import math

import pytest

from vit_convert.checkpoint.shapes import leaf_shapes, parameter_count
from vit_convert.checkpoint.variants import PUBLISHED, WIDTHS, architecture_of, name_variant, parse_variant
from vit_convert.core.errors import UsageError

# vit_jax/models_test.py, 1000 classes at 224 pixels.
PUBLISHED_COUNTS = {
    "Ti/16": 5_717_416,
    "S/16": 22_050_664,
    "S/32": 22_878_952,
    "B/8": 86_576_872,
    "B/16": 86_567_656,
    "B/32": 88_224_232,
    "L/16": 304_326_632,
    "L/32": 306_535_400,
    "H/14": 632_045_800,
    "S/16-gap-norep": 22_049_896,
    "S/32-gap-norep": 22_878_184,
    "B/16-gap-norep": 86_566_120,
    "B/32-gap-norep": 88_222_696,
}


def test_every_published_variant_is_in_the_table():
    assert set(PUBLISHED) == set(PUBLISHED_COUNTS)


@pytest.mark.parametrize("variant", PUBLISHED_COUNTS)
def test_published_parameter_counts(variant):
    architecture = architecture_of(variant)
    rows = math.prod(architecture.grid) + (architecture.pool == "tok")
    assert parameter_count(architecture, rows) == PUBLISHED_COUNTS[variant]
    leaves = sum(math.prod(shape) for shape in leaf_shapes(architecture).values())
    folded_row = architecture.width if architecture.pool == "tok" else 0  # on disk the class token has a position of its own
    assert leaves + folded_row == PUBLISHED_COUNTS[variant]


def test_count_of_map_head_and_pre_logits():
    # SigLIP B/16-224's image tower: MAP pooling, no head.
    siglip = architecture_of("B/16", num_classes=0, pool="map")
    assert parameter_count(siglip, 196) == 92_884_224
    # big_vision's S/16 without a stored table, with a tanh layer: S/16 with gap, less 196 rows, plus 384·384 + 384.
    s16 = dataclasses.replace(architecture_of("S/16", pool="gap"), representation_size=384)
    assert parameter_count(s16, 0) == 22_049_896 - 196 * 384 + 384 * 384 + 384


@pytest.mark.parametrize("spelling", ["B/16", "B_16", "ViT-B_16", "ViT-B/16"])
def test_spellings(spelling):
    parsed = parse_variant(spelling)
    assert (parsed.name, parsed.patch_size, parsed.pool) == ("B/16", 16, None)


def test_gap_in_the_name_decides_the_pooling():
    assert parse_variant("ViT-S_16-gap-norep").pool == "gap"
    assert architecture_of("ViT-S_16-gap-norep").pool == "gap"
    assert architecture_of("S/16").pool == "tok"


def test_sizes_with_a_dash_and_their_names():
    assert parse_variant("g-opt/16").sizes == WIDTHS["g-opt"]
    assert name_variant(WIDTHS["So400m"], 14) == "So400m/14"
    assert name_variant(dataclasses.replace(WIDTHS["B"], depth=6), 16) == "custom"


@pytest.mark.parametrize("text", ["B", "B/0", "XL/16", "R50+ViT-B_16", "b/16"])
def test_unknown_variant(text):
    with pytest.raises(UsageError, match="unknown"):
        parse_variant(text)


def test_unknown_variant_names_the_nearest():
    with pytest.raises(UsageError, match=r"Did you mean .*Ti/16"):
        parse_variant("ViT-Ty_16")


def test_image_size_must_be_tiled():
    with pytest.raises(UsageError, match=r"225x224: not a multiple of the patch size 16") as error:
        architecture_of("B/16", (225, 224))
    assert "224x224" in error.value.fix
