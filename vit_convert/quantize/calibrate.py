"""Measures activation ranges by running the graph in onnxruntime: one streaming pass, memory independent of the number
of images."""

import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from vit_convert.core.bundle import read_json, write_json
from vit_convert.core.errors import CalibrationError, UsageError, nearest
from vit_convert.core.onnx_file import Batch, feeds_of, open_proto
from vit_convert.core.progress import Progress
from vit_convert.quantize import graph
from vit_convert.quantize.guard import Cost, Guard, Shift
from vit_convert.quantize.histogram import (
    Histogram,
    entropy_threshold,
    minmax_threshold,
    mse_threshold,
    percentile_threshold,
)
from vit_convert.quantize.placement import place

GUARDED = "entropy"  # the method whose thresholds are widened where the products lose by them
METHODS: dict[str, Callable[[Histogram], float]] = {
    GUARDED: entropy_threshold,
    "entropy_plain": entropy_threshold,
    "minmax": minmax_threshold,
    "percentile": percentile_threshold,
    "mse": mse_threshold,
}
SUBTRACTION_PAYS = 0.5  # what a shift that takes a subtraction has to leave of the error at most
# What one onnxruntime call may return for histograms. Fewer images a call first, then fewer tensors.
OUTPUT_BYTES = 512 << 20
# Only for ranges: both ends, a sum because onnxruntime's maximum passes over NaN, and the number of elements.
_REDUCTIONS = ("ReduceMax", "ReduceMin", "ReduceSum", "Size")

