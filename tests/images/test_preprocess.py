"""The preprocessing record, against float64 and against other people's resizers."""

import itertools
import json

import numpy as np
import pytest

from vit_convert.errors import UsageError
from vit_convert.images.preprocess import Preprocess, preprocess_for
from vit_convert.images.resize import resize

SIZES = [(37, 53, 24, 24), (24, 24, 37, 53), (375, 500, 224, 224), (32, 32, 32, 48), (5, 1, 9, 7)]


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


@pytest.mark.parametrize("family", ["clip", "imagenet", "dinov3"])
def test_normalization_against_float64(family):
    preprocess, images = preprocess_for(family, (224, 224)), photo(8, 8)[None]
    exact = (images / 255.0 - np.array(preprocess.mean)) / np.array(preprocess.std)
    # factor, product, offset and sum are each rounded once; values and partial results stay below 4.6, half a unit of which is 2^-22
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


@pytest.mark.parametrize(("h", "w", "height", "width"), SIZES)
def test_bilinear_without_antialias_is_that_of_jax_and_torch(h, w, height, width):
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    image = photo(h, w)
    got = resize(image, height, width, "bilinear", antialias=False)
    theirs = jax.image.resize(image.astype(np.float32), (height, width, 3), "bilinear", antialias=False)
    planes = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    others = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", align_corners=False, antialias=False)
    # Both return floats, ours is rounded to a level: half of one. They place their samples in float32, so that each axis is off by
    # up to a unit in the last place of its size, where neighbours differ by up to 255.
    tolerance = 0.5 + 2 * 255 * max(h, w) * 2**-23
    assert got.dtype == np.uint8
    assert np.abs(got - np.asarray(theirs)).max() <= tolerance
    assert np.abs(got - others[0].permute(1, 2, 0).numpy()).max() <= tolerance


@pytest.mark.parametrize(("h", "w", "height", "width"), [(12, 16, 8, 6), (16, 10, 7, 7), (6, 5, 9, 8), (40, 40, 10, 10)])
def test_area_is_the_exact_mean(h, w, height, width):
    image = photo(h, w)
    # Repeated until both sizes divide it, the mean over whole blocks is exact.
    blown = image.repeat(height, axis=0).repeat(width, axis=1).astype(np.float64)
    exact = blown.reshape(height, h, width, w, 3).mean(axis=(1, 3))
    assert np.abs(resize(image, height, width, "area", antialias=True) - exact).max() <= 0.5 + 1e-3  # one rounding to a level


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_antialiased_filters_are_those_of_torch(method):
    torch = pytest.importorskip("torch")
    image = photo(90, 70)
    planes = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    theirs = torch.nn.functional.interpolate(planes, (32, 32), mode=method, align_corners=False, antialias=True)
    theirs = theirs[0].permute(1, 2, 0).numpy().clip(0, 255)
    # Pillow rounds to a level after the columns and again after the rows.
    assert np.abs(resize(image, 32, 32, method, antialias=True) - theirs).max() <= 1.5


def test_a_flat_image_stays_flat():
    image = np.full((375, 500, 3), 255, np.uint8)
    for method, antialias in [("bilinear", False), ("bilinear", True), ("bicubic", True), ("area", True)]:
        assert (resize(image, 224, 224, method, antialias) == 255).all()


def test_big_vision_keeps_the_aspect_and_crops_the_centre():
    preprocess = preprocess_for("big_vision", (224, 224))
    assert (preprocess.resize, preprocess.resize_short) == ("area", 256)
    image = photo(300, 500)
    small = resize(image, 256, 427, "area", antialias=True)  # 500 * 256 / 300 = 426.7
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
    for family in ("vit_jax", "big_vision", "siglip", "clip", "imagenet", "dinov3"):
        record = preprocess_for(family, (224, 224))
        assert Preprocess.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_layouts_find_their_family():
    assert preprocess_for("big_vision_scan", (224, 224)) == preprocess_for("big_vision", (224, 224))
    assert preprocess_for("vit_jax_linen", (224, 224)) == preprocess_for("vit_jax", (224, 224))


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match=r"'big_vison'.*Did you mean big_vision"):
        preprocess_for("big_vison", (224, 224))
    with pytest.raises(UsageError, match="'bicubic' with antialias=False"):
        Preprocess("bicubic", False, 0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
