"""Inputs of graphs and what they hold, for tests that need no model."""

from vit_convert.core.image_size import ImageRange
from vit_convert.core.signature import Tensor

PREPROCESS = {
    "resize": "bilinear",
    "antialias": True,
    "resize_short": 0,
    "mean": [0.5, 0.25, 0.0],
    "std": [0.5, 0.25, 1.0],
}


def image_input(size, layout="NHWC", dtype="float32"):
    """The inputs of a graph that takes images, of one size or of a range."""
    sides = ("height", "width") if isinstance(size, ImageRange) else tuple(size)
    return (Tensor("images", dtype, ("batch", *sides, 3) if layout == "NHWC" else ("batch", 3, *sides), layout),)