Normalize = Callable[[np.ndarray], Batch]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Ranges of activations.

    Attributes:
        thresholds: for each tensor, the |x| that the largest quantized value stands for.
        amax: for each tensor, the largest |x| seen.
        method: one of METHODS.
        num_images: how many images were seen.
        keys: sha256 of the graph with its weights and of the normalized data, and the method: what a cached file must
            agree on.
        costs: for each tensor, what the thresholds from entropy's to amax cost; empty for other methods than "entropy".
        left_out: the tensors whose products stay out of int8, and the error of these at the best threshold.
        shifts: the tensors from which a constant is taken before they are int8; their threshold is of what is left.
    """

    thresholds: dict[str, float]
    amax: dict[str, float]
    method: str
    num_images: int
    keys: dict[str, str]
    costs: dict[str, Cost] = dataclasses.field(default_factory=dict)
    left_out: dict[str, float] = dataclasses.field(default_factory=dict)
    shifts: dict[str, Shift] = dataclasses.field(default_factory=dict)

    def shift(self, free: Collection[str], subtracted: Collection[str]) -> "Calibration":
        """The same with the shifts that pay, of tensors where they cost nothing and of those where they cost a
        subtraction."""
        pays = dict.fromkeys(subtracted, SUBTRACTION_PAYS) | dict.fromkeys(free, 1.0)
        found = {name: self.costs[name].shift(share) for name, share in pays.items() if name in self.costs}
        return dataclasses.replace(self, shifts={name: shift for name, shift in found.items() if shift is not None})

    def error(self, name: str) -> float:
        """What int8 costs the products of a tensor, as it is quantized; of one that calibration measured."""
        return self.shifts[name].error if name in self.shifts else self.costs[name].cheapest

    def leave_out(self, tensors: Collection[str], max_error: float) -> "Calibration":
        """The same with those of these tensors left out whose products lose more than `max_error` at every threshold
        that was tried."""
        errors = {name: self.error(name) for name in tensors if name in self.costs}
        return dataclasses.replace(self, left_out={name: error for name, error in errors.items() if error > max_error})

    def widened(self) -> dict[str, Cost]:
        """The tensors whose threshold is not entropy's, those first that would have lost most by it."""
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
    """Computes what a calibration depends on, to compare with a saved one's `keys`.

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
    progress: Progress | None = None,
) -> Calibration:
    """Measures the ranges of activations over calibration images.

    Min-max finds each tensor's largest |x| inside the graph, so that nothing large leaves it; the others count
    histograms, whose range grows with what they see. All stream: the state is 32 KiB a tensor, and some hundred rows of
    it for the guard, and one call returns at most OUTPUT_BYTES of activations (or one image's largest tensor), so
    memory does not depend on the number of images, and on the model only by what onnxruntime holds.
    A model whose tensors of one image exceed OUTPUT_BYTES takes a pass for each part of them.

    Args:
        onnx_path: the fp32 graph with input `images` float32 [batch, height, width, 3]; its external data is read where
            it lies.
        images: uint8 [images, height, width, 3], may be memory-mapped.
        normalize: uint8 [batch, height, width, 3] → the graph's float32 input, or {input: array} where it takes
            several.
        tensors: names of activations; None for those that the default placement quantizes.
        method: entropy, its thresholds widened where a product loses by them (`guard`); entropy_plain, percentile
            (99.99), mse, minmax.
        batch_size: most images a call.
        progress: shows a bar for each pass.

    Returns:
        The Calibration.

    Raises:
        UsageError: unknown method or tensor.
        CalibrationError: no images, images of another size than the graph's, or an activation is not finite.
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
    costs: dict[str, Cost] = {}

    if method == "minmax":
        amax, _ = _scan(onnx_path, names, images, normalize, batch_size, progress, "Ranges")
        thresholds = amax
    else:
        _, elements = _scan(onnx_path, names, images[:1], normalize, 1, progress, "Sizes")
        guard = Guard(model, names) if method == GUARDED else None
        histograms = _count(onnx_path, elements, images, normalize, batch_size, progress, guard)
        amax = {name: histogram.amax for name, histogram in histograms.items()}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            thresholds = dict(zip(names, pool.map(METHODS[method], histograms.values())))
        if guard is not None:
            costs = {name: guard.cost(name, thresholds[name], amax[name]) for name in names if amax[name]}
            thresholds |= {name: cost.best for name, cost in costs.items()}
    return Calibration(
        thresholds, amax, method, len(images), calibration_keys(onnx_path, images, normalize, method), costs
    )


def sample_products(
    onnx_path: str | os.PathLike[str],
    tensors: Sequence[str],
    images: np.ndarray,
    normalize: Normalize,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Guard:
    """A Guard that has seen these activations of the images: what thresholds that were found otherwise cost, any of
    them."""
    guard, progress = Guard(ir.load(onnx_path), tensors), progress or Progress(quiet=True)
    _, elements = _scan(onnx_path, list(tensors), images[:1], normalize, 1, progress, "Sizes")
    for name, value, keys in _activations(onnx_path, elements, images, normalize, batch_size, progress, "Products"):
        guard.add(name, value, keys)
    return guard


def _scan(
    onnx_path: str | os.PathLike[str],
    names: list[str],
    images: np.ndarray,
    normalize: Normalize,
    batch_size: int,
    progress: Progress,
    label: str,
) -> tuple[dict[str, float], dict[str, int]]:
    """The largest |x| and the number of elements of one image, for each tensor."""
    session = _session(onnx_path, names, reduce=True)
    amax, elements = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for size, groups in _stream(session, len(_REDUCTIONS), images, normalize, batch_size, progress, label):
        for name, high, low, total, count in zip(names, *groups):
            if not np.isfinite([high, low, total]).all():
                raise _not_finite(name)
            amax[name] = max(amax[name], float(high), -float(low))
            elements[name] = int(count) // size
    return amax, elements


def _count(
    onnx_path: str | os.PathLike[str],
    elements: dict[str, int],
    images: np.ndarray,
    normalize: Normalize,
    batch_size: int,
    progress: Progress,
    guard: Guard | None,
) -> dict[str, Histogram]:
    """A histogram for each tensor; the guard sees what is counted."""
    histograms = {name: Histogram() for name in elements}
    for name, value, keys in _activations(onnx_path, elements, images, normalize, batch_size, progress, "Histograms"):
        try:
            histograms[name].add(value)
        except ValueError as e:
            raise _not_finite(name) from e
        if guard is not None:
            guard.add(name, value, keys)
    return histograms


def _activations(
    onnx_path: str | os.PathLike[str],
    elements: dict[str, int],
    images: np.ndarray,
    normalize: Normalize,
    batch_size: int,
    progress: Progress,
    label: str,
) -> Iterator[tuple[str, np.ndarray, list[int]]]:
    """Yields (name, activation, a number for each of its images that goes with their pixels), batch by batch."""
    chunks = _chunks(elements, OUTPUT_BYTES)
    for number, names in enumerate(chunks, start=1):
        session = _session(onnx_path, names, reduce=False)
        fitting = OUTPUT_BYTES // (4 * sum(elements[name] for name in names))
        bar = label if len(chunks) == 1 else f"{label} {number}/{len(chunks)}"
        start = 0
        for size, (values,) in _stream(session, 1, images, normalize, max(1, min(batch_size, fitting)), progress, bar):
            keys = [zlib.crc32(image.tobytes()) for image in images[start : start + size]]
            start += size
            for name, value in zip(names, values):
                yield name, value, keys


def _not_finite(name: str) -> CalibrationError:
    return CalibrationError(
        f"{name}: the activation is not finite on the calibration images", fix="Run the fp32 check first."
    )


def _chunks(elements: dict[str, int], limit_bytes: int) -> list[list[str]]:
    """Splits tensors, in graph order, so that one image's float32 values of each part fit the limit."""
    chunks: list[list[str]] = [[]]
    used = 0
    for name, count in elements.items():
        if chunks[-1] and used + 4 * count > limit_bytes:
            chunks.append([])
            used = 0
        chunks[-1].append(name)
        used += 4 * count
    return chunks


def _session(onnx_path: str | os.PathLike[str], names: list[str], *, reduce: bool) -> onnxruntime.InferenceSession:
    """Opens the graph with the given tensors (or what `_REDUCTIONS` makes of them) as its only outputs.

    Only the graph is copied, in memory; weights stay in the external data of the file.
    """
    proto = onnx.load(onnx_path, load_external_data=False)
    outputs = [onnx.ValueInfoProto(name=name) for name in names]
    if reduce:
        outputs = []
        for op in _REDUCTIONS:
            attributes: dict[str, Any] = {} if op == "Size" else {"keepdims": 0}
            for name in names:
                proto.graph.node.append(onnx.helper.make_node(op, [name], [f"{name}/{op}"], **attributes))
                outputs.append(onnx.ValueInfoProto(name=f"{name}/{op}"))
    del proto.graph.output[:]
    proto.graph.output.extend(outputs)
    return open_proto(proto, pathlib.Path(onnx_path).parent)


def _stream(
    session: onnxruntime.InferenceSession,
    num_groups: int,
    images: np.ndarray,
    normalize: Normalize,
    batch_size: int,
    progress: Progress,
    label: str,
) -> Iterator[tuple[int, list[list[np.ndarray]]]]:
    """Yields (images in the batch, outputs in `num_groups` equal lists) batch by batch."""
    with progress.bar(label, total=len(images)) as advance:
        for start in range(0, len(images), batch_size):
            pixels = np.asarray(images[start : start + batch_size])
            feeds, size = feeds_of(session, normalize(pixels)), len(pixels)
            _require_shapes(session, feeds)
            outputs = session.run(None, feeds)
            each = len(outputs) // num_groups
            yield size, [outputs[i * each : (i + 1) * each] for i in range(num_groups)]
            advance(size)


def _require_shapes(session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]) -> None:
    for tensor in session.get_inputs():
        given, expected = feeds[tensor.name].shape[1:], tuple(tensor.shape[1:])
        if len(given) != len(expected) or any(isinstance(e, int) and e != size for e, size in zip(expected, given)):
            raise CalibrationError(
                f"calibration images are {given}, the graph takes {expected}", fix="Decode them again."
            )
