"""Ranks what could be quantized by the results of calibration, so that a plan does not need a run of the model for each
layer."""

import functools
import os
from collections.abc import Sequence

import numpy as np

from vit_convert.core.progress import Progress
from vit_convert.images.decode import pick
from vit_convert.quantize.activations import Normalize
from vit_convert.quantize.calibrate import Calibration, sample_products
from vit_convert.quantize.qdq import FORMATS
from vit_convert.quantize.sensitivity import Unit

_IMAGES = 16  # calibration images used for what calibration did not measure


def unit_costs(
    onnx_path: str | os.PathLike[str],
    calibration: Calibration,
    units: Sequence[Unit],
    images: np.ndarray,
    normalize: Normalize,
    *,
    precision: str,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Computes what quantizing each unit costs the products that read its tensors: the sum of their errors, see
    `guard.product_errors`.

    For int8 with the guarded method, calibration has measured them; otherwise one pass over some images does so for all
    tensors at once.

    Args:
        onnx_path: the fp32 graph.
        calibration: of it.
        units: from `sensitivity.candidates`.
        images: those of the calibration, uint8 [images, height, width, 3].
        normalize: as `calibrate` takes it.
        precision: int8 or fp8.
        batch_size: maximum number of images per call.
        progress: shows a bar.

    Returns:
        The cost of each unit, by its name.
    """
    known = {name: calibration.error(name) for name in calibration.costs} if precision == "int8" else {}
    ranges = calibration.amax if precision == "fp8" else calibration.thresholds
    sites = {site.tensor: site for unit in units for site in unit.sites if site.tensor not in known}
    if sites:
        chosen = images[pick(len(images), _IMAGES)]
        guard = sample_products(onnx_path, list(sites), chosen, normalize, batch_size=batch_size, progress=progress)
        rounded = functools.partial(_rounded, precision=precision)
        for name, site in sites.items():
            known[name] = guard.error(name, ranges[name] if site.amax is None else site.amax, rounded)
    return {unit.name: sum(known[name] for name in dict.fromkeys(site.tensor for site in unit.sites)) for unit in units}


def _rounded(rows: np.ndarray, threshold: float, *, precision: str) -> np.ndarray:
    """Rows rounded to a format and back."""
    number = FORMATS[precision]
    scale = np.float32(threshold) / np.float32(number.largest)
    return number.encode(rows / scale).astype(np.float32) * scale
