"""From what clients have, image files or pixels of any size, to the graph's input, as the checkpoint requires."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.core.errors import BenchmarkError
from vit_convert.images.patches import packed_patches, patch_inputs
from vit_convert.images.pixels import decode_image
from vit_convert.images.preprocess import Preprocess
from vit_convert.serve.triton.models.common import array_of, each, parameters

ENCODED, PIXELS = "image", "pixels"  # names of the inputs
PATCHES = "patches"  # the parameter of a model that cuts images into so many
_LARGEST_PIXELS = 178956970  # Pillow's limit for encoded images


class TritonPythonModel:
    """The class named in `1/model.py` of a repository."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Reads the record and the graph's input from the model's parameters."""
        given, config = parameters(args), json.loads(args["model_config"])
        self._source, self._targets = config["input"][0]["name"], config["output"]
        self._fit = Cut(given) if PATCHES in given else Fit(given)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers each request by itself, because their images differ in size."""
        return each(requests, self._compute)

    def _compute(self, request: Any) -> dict[str, np.ndarray]:
        given = array_of(request, self._source)
        found = self._fit.encoded(given) if self._source == ENCODED else self._fit.pixels(given)
        if isinstance(self._fit, Cut):
            return by_kind(self._targets, found)
        return {self._targets[0]["name"]: found}


class Fit:
    """The preprocessing of one model.

    Args:
        given: "preprocess" (the record as JSON), "height", "width", "dtype" and "layout" of the graph's input.
    """

    def __init__(self, given: Mapping[str, str]):
        self._preprocess = Preprocess.from_dict(json.loads(given["preprocess"]))
        self._height, self._width = int(given["height"]), int(given["width"])
        self._dtype, self._channels_first = np.dtype(given["dtype"]), given["layout"] == "NCHW"

    def encoded(self, images: np.ndarray) -> np.ndarray:
        """Preprocesses image files.

        Args:
            images: bytes [batch, 1].

        Raises:
            CalibrationError: one cannot be decoded; its place in the request is named.
        """
        flat = images.reshape(-1)
        fitted = [
            decode_image(io.BytesIO(data), f"{ENCODED}[{place}] of {len(flat)}", self._one)
            for place, data in enumerate(flat.tolist())
        ]
        return self._as_input(np.stack(fitted))

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """Preprocesses pixels.

        Args:
            images: uint8 [batch, height, width, 3].

        Raises:
            BenchmarkError: there is no pixel, or too many.
        """
        if (
            images.ndim != 4
            or images.shape[3] != 3
            or 0 in images.shape
            or images.shape[1] * images.shape[2] > _LARGEST_PIXELS
        ):
            raise BenchmarkError(
                f"{PIXELS} {list(images.shape)}: expected [batch, height, width, 3]", fix="Send RGB images."
            )
        return self._as_input(np.stack([self._one(image) for image in images]))

    def _one(self, image: np.ndarray) -> np.ndarray:
        return self._preprocess.fit(image, self._height, self._width)

    def _as_input(self, images: np.ndarray) -> np.ndarray:
        return self._preprocess.graph_input(images, self._dtype, channels_first=self._channels_first)


class Cut(Fit):
    """The preprocessing of a model that takes patches of images of any aspect.

    Args:
        given: "patches" (how many) and "patch_size" (in pixels).
    """

    def __init__(self, given: Mapping[str, str]):
        self._count, self._patch_size = int(given[PATCHES]), int(given["patch_size"])

    def _one(self, image: np.ndarray) -> np.ndarray:
        return packed_patches(image, self._patch_size, self._count)

    def _as_input(self, images: np.ndarray) -> np.ndarray:
        return images


def by_kind(outputs: Sequence[Mapping[str, Any]], packed: np.ndarray) -> dict[str, np.ndarray]:
    """Patches, places and mask under the names that a config has for them, which their types and sides tell apart.

    Args:
        outputs: of the config.
        packed: uint8 [batch, patches, bytes] as `images.patches.packed_patches` gives them.
    """
    parts = patch_inputs(packed, ((row["data_type"] == "TYPE_FP32", len(row["dims"]) + 1) for row in outputs))
    return {row["name"]: part for row, part in zip(outputs, parts)}
