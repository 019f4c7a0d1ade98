"""Inputs for checks that need no reference: noise, black and white, in the form of a graph's inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.core.signature import Signature, Tensor
from vit_convert.images.noise import seeded_noise
from vit_convert.images.preprocess import Preprocess


def probe_inputs(
    signature: Signature, preprocess: Mapping[str, Any], image_size: Sequence[int]
) -> dict[str, np.ndarray]:
    """Four rows for each input of a model: noise, black, white, and the noise again.

    Args:
        signature: of the graph.
        preprocess: the preprocessing record; ignored if there are no images.
        image_size: (height, width) in pixels of the images, if there are any; (tokens,) if texts may have any length.

    Returns:
        {input: [4, …]} in the graph's type and layout. For an input without images, black is its smallest value and
        white its largest: 0 and the vocabulary's last id, or -1 and 1.
    """
    return {
        tensor.name: _images(tensor, preprocess, image_size) if tensor.is_image else _others(tensor, image_size)
        for tensor in signature.inputs
    }


def _images(tensor: Tensor, preprocess: Mapping[str, Any], image_size: Sequence[int]) -> np.ndarray:
    height, width = image_size
    noise = seeded_noise(1, height, width)[0]
    pixels = np.stack([noise, np.zeros_like(noise), np.full_like(noise, 255), noise])
    record = Preprocess.from_dict(preprocess)
    return record.graph_input(pixels, tensor.dtype, channels_first=tensor.layout == "NCHW")


def _others(tensor: Tensor, size: Sequence[int]) -> np.ndarray:
    """Dimensions that vary get 1, those of texts as many tokens as are asked for."""
    varying = size[0] if tensor.is_text and len(size) == 1 else 1
    shape = tuple(side if isinstance(side, int) else varying for side in tensor.shape[1:])
    dtype, generator = np.dtype(tensor.dtype), np.random.default_rng(0)
    if dtype.kind in "iu":
        low, high = 0, max(tensor.below, 2) - 1
        noise = generator.integers(low, high + 1, shape).astype(dtype)
    else:
        low, high = -1, 1
        noise = generator.uniform(low, high, shape).astype(dtype)
    return np.stack([noise, np.full_like(noise, low), np.full_like(noise, high), noise])
