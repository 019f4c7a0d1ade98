"""One image file to pixels: limits to the pixel, and no second huge image while one is in work."""

import io

import numpy as np
import pytest
from PIL import Image

from vit_convert.core.errors import CalibrationError
from vit_convert.images import pixels
from vit_convert.images.pixels import decode_image


def png(array, **options) -> io.BytesIO:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG", **options)
    return stream


def photo(height=8, width=10):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_bytes_are_decoded_like_files(tmp_path):
    (tmp_path / "a.png").write_bytes(png(photo()).getvalue())
    for got in (decode_image(png(photo()), "a"), decode_image(tmp_path / "a.png", "a")):
        assert got.dtype == np.uint8 and np.array_equal(got, photo())


def test_what_is_done_with_the_pixels_is_what_comes_back():
    assert decode_image(png(photo()), "a", lambda image: image.shape) == (8, 10, 3)


@pytest.mark.parametrize("kind", ["PNG", "PPM", "TIFF"])
def test_sixteen_bits_keep_their_upper_eight(kind):
    """As tf.io.decode_image does; to nearest, 0x12ff would be 0x13."""
    values, stream = np.array([[0x0000, 0x00FF, 0x0100, 0x12FF, 0xFF00, 0xFFFF]], np.uint16), io.BytesIO()
    Image.fromarray(values).save(stream, kind)
    assert decode_image(stream, "a")[0, :, 0].tolist() == [0, 0, 1, 0x12, 0xFF, 0xFF]


@pytest.mark.parametrize("level", [0, 1, 0xFFFF])
def test_a_flat_image_of_sixteen_bits(level):
    assert (decode_image(png(np.full((2, 2), level, np.uint16)), "a") == level >> 8).all()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([[0, 1 << 16]], np.int32), "reach from 0 to 65536"),
        (np.array([[5, -1]], np.int32), "reach from -1 to 5"),
        (np.array([[0.5, 1]], np.float32), "are floating-point numbers"),
    ],
)
def test_values_of_which_nothing_tells_the_range(values, said):
    """Cut to eight bits they are another image, or a black one."""
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF")
    with pytest.raises(CalibrationError, match=f"image a: cannot be decoded .its values {said}"):
        decode_image(stream, "a")


def test_alpha_and_transparency_are_dropped():
    """The colour below is kept, and not laid on a ground."""
    clear = np.dstack([photo(), np.zeros((8, 10), np.uint8)])
    assert np.array_equal(decode_image(png(clear), "a"), photo())
    grey = np.dstack([photo()[..., 0], np.zeros((8, 10), np.uint8)])
    assert np.array_equal(decode_image(png(grey), "a"), np.repeat(photo()[..., :1], 3, axis=2))


@pytest.mark.parametrize(
    ("orientation", "expected"), [(1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1])]
)
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_exif_orientations(orientation, expected, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photo() if mode == "RGB" else photo()[..., 0].astype(np.uint16) << 8
    wanted = photo() if mode == "RGB" else np.repeat(photo()[..., :1], 3, axis=2)
    assert np.array_equal(decode_image(png(image, exif=exif), "a"), expected(wanted))


@pytest.mark.parametrize("limit", [80, 79, 40, 39, None])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_limit_of_pixels(monkeypatch, limit):
    """Pillow itself warns above its limit and refuses above twice of it: 8 x 10 pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if limit is None or limit >= 80:
        assert decode_image(png(photo()), "a").shape == (8, 10, 3)
        return
    with pytest.raises(CalibrationError, match=r"image a\.png: refused for its size") as error:
        decode_image(png(photo()), "a.png")
    assert limit < 40 or "(10 x 8 pixels, the limit is" in str(error.value)  # else it is Pillow that says it
    assert error.value.fix == "Shrink or remove it."


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_warning_that_is_an_error_is_a_refusal(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 79)
    with pytest.raises(CalibrationError, match="image a: refused for its size"):
        decode_image(png(photo()), "a")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"BM" + bytes(60)])
def test_what_is_no_image(content):
    with pytest.raises(CalibrationError, match="image x/a: cannot be decoded") as error:
        decode_image(io.BytesIO(content), "x/a")
    assert error.value.fix == "Remove or replace it."


def test_errors_of_what_is_done_with_the_pixels_are_not_the_images():
    with pytest.raises(ZeroDivisionError):
        decode_image(png(photo()), "a", lambda image: 1 / 0)


@pytest.mark.parametrize(("height", "huge"), [(1 << 12, False), ((1 << 12) + 1, True)])
def test_an_image_of_more_than_16_million_pixels_is_huge(height, huge):
    image = np.zeros((height, 1 << 12), bool)
    assert decode_image(png(image), "a", lambda image: pixels._one_huge.locked()) is huge
    assert not pixels._one_huge.locked()


def test_the_next_huge_image_may_come_after_a_damaged_one(monkeypatch):
    monkeypatch.setattr(pixels, "_HUGE_PIXELS", 10)
    cut = png(photo(64, 64)).getvalue()[:2000]
    for _ in range(2):
        with pytest.raises(CalibrationError, match="cannot be decoded"):
            decode_image(io.BytesIO(cut), "a")
    assert not pixels._one_huge.locked()


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_what_is_no_image_is_said_without_an_address_in_memory(data):
    with pytest.raises(CalibrationError, match="image a: cannot be decoded") as error:
        decode_image(io.BytesIO(data), "a")
    assert "0x" not in str(error.value) and "not an image of a format that Pillow reads" in str(error.value)
