"""Measures activation ranges by running the graph in onnxruntime: one streaming pass, memory independent of the number
of images."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from vit_convert.core.bundle import read_json, write_json
from vit_convert.core.errors import CalibrationError, UsageError, nearest
from vit_convert.core.host import num_cores
from vit_convert.core.progress import Progress
from vit_convert.quantize import graph
from vit_convert.quantize.activations import ActivationRun, DeviceError, Normalize, not_finite
from vit_convert.quantize.guard import Cost, Guard, Shift
from vit_convert.quantize.histogram import (
    Histogram,
    entropy_threshold,
    minmax_threshold,
    mse_threshold,
    percentile_threshold,
)
from vit_convert.quantize.placement import place

GUARDED = "entropy"  # the method that widens thresholds where they cost the products too much
METHODS: dict[str, Callable[[Histogram], float]] = {
    GUARDED: entropy_threshold,
    "entropy_plain": entropy_threshold,
    "minmax": minmax_threshold,
    "percentile": percentile_threshold,
    "mse": mse_threshold,
}
SUBTRACTION_PAYS = 0.5  # a shift that needs a subtraction must reduce the error at least to this share


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Ranges of activations.

    Attributes:
        thresholds: for each tensor, the |x| that the largest quantized value represents.
        amax: for each tensor, the largest |x| seen.
        method: one of METHODS.
        num_images: how many images were seen.
        keys: sha256 of the graph with its weights and of the normalized data, and the method, all of which must agree
            with a cached file.
        costs: for each tensor, what the thresholds from entropy's to amax cost; empty for methods other than "entropy".
        left_out: the tensors whose products stay out of int8, with the products' error at the best threshold.
        shifts: the tensors from which a constant is subtracted before quantization; their threshold is for the
            difference.
        device: what ran the graph, "cpu" or "cuda".
    """

    thresholds: dict[str, float]
    amax: dict[str, float]
    method: str
    num_images: int
    keys: dict[str, str]
    costs: dict[str, Cost] = dataclasses.field(default_factory=dict)
    left_out: dict[str, float] = dataclasses.field(default_factory=dict)
    shifts: dict[str, Shift] = dataclasses.field(default_factory=dict)
    device: str = "cpu"

    def shift(self, free: Collection[str], subtracted: Collection[str]) -> "Calibration":
        """A copy with the shifts that pay, for tensors where a shift is free and for those where it costs a
        subtraction."""
        pays = dict.fromkeys(subtracted, SUBTRACTION_PAYS) | dict.fromkeys(free, 1.0)
        found = {name: self.costs[name].shift(share) for name, share in pays.items() if name in self.costs}
        return dataclasses.replace(self, shifts={name: shift for name, shift in found.items() if shift is not None})

    def error(self, name: str) -> float:
        """What int8 costs the products of a tensor that calibration measured, with its final threshold."""
        return self.shifts[name].error if name in self.shifts else self.costs[name].cheapest

    def leave_out(self, tensors: Collection[str], max_error: float) -> "Calibration":
        """A copy that leaves out those of these tensors whose products lose more than `max_error` at every threshold
        tried."""
        errors = {name: self.error(name) for name in tensors if name in self.costs}
        return dataclasses.replace(self, left_out={name: error for name, error in errors.items() if error > max_error})

    def widened(self) -> dict[str, Cost]:
        """The tensors whose threshold is not entropy's, starting with those that would have lost most with it."""
        found = {name: cost for name, cost in self.costs.items() if self.thresholds[name] > cost.candidates[0]}
        return dict(sorted(found.items(), key=lambda item: min(item[1].errors) - item[1].errors[0]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `calibration.json`."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """Reads `calibration.json`.

        Raises:
            CalibrationError: the file is missing, damaged or of another format.
        """
        value = read_json(path, {})
        try:
            costs = {name: Cost(**cost) for name, cost in value.get("costs", {}).items()}
            shifts = {name: Shift(**shift) for name, shift in value.get("shifts", {}).items()}
            return cls(**{**value, "costs": costs, "shifts": shifts})
        except (AttributeError, TypeError) as e:
            raise CalibrationError(
                f"{path}: not a calibration ({e})", fix="Remove it; calibration writes a new one."
            ) from e


def calibration_keys(
    onnx_path: str | os.PathLike[str], images: np.ndarray, normalize: Normalize, method: str
) -> dict[str, str]:
    """Computes what a calibration depends on, for comparison with the `keys` of a saved one.

    Args:
        onnx_path: the fp32 graph.
        images: uint8 [images, height, width, 3].
        normalize: as `calibrate` takes it; its effect on the first image enters the key.
        method: one of METHODS.

    Returns:
        {"graph", "data", "method"}.
    """
    digest = hashlib.sha256(str(images.shape).encode())
    for image in images:
        digest.update(image.tobytes())
    first = normalize(images[:1])
    for value in first.values() if isinstance(first, Mapping) else [first]:
        digest.update(value.tobytes())
    return {"graph": graph.hash_model(onnx_path), "data": digest.hexdigest(), "method": method}


def calibrate(
    onnx_path: str | os.PathLike[str],
    images: np.ndarray,
    normalize: Normalize,
    tensors: Sequence[str] | None = None,
    *,
    method: str = "entropy",
    batch_size: int = 8,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Calibration:
    """Measures the ranges of activations over calibration images.

    Min-max finds each tensor's largest |x| inside the graph, so that nothing large leaves it; the other methods count
    histograms, whose range grows with the data. All of them stream: the state is 32 KiB per tensor, plus some hundred
    rows of it for the guard, and one call returns at most OUTPUT_BYTES of activations (or one image's largest tensor).
    So memory does not depend on the number of images, and on the model only by what onnxruntime holds. If a model's
    tensors for one image exceed OUTPUT_BYTES, they are split into parts, with one pass for each.

    Args:
        onnx_path: the fp32 graph with input `images` float32 [batch, height, width, 3]; its external data is read in
            place.
        images: uint8 [images, height, width, 3], may be memory-mapped.
        normalize: uint8 [batch, height, width, 3] → the graph's float32 input, or {input: array} if it has several.
        tensors: names of activations; None for those that the default placement quantizes.
        method: entropy, with thresholds widened where they cost a product too much (`guard`); entropy_plain, percentile
            (99.99), mse, minmax.
        batch_size: maximum number of images per call.
        device: what runs the graph: "cpu", "cuda", or "auto" for CUDA if onnxruntime has it. Histograms are counted on
            the CPU. "auto" falls back to the CPU if the GPU fails.
        progress: shows a bar for each pass.

    Returns:
        The Calibration.

    Raises:
        UsageError: unknown method or tensor, or onnxruntime does not have the device.
        CalibrationError: there are no images, they do not have the graph's size, or an activation is not finite.
    """
    if method not in METHODS:
        raise UsageError(
            f"calibration.method is {method!r}{nearest(method, METHODS)}", fix=f"Use one of {', '.join(METHODS)}."
        )
    if not len(images):
        raise CalibrationError("calibration has no images", fix="Point calibration.data to a folder of images.")
    model = ir.load(onnx_path)
    names = list(place(model).tensors() if tensors is None else dict.fromkeys(tensors))
    known = set(graph.activations(model.graph))
    for name in names:
        if name not in known:
            raise UsageError(f"calibration: the graph has no activation {name!r}.{nearest(name, known)}")
    progress = progress or Progress(quiet=True)
    run = ActivationRun(pathlib.Path(onnx_path), images, normalize, batch_size, device, progress)
    try:
        amax, thresholds, costs = _ranges(run, model, names, method)
    except DeviceError as e:
        if device != "auto":
            raise
        progress.warn(f"{e}; calibrating on the CPU instead")
        run = dataclasses.replace(run, device="cpu")
        amax, thresholds, costs = _ranges(run, model, names, method)
    keys = calibration_keys(onnx_path, images, normalize, method)
    return Calibration(thresholds, amax, method, len(images), keys, costs, device=run.used)


def _ranges(
    run: ActivationRun, model: ir.Model, names: list[str], method: str
) -> tuple[dict[str, float], dict[str, float], dict[str, Cost]]:
    """The largest |x|, the threshold and, for the guarded method, the costs of each tensor."""
    costs: dict[str, Cost] = {}

    if method == "minmax":
        amax = run.scan(names, "Ranges").amax
        thresholds = amax
    else:
        guard = Guard(model, names) if method == GUARDED else None
        histograms = _count(run, names, guard)
        amax = {name: histogram.amax for name, histogram in histograms.items()}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            thresholds = dict(zip(names, pool.map(METHODS[method], histograms.values())))
        if guard is not None:
            costs = {name: guard.cost(name, thresholds[name], amax[name]) for name in names if amax[name]}
            thresholds |= {name: cost.best for name, cost in costs.items()}
    return amax, thresholds, costs


def sample_products(
    onnx_path: str | os.PathLike[str],
    tensors: Sequence[str],
    images: np.ndarray,
    normalize: Normalize,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Guard:
    """A Guard that has seen these activations for the images; it gives the cost of any thresholds, however they were
    found."""
    guard = Guard(ir.load(onnx_path), tensors)
    run = ActivationRun(pathlib.Path(onnx_path), images, normalize, batch_size, "cpu", progress or Progress(quiet=True))
    for values, keys in run.activations(list(tensors), "Products"):
        for name, value in values.items():
            guard.add(name, value, keys)
    return guard


def _count(run: ActivationRun, names: Sequence[str], guard: Guard | None) -> dict[str, Histogram]:
    """A histogram for each tensor; the guard sees the same values.

    Threads count the tensors of a batch, each tensor by one thread at a time, so that the counts equal those of a
    single thread.
    """
    histograms = {name: Histogram() for name in names}

    def see(keys: list[int], item: tuple[str, np.ndarray]) -> None:
        name, value = item
        try:
            histograms[name].add(value)
        except ValueError as e:
            raise not_finite(name) from e
        if guard is not None:
            guard.add(name, value, keys)

    with concurrent.futures.ThreadPoolExecutor(num_cores()) as pool:
        for values, keys in run.activations(names, "Histograms"):
            for _ in pool.map(functools.partial(see, keys), values.items()):
                pass
    return histograms
