import dataclasses
import math

import pytest

from vit_convert.core.errors import UsageError
from vit_convert.families.vit.shapes import leaf_shapes, parameter_count
from vit_convert.families.vit.variants import PUBLISHED, WIDTHS, architecture_of, name_variant, parse_variant

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
    # on disk the class token has a position of its own
    folded_row = architecture.width if architecture.pool == "tok" else 0
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


# big_vision/models/vit.py, `decode_variant`, by kind as it lists them.
LETTERS = ("mu", "Ti", "S", "M", "B", "L", "So400m", "H", "g", "g-opt", "G", "G-opt", "e")
SIZES = {
    "width": (32, 192, 384, 512, 768, 1024, 1152, 1280, 1408, 1536, 1664, 1536, 1792),
    "depth": (1, 12, 12, 12, 12, 24, 27, 32, 40, 40, 48, 48, 56),
    "mlp_dim": (128, 768, 1536, 2048, 3072, 4096, 4304, 5120, 6144, 6144, 8192, 8192, 15360),
    "num_heads": (2, 3, 6, 8, 12, 16, 16, 16, 16, 16, 16, 16, 16),
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_those_of_big_vision(size):
    assert {letters: getattr(row, size) for letters, row in WIDTHS.items()} == dict(
        zip(LETTERS, SIZES[size], strict=True)
    )


@pytest.mark.parametrize("letters", LETTERS)
def test_every_row_is_found_by_its_sizes_and_by_its_name(letters):
    architecture = architecture_of(f"{letters}/14", (28, 42), 5)
    row = [SIZES[size][LETTERS.index(letters)] for size in SIZES]
    assert [architecture.width, architecture.depth, architecture.mlp_dim, architecture.num_heads] == row
    assert (architecture.variant, architecture.patch_size, architecture.image_size) == (f"{letters}/14", 14, (28, 42))
    assert (architecture.num_classes, architecture.pool, architecture.representation_size) == (5, "tok", 0)
    assert name_variant(WIDTHS[letters], 14) == f"{letters}/14"


def test_pooling_and_defaults():
    assert [
        architecture_of(name, pool=pool).pool
        for name, pool in (("B/16-gap-norep", None), ("B/16-gap-norep", "map"), ("B/16", "gap"))
    ] == [
        "gap",
        "map",
        "gap",
    ]
    default = architecture_of("B/16")
    assert (default.image_size, default.num_classes, default.family) == ((224, 224), 1000, "vit")
    assert architecture_of("B/16", representation_size=768).representation_size == 768


@pytest.mark.parametrize(
    ("image_size", "nearest"),
    [
        ((225, 224), "224x224"),
        ((224, 230), "224x224"),
        ((224, 235), "224x240"),
        ((8, 100), "16x96"),
        ((0, 16), "16x16"),
        ((-16, 40), "16x32"),
    ],
)
def test_the_nearest_size_that_patches_tile(image_size, nearest):
    with pytest.raises(
        UsageError, match=f"image_size {image_size[0]}x{image_size[1]}: not a multiple of the patch size 16"
    ) as error:
        architecture_of("B/16", image_size)
    assert error.value.fix == f"The nearest that is: {nearest}."


@pytest.mark.parametrize("text", ["B/016", "B-16", "B/16-gap", "B/16 ", "ViT-", "vit-B_16", "B//16", "-opt/16", "B/1x"])
def test_spellings_that_are_none(text):
    with pytest.raises(UsageError, match="unknown") as error:
        parse_variant(text)
    assert "Use one of mu, Ti, S, M, B, L, " in error.value.fix


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
