"""The preprocessing record, against float64 and against other people's resizers."""

import itertools
import json

import numpy as np
import pytest

from vit_convert.core.errors import UsageError
from vit_convert.images.preprocess import Preprocess, preprocess_for
from vit_convert.images.resize import resize


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_vit_jax_normalization_is_minus_one_to_one():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    got = preprocess_for("vit_jax", (16, 16)).normalize(levels)
    assert got.dtype == np.float32
    exact = (levels.astype(np.float64) - 127.5) / 127.5
    # The factor's rounding moves the product, below 2, by up to 2^-23; product and sum are rounded by up to 2^-24 each.
    assert np.abs(got - exact).max() <= 2**-23 + 2 * 2**-24
    assert (got.min(), got.max()) == (-1.0, 1.0)


# As published: openai/CLIP clip/clip.py (`_transform`), torchvision's ImageNet weights, dinov3's README.
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PUBLISHED = {
    "vit_jax": HALF,
    "lit": HALF,
    "big_vision": HALF,
    "siglip": HALF,
    "paligemma": HALF,
    "clip": CLIP,
    "imagenet": IMAGENET,
    "dinov3": IMAGENET,
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_normalization_against_float64(family):
    """The constants are written out here: taken from the record, a wrong one would be right."""
    preprocess, images = preprocess_for(family, (224, 224)), photo(8, 8)[None]
    mean, std = map(np.array, PUBLISHED[family])
    exact = (images / 255.0 - mean) / std
    # factor, product, offset and sum are each rounded once; values and partial results stay below 4.6, half a unit of
    # which is 2^-22
    assert np.abs(preprocess.normalize(images) - exact).max() <= 4 * 2**-22


def test_normalization_is_one_mul_and_one_add():
    preprocess, images = preprocess_for("imagenet", (224, 224)), photo(8, 8)[None]
    fused = np.add(np.multiply(images.astype(np.float32), preprocess.scale), preprocess.offset)
    assert np.array_equal(preprocess.normalize(images), fused)  # bit for bit: a graph with these constants must agree


def test_normalization_leaves_its_input_alone():
    images = photo(4, 4)[None]
    before = images.copy()
    preprocess_for("vit_jax", (4, 4)).normalize(images)
    assert np.array_equal(images, before)


@pytest.mark.parametrize(
    ("h", "w", "height", "width"), [(12, 16, 8, 6), (16, 10, 7, 7), (6, 5, 9, 8), (40, 40, 10, 10)]
)
def test_area_is_the_exact_mean(h, w, height, width):
    image = photo(h, w)
    # Repeated until both sizes divide it, the mean over whole blocks is exact.
    blown = image.repeat(height, axis=0).repeat(width, axis=1).astype(np.float64)
    exact = blown.reshape(height, h, width, w, 3).mean(axis=(1, 3))
    # one rounding to a level
    assert np.abs(resize(image, height, width, "area", antialias=True) - exact).max() <= 0.5 + 1e-3


def weights_1d(old: int, new: int, kernel) -> np.ndarray:
    """float64 [new, old], row i the normalised weights of output i, by the definition and without taps."""
    rows = np.array([[kernel(i, j, old / new) for j in range(old)] for i in range(new)])
    return rows / rows.sum(axis=1, keepdims=True)


def area(i: int, j: int, scale: float) -> float:
    return max(0.0, min((i + 1) * scale, j + 1) - max(i * scale, j))


def triangle(i: int, j: int, scale: float) -> float:
    return max(0.0, 1 - abs(j + 0.5 - (i + 0.5) * scale) / max(scale, 1))


def two_neighbours(i: int, j: int, scale: float, *, last: int) -> float:
    return max(0.0, 1 - abs(j - np.clip((i + 0.5) * scale - 0.5, 0, last)))


@pytest.mark.parametrize(
    ("family", "kernel"), [("big_vision", area), ("siglip", None), ("lit", None), ("paligemma", triangle)]
)
@pytest.mark.parametrize(("h", "w"), [(37, 53), (24, 24), (90, 31), (5, 7)])
def test_families_that_end_in_a_cast_to_uint8_truncate(family, kernel, h, w):
    """big_vision's pp/ops_image.py and vit_jax's preprocess.py cast the resized floats, which takes the level below."""
    preprocess = preprocess_for(family, (24, 24))
    image = photo(h, w)
    ratio = preprocess.resize_short / min(h, w)
    tall, wide = (round(h * ratio), round(w * ratio)) if preprocess.resize_short else (24, 24)
    down, across = (
        weights_1d(old, new, kernel or (lambda i, j, s, last=old - 1: two_neighbours(i, j, s, last=last)))
        for old, new in ((h, tall), (w, wide))
    )
    exact = np.einsum("ih,hwc,jw->ijc", down, image.astype(np.float64), across)
    top, left = (tall - 24) // 2, (wide - 24) // 2
    exact = exact[top : top + 24, left : left + 24]
    got = preprocess.fit(image, 24, 24)
    if image.shape[:2] == (24, 24):
        assert np.array_equal(got, image)
        return
    # What lies within 2^-10 of a level may be taken for it: float32 cannot tell. All else is cut.
    assert ((got == np.floor(exact)) | (got == np.floor(exact + 2**-9))).all()
    between = np.abs(exact - np.rint(exact)) > 0.01
    assert np.mean((np.rint(exact) - got)[between]) > 0.3  # rounded, the image would be half a level brighter


@pytest.mark.parametrize(("h", "w"), [(2000, 5), (1100, 7), (5, 2000)])
def test_images_that_are_tall_and_narrow(h, w):
    """Whose rows are averaged first, so that the columns do not make many times the image of it: the same by
    definition."""
    image = photo(h, w)
    down, across = (weights_1d(old, 16, area) for old in (h, w))
    exact = np.einsum("ih,hwc,jw->ijc", down, image.astype(np.float64), across)
    got = resize(image, 16, 16, "area", antialias=True, truncate=True)
    assert ((got == np.floor(exact)) | (got == np.floor(exact + 2**-9))).all()


def test_the_widened_filter_is_cut_as_well_up_to_a_64th():
    """Beyond, it is Pillow's, in bounded time, and rounds."""
    image = photo(256, 6)
    exact = np.einsum("ih,hwc->iwc", weights_1d(256, 4, triangle), image.astype(np.float64))
    got = resize(image, 4, 6, "bilinear", antialias=True, truncate=True)
    assert ((got == np.floor(exact)) | (got == np.floor(exact + 2**-9))).all()
    longer = photo(260, 6)  # 65 to 1
    exact = np.einsum("ih,hwc->iwc", weights_1d(260, 4, triangle), longer.astype(np.float64))
    assert np.abs(resize(longer, 4, 6, "bilinear", antialias=True, truncate=True) - exact).max() <= 0.5 + 1e-2


def test_families_that_do_not_cast_round_to_the_nearest():
    """vit_jax's input pipeline stays in floats after the resize: the nearest level is nearest to them."""
    image = photo(37, 53)
    down, across = (
        weights_1d(old, 24, lambda i, j, s, last=old - 1: two_neighbours(i, j, s, last=last)) for old in image.shape[:2]
    )
    exact = np.einsum("ih,hwc,jw->ijc", down, image.astype(np.float64), across)
    assert np.abs(preprocess_for("vit_jax", (24, 24)).fit(image, 24, 24) - exact).max() <= 0.5 + 1e-3


def test_a_flat_image_stays_flat():
    image = np.full((375, 500, 3), 255, np.uint8)
    for method, antialias in [("bilinear", False), ("bilinear", True), ("bicubic", True), ("area", True)]:
        assert (resize(image, 224, 224, method, antialias) == 255).all()
        if method != "bicubic":
            for level in (1, 100, 255):
                flat = np.full((375, 500, 3), level, np.uint8)
                assert (resize(flat, 224, 224, method, antialias, truncate=True) == level).all()


@pytest.mark.parametrize(
    ("method", "antialias"), [("bilinear", False), ("bilinear", True), ("bicubic", True), ("area", True)]
)
@pytest.mark.parametrize("truncate", [False, True])
def test_a_window_is_a_part_of_the_whole(method, antialias, truncate):
    if method == "bicubic" and truncate:
        pytest.skip("not offered")
    image = photo(60, 90)
    for height, width in ((40, 70), (130, 200)):
        whole = resize(image, height, width, method, antialias, truncate=truncate)
        for top, left, rows, columns in ((0, 0, 10, 20), (height - 10, width - 20, 10, 20), (13, 17, 20, 30)):
            part = resize(image, height, width, method, antialias, truncate=truncate, window=(top, left, rows, columns))
            assert np.array_equal(part, whole[top : top + rows, left : left + columns])


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_a_window_of_what_is_too_large_to_be_made_whole(monkeypatch, method):
    """Pillow takes the box in float32, so that a value may fall on the other side of a level.

    The image keeps off black and white: Pillow cuts what overshoots after each pass, and then the order of the two
    shows.
    """
    from vit_convert.images import resize as module

    image, window = 64 + photo(60, 90) // 2, (100, 130, 40, 50)
    for height, width in ((260, 390), (47, 71)):
        window = (3, 7, 30, 40) if height < 60 else window
        whole = resize(image, height, width, method, True, window=window)
        monkeypatch.setattr(module, "_WHOLE_PIXELS", 0)
        assert np.abs(resize(image, height, width, method, True, window=window).astype(int) - whole).max() <= 1
        monkeypatch.setattr(module, "_BETWEEN_PIXELS", 0)  # and the rows first
        assert np.abs(resize(image, height, width, method, True, window=window).astype(int) - whole).max() <= 1
        monkeypatch.undo()


# Sides at which the whole enlargement takes gigabytes: a strip, and what a scanner of receipts makes.
STRIPS = [(1, 3000), (3000, 1), (2, 500_000), (500_000, 2), (1, 4_000_000), (4_000_000, 1)]


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize("shape", STRIPS)
def test_strips_take_no_more_than_photographs(family, shape):
    import tracemalloc

    image = np.broadcast_to(np.arange(max(shape), dtype=np.int64) % 256, (3, max(shape))).T.astype(np.uint8)
    image = image.reshape(*shape, 3) if min(shape) == 1 else np.stack([image] * 2, axis=shape.index(2))
    tracemalloc.start()
    got = preprocess_for(family, (224, 224)).fit(image, 224, 224)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert got.shape == (224, 224, 3)
    # A few float32 images of the result, and for each pixel of the strip (up to 4 million) some numbers of one axis
    # alone.
    assert peak < 200e6 + 60 * max(shape)


@pytest.mark.parametrize("family", ["big_vision", "clip", "imagenet"])
@pytest.mark.parametrize("shape", [(1, 300), (300, 1)])
def test_a_strip_is_the_crop_of_its_whole_enlargement(family, shape):
    """Made whole here by Pillow and by the definition: 256 pixels for one, then the middle."""
    preprocess, image = preprocess_for(family, (32, 32)), photo(*shape)
    short = preprocess.resize_short
    tall, wide = (short, 300 * short) if shape[0] == 1 else (300 * short, short)
    got = preprocess.fit(image, 32, 32)
    top, left = (tall - 32) // 2, (wide - 32) // 2
    if family == "big_vision":
        # the area mean of an enlargement by whole numbers
        whole = image.repeat(tall // shape[0], axis=0).repeat(wide // shape[1], axis=1)
        assert np.array_equal(got, whole[top : top + 32, left : left + 32])
        return
    from PIL import Image

    whole = np.asarray(Image.fromarray(image).resize((wide, tall), Image.Resampling.BICUBIC))
    assert np.abs(got.astype(int) - whole[top : top + 32, left : left + 32]).max() <= 1


def test_big_vision_keeps_the_aspect_and_crops_the_centre():
    preprocess = preprocess_for("big_vision", (224, 224))
    assert (preprocess.resize, preprocess.resize_short) == ("area", 256)
    image = photo(300, 500)
    small = resize(image, 256, 427, "area", antialias=True, truncate=True)  # 500 * 256 / 300 = 426.7
    assert np.array_equal(preprocess.fit(image, 224, 224), small[16:240, 101:325])


@pytest.mark.parametrize("family", ["big_vision", "clip", "imagenet"])
def test_crops_have_the_size_asked_for(family):
    shapes = [(10, 400), (400, 10), (31, 33), (500, 375)]
    for (h, w), size in itertools.product(shapes, [(32, 32), (48, 16), (16, 48), (224, 160)]):
        assert preprocess_for(family, size).fit(photo(h, w), *size).shape == (*size, 3)


def test_an_image_of_the_right_size_is_untouched():
    image = photo(224, 224)
    for family in ("vit_jax", "big_vision", "imagenet"):
        assert preprocess_for(family, (224, 224)).fit(image, 224, 224) is image


def test_vit_jax_does_not_keep_the_aspect():
    image = photo(20, 60)
    assert np.array_equal(preprocess_for("vit_jax", (16, 16)).fit(image, 16, 16), resize(image, 16, 16))


def test_shorter_side_grows_with_the_image_size():
    assert [preprocess_for("imagenet", (s, s)).resize_short for s in (224, 384, 448)] == [256, 439, 512]
    assert preprocess_for("clip", (336, 336)).resize_short == 336


def test_records_survive_json():
    for family in PUBLISHED:
        record = preprocess_for(family, (224, 224))
        assert Preprocess.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_records_of_earlier_versions_are_read():
    old = {"resize": "area", "antialias": True, "resize_short": 256, "mean": [0.5] * 3, "std": [0.5] * 3}
    assert not Preprocess.from_dict(old).truncate  # as their images were made


def test_layouts_find_their_family():
    assert preprocess_for("big_vision_scan", (224, 224)) == preprocess_for("big_vision", (224, 224))
    assert preprocess_for("vit_jax_linen", (224, 224)) == preprocess_for("vit_jax", (224, 224))


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match=r"'big_vison'.*Did you mean big_vision"):
        preprocess_for("big_vison", (224, 224))
    with pytest.raises(UsageError, match="'bicubic' with antialias=False"):
        Preprocess("bicubic", False, 0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
