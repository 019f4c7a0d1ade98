"""Image sizes as people write them, every number of them told from the others."""

import pytest

from vit_convert.core.errors import UsageError
from vit_convert.core.image_size import LARGEST_SIDE, ImageRange, check_image_size, is_range, parse_range, parse_size
from vit_convert.core.stage_results import Checkpoint

RANGE = ImageRange((16, 32), (48, 64), (80, 96))


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        (ImageRange((16, 16), (32, 32), (64, 64)), [(32, 32), (16, 16), (64, 32)]),
        # 64 x 64 would not show which side is which
        (ImageRange((16, 16), (64, 64), (64, 64)), [(64, 64), (16, 16), (64, 16)]),
        (ImageRange((16, 8), (64, 64), (64, 64)), [(64, 64), (16, 8), (64, 8)]),
        (ImageRange((16, 16), (32, 96), (64, 96)), [(32, 96), (16, 16), (64, 96)]),
        (ImageRange((16, 8), (16, 8), (16, 32)), [(16, 8)]),
    ],
)
def test_sizes_that_stand_for_a_range(given, sizes):
    assert given.sizes() == sizes


def test_a_range_is_kept_and_shown_whole():
    assert str(RANGE) == "16x32 to 80x96, tuned for 48x64"
    assert RANGE.to_dict() == {"smallest": [16, 32], "optimal": [48, 64], "largest": [80, 96]}
    assert ImageRange.from_dict(RANGE.to_dict()) == RANGE


def test_what_a_checkpoint_stage_says():
    for found, sizes in (({}, (48, 64)), ({"image_range": None}, (48, 64)), ({"image_range": RANGE.to_dict()}, RANGE)):
        assert Checkpoint.from_dict({"image_size": [48, 64], **found}).sizes == sizes


@pytest.mark.parametrize(
    ("text", "default", "expected"),
    [
        ("dynamic:16x32..80x96@48x64", None, RANGE),
        ("dynamic:16x32..80x96@48x64", (64, 48), RANGE),  # what is written goes before what the checkpoint has
        ("dynamic:16x32..80x96", (48, 64), RANGE),
        ("dynamic:16x32..80x96", None, ImageRange((16, 32), (16, 32), (80, 96))),
        ("dynamic:16..80@48", None, ImageRange((16, 16), (48, 48), (80, 80))),
        (" dynamic: 1 .. 2 ", None, ImageRange((1, 1), (1, 1), (2, 2))),
        ("dynamic:16..80@80", None, ImageRange((16, 16), (80, 80), (80, 80))),
        ("dynamic:16x32..16x64", None, ImageRange((16, 32), (16, 32), (16, 64))),
    ],
)
def test_ranges(text, default, expected):
    assert parse_range(text, default) == expected


@pytest.mark.parametrize(
    ("text", "default", "message"),
    [
        ("dynamic:16", None, "expected 'dynamic:160..448'"),
        ("dynamic:16..16", None, "the second size must lie above the first"),
        ("dynamic:0..16", None, "the second size must lie above the first"),
        ("dynamic:16x0..16x16", None, "the second size must lie above the first"),
        ("dynamic:16x64..80x32", None, "the second size must lie above the first"),
        ("dynamic:16..80@81", None, "the size after @, 81x81, lies outside"),
        ("dynamic:16..80@16x8", None, "the size after @, 16x8, lies outside"),
        ("dynamic:16..80", (8, 16), "the checkpoint's own size, 8x16, lies outside"),
        ("dynamic:16..80", (16, 96), "the checkpoint's own size, 16x96, lies outside"),
        (f"dynamic:16..{LARGEST_SIDE + 1}", None, "a side has at most 16384 pixels"),
    ],
)
def test_ranges_that_are_none(text, default, message):
    with pytest.raises(UsageError, match=message):
        parse_range(text, default)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("", None),
        (224, (224, 224)),
        ("224", (224, 224)),
        ((224, 384), (224, 384)),
        ("224x384", (224, 384)),
        (1, (1, 1)),
        (LARGEST_SIDE, (16384, 16384)),
    ],
)
def test_one_size(value, expected):
    assert parse_size(value) == expected


@pytest.mark.parametrize(
    "value",
    [0, -1, (), (1, 2, 3), (0, 224), (224, 0), "x", "224x", 223.9, True, LARGEST_SIDE + 1, (1, LARGEST_SIDE + 1)],
)
def test_what_is_no_size(value):
    with pytest.raises(UsageError, match=r"config\.image_size"):
        parse_size(value)


@pytest.mark.parametrize("size", [(16, 16), (16, 48), (48, 16), (224, 224)])
def test_sizes_that_patches_tile(size):
    check_image_size(size, 16)  # one patch is enough of a side


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((15, 16), "16x16"),  # no patch at all fits
        ((16, 17), "16x16"),
        ((0, 16), "16x16"),  # nothing is a multiple too
        ((-16, 16), "16x16"),
        ((31, 41), "32x48"),  # each side for itself
    ],
)
def test_sizes_that_patches_do_not_tile(size, nearest):
    with pytest.raises(UsageError) as caught:
        check_image_size(size, 16)
    assert f"image_size {size[0]}x{size[1]}: not a multiple of the patch size 16" in str(caught.value)
    assert caught.value.fix == f"The nearest that is: {nearest}."


@pytest.mark.parametrize(
    ("value", "expected"),
    [("dynamic:16..80", True), (" dynamic:16..80", True), ("224", False), ("16..80 dynamic", False), (224, False)],
)
def test_ranges_are_told_from_sizes(value, expected):
    assert is_range(value) is expected
