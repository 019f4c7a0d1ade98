"""Decodes an image file to pixels."""

import contextlib
import io
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from vit_convert.core.errors import CalibrationError

if TYPE_CHECKING:
    import PIL.Image

_HUGE_PIXELS = 1 << 24  # 50 MB, and as much again during decoding
_one_huge = threading.Lock()


def decode_image(
    file: pathlib.Path | io.BytesIO, name: str, then: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """Decodes one image file.

    Grey becomes RGB, alpha is dropped and 16 bits keep their upper 8, as in tf.io.decode_image(channels=3); an EXIF
    orientation is applied.

    Args:
        file: path or bytes.
        name: what to call it in a message.
        then: what to do with the pixels, for example shrink them. Until it is done, no other thread decodes an image of
            more than 2^24 pixels, so that a folder of such images needs only the memory for one.

    Returns:
        uint8 [height, width, 3], or what `then` made of it.

    Raises:
        CalibrationError: it is damaged or not an image, has floating-point values or more than 16 bits per value, or
            more pixels than Pillow's limit against decompression bombs.
    """
    from PIL import Image

    with contextlib.ExitStack() as held:
        with _naming(name), Image.open(file) as opened:
            num_pixels = opened.width * opened.height
            # Pillow only warns up to twice the limit
            if Image.MAX_IMAGE_PIXELS is not None and num_pixels > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(
                    f"{opened.width} x {opened.height} pixels, the limit is {Image.MAX_IMAGE_PIXELS}"
                )
            if num_pixels > _HUGE_PIXELS:
                held.enter_context(_one_huge)
            pixels = _decode(opened)
        return pixels if then is None else then(pixels)


def _decode(opened: "PIL.Image.Image") -> np.ndarray:
    from PIL import Image, ImageOps

    image: Image.Image = ImageOps.exif_transpose(opened)
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers, and nothing tells their range")
    if image.mode.startswith("I"):
        values = np.asarray(image)  # Pillow's "I" has 32 bits, even for the 16 of a PGM file
        if values.size and not 0 <= values.min() <= values.max() < 1 << 16:
            raise ValueError(f"its values reach from {values.min()} to {values.max()}, which 16 bits do not hold")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise CalibrationError(f"image {name}: refused for its size ({e})", fix="Shrink or remove it.") from e
    except UnidentifiedImageError as e:  # whose own message names an object in memory, or the path once more
        raise CalibrationError(
            f"image {name}: cannot be decoded (not an image of a format that Pillow reads, or damaged)",
            fix="Remove or replace it.",
        ) from e
    except Exception as e:
        # Pillow's readers may raise anything: struct.error, zlib.error, IndexError, …
        raise CalibrationError(f"image {name}: cannot be decoded ({e})", fix="Remove or replace it.") from e
