"""The preprocessing record: how an image file becomes what a checkpoint was trained on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_convert.core.errors import UsageError, nearest
from vit_convert.images.resize import resize

Triple = tuple[float, float, float]

_HALF: Triple = (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How images are resized, cropped and normalised; stored with the model, so that no other code needs to know it.

    Attributes:
        resize: "bilinear", "bicubic" or "area".
        antialias: whether the filter widens when the image shrinks; optional only for "bilinear"; "area" always
            averages.
        resize_short: size in pixels of the shorter side after a resize that keeps the aspect, before a central crop; 0
            resizes directly to (height, width) without keeping it.
        mean: subtracted per channel, on the [0, 1] scale.
        std: divided by per channel, on the [0, 1] scale.
        truncate: whether resized values are truncated, as by tf.cast to uint8 in the original, instead of rounded.

    Raises:
        UsageError: this resize is not supported.
    """

    resize: str
    antialias: bool
    resize_short: int
    mean: Triple
    std: Triple
    truncate: bool = False  # bundles of earlier versions lack this key

    def __post_init__(self) -> None:
        if (self.resize, self.antialias) not in {
            ("bilinear", False),
            ("bilinear", True),
            ("bicubic", True),
            ("area", True),
        }:
            raise UsageError(
                f"preprocess: resize={self.resize!r} with antialias={self.antialias} is not offered",
                fix='Use "bilinear" with or without antialias, or "bicubic" or "area" with it.',
            )
        if self.truncate and self.resize == "bicubic":
            raise UsageError(
                "preprocess: resize='bicubic' with truncate=True is not offered", fix="No family needs it."
            )

    @property
    def scale(self) -> np.ndarray:
        """Factor of `normalize`, 1 / (255 std): float32 [3]."""
        return (1.0 / (255.0 * np.asarray(self.std, np.float64))).astype(np.float32)

    @property
    def offset(self) -> np.ndarray:
        """Summand of `normalize`, -mean / std: float32 [3]."""
        return (-np.asarray(self.mean, np.float64) / np.asarray(self.std, np.float64)).astype(np.float32)

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """Turns pixels into the values of the graph's input: (x / 255 - mean) / std, as float32(x) * scale +
        offset.

        `scale` and `offset` are rounded to float32 once; the product and the sum are rounded separately, so that a
        graph with one Mul and one Add of the same constants gives the same bits. For mean = std = 0.5 this is (x -
        127.5) / 127.5 to within 2.4e-7.

        Args:
            images: uint8 [images, height, width, 3].

        Returns:
            float32 array of the same shape.
        """
        values = images.astype(np.float32)
        values *= self.scale
        values += self.offset
        return values

    def fit(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        """Brings one image to the model's size; an image of this size is returned unchanged.

        Args:
            image: uint8 [h, w, 3].
            height: of the result in pixels.
            width: of the result in pixels.

        Returns:
            uint8 [height, width, 3].
        """
        if image.shape[:2] == (height, width):
            return image
        if not self.resize_short:
            return resize(image, height, width, self.resize, self.antialias, truncate=self.truncate)
        # For a square target this is the shorter-side rule; other targets are still covered on both sides.
        margin = self.resize_short / min(height, width)
        ratio = max(margin * height / image.shape[0], margin * width / image.shape[1])
        tall, wide = max(height, round(image.shape[0] * ratio)), max(width, round(image.shape[1] * ratio))
        window = ((tall - height) // 2, (wide - width) // 2, height, width)
        return resize(image, tall, wide, self.resize, self.antialias, truncate=self.truncate, window=window)

    def graph_input(self, images: np.ndarray, dtype: np.dtype[Any] | str, *, channels_first: bool) -> np.ndarray:
        """Turns decoded images into the input of a graph or an engine.

        Args:
            images: uint8 [batch, height, width, 3].
            dtype: the input's type; a uint8 graph normalises its input itself.
            channels_first: whether it takes [batch, 3, height, width].

        Returns:
            Array of that type and layout.
        """
        dtype = np.dtype(dtype)
        values = images if dtype == np.uint8 else self.normalize(images).astype(dtype, copy=False)
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2) if channels_first else values)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Preprocess":
        """The inverse of `to_dict`."""
        return cls(**{**record, "mean": tuple(record["mean"]), "std": tuple(record["std"])})


@dataclasses.dataclass(frozen=True)
class _Family:
    resize: str
    antialias: bool
    short_per_side: float  # resize_short over the shorter side of the image size; 0 does not keep the aspect
    mean: Triple = _HALF
    std: Triple = _HALF
    truncate: bool = False


_FAMILIES = {
    "vit_jax": _Family("bilinear", False, 0),  # vit_jax/input_pipeline.py
    "lit": _Family("bilinear", False, 0, truncate=True),  # vit_jax/preprocess.py
    # configs: resize_small(256)|central_crop(224)|value_range(-1,1); pp/ops_image.py ends each resize in a cast to
    # uint8
    "big_vision": _Family("area", True, 256 / 224, truncate=True),
    # big_vision configs/proj/image_text: resize(224)|value_range(-1,1)
    "siglip": _Family("bilinear", False, 0, truncate=True),
    # configs/proj/paligemma: resize(224, antialias=True)|value_range(-1,1)
    "paligemma": _Family("bilinear", True, 0, truncate=True),
    "clip": _Family("bicubic", True, 1, _CLIP_MEAN, _CLIP_STD),  # openai/CLIP and scenic
    "imagenet": _Family("bicubic", True, 256 / 224, _IMAGENET_MEAN, _IMAGENET_STD),  # DeiT, MAE, Swin, DINOv2
    # scenic/README: values in [0, 1], resized straight to the square
    "tips": _Family("bilinear", False, 0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "dinov3": _Family("bilinear", True, 0, _IMAGENET_MEAN, _IMAGENET_STD),  # dinov3 README
}


def preprocess_for(family: str, image_size: tuple[int, int]) -> Preprocess:
    """The record with which a family's checkpoints were evaluated.

    Args:
        family: name in the table above, or that of a checkpoint layout that begins with one ("big_vision_scan").
        image_size: (height, width) of the model's input in pixels; the shorter side before cropping scales with it.

    Returns:
        The Preprocess.

    Raises:
        UsageError: no family has that name.
    """
    found = _FAMILIES.get(family) or next(
        (row for name, row in _FAMILIES.items() if family.startswith(f"{name}_")), None
    )
    if found is None:
        raise UsageError(
            f"no preprocessing is known for family {family!r}.{nearest(family, _FAMILIES)}",
            fix=f"Known families: {', '.join(_FAMILIES)}.",
        )
    short = round(min(image_size) * found.short_per_side)
    return Preprocess(found.resize, found.antialias, short, found.mean, found.std, found.truncate)
