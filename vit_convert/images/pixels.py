"""One image file to pixels."""

import contextlib
import io
import pathlib
from collections.abc import Iterator

import numpy as np

from vit_convert.errors import CalibrationError


def decode_image(file: pathlib.Path | io.BytesIO, name: str) -> np.ndarray:
    """Decodes one PNG or JPEG.

    Grey becomes RGB, alpha is dropped and 16 bits keep their upper 8, as in tf.io.decode_image(channels=3); an EXIF orientation is
    applied.

    Args:
        file: path or bytes.
        name: what to call it in a message.

    Returns:
        uint8 [height, width, 3].

    Raises:
        CalibrationError: it is damaged, no image, or has more pixels than Pillow's limit against decompression bombs.
    """
    from PIL import Image, ImageOps

    with _naming(name), Image.open(file) as opened:
        if (
            Image.MAX_IMAGE_PIXELS is not None and opened.width * opened.height > Image.MAX_IMAGE_PIXELS
        ):  # Pillow itself only warns up to twice as many
            raise Image.DecompressionBombError(f"{opened.width} x {opened.height} pixels, the limit is {Image.MAX_IMAGE_PIXELS}")
        image: Image.Image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    from PIL import Image

    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise CalibrationError(f"image {name}: refused for its size ({e})", fix="Shrink or remove it.") from e
    except (OSError, SyntaxError, ValueError) as e:
        raise CalibrationError(f"image {name}: cannot be decoded ({e})", fix="Remove or replace it.") from e
