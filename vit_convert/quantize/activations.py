"""Runs a graph over images in onnxruntime and yields its activations, batch by batch, in bounded memory."""

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime

from vit_convert.core.errors import CalibrationError
from vit_convert.core.onnx_file import Batch, feeds_of, open_proto
from vit_convert.core.ort_options import device_of
from vit_convert.core.progress import Progress

# What one onnxruntime call may return for histograms; beyond it, first fewer images per call, then fewer tensors.
OUTPUT_BYTES = 512 << 20
# Only for ranges: both ends, a sum (because onnxruntime's maximum ignores NaN), and the number of elements.
_REDUCTIONS = ("ReduceMax", "ReduceMin", "ReduceSum", "Size")

Normalize = Callable[[np.ndarray], Batch]


class DeviceError(CalibrationError):
    """The GPU did not run the graph, but the CPU may."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """The result of one pass for a tensor.

    Attributes:
        amax: the largest |x|.
        elements: number of elements per image.
    """

    amax: dict[str, float]
    elements: dict[str, int]


@dataclasses.dataclass
class ActivationRun:
    """One graph over one set of images.

    Attributes:
        onnx_path: the fp32 graph; its external data is read in place.
        images: uint8 [images, height, width, 3], may be memory-mapped.
        normalize: uint8 [batch, height, width, 3] → the graph's float32 input, or {input: array} if it has several.
        batch_size: maximum number of images per call.
        device: "cpu", "cuda" or "auto".
        progress: shows a bar for each pass.
        used: the device that the last session ran on, "cpu" or "cuda".
    """

    onnx_path: pathlib.Path
    images: np.ndarray
    normalize: Normalize
    batch_size: int
    device: str
    progress: Progress
    used: str = "cpu"

    def scan(self, names: Sequence[str], label: str, *, num_images: int | None = None) -> Scan:
        """The largest |x| and the number of elements of each tensor, found inside the graph.

        Args:
            names: of activations.
            label: of the progress bar.
            num_images: how many of the images, starting with the first; None for all.

        Raises:
            CalibrationError: an activation is not finite, or the images do not have the graph's size.
            DeviceError: the GPU fails.
        """
        session = self._session(names, reduce=True)
        amax, elements = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        for pixels, outputs in self._stream(session, self.images[:num_images], self.batch_size, label):
            each = len(names)
            for name, high, low, total, count in zip(names, *(outputs[i : i + each] for i in range(0, 4 * each, each))):
                if not np.isfinite([high, low, total]).all():
                    raise not_finite(name)
                amax[name] = max(amax[name], float(high), -float(low))
                elements[name] = int(count) // len(pixels)
        return Scan(amax, elements)

    def activations(self, names: Sequence[str], label: str) -> Iterator[tuple[dict[str, np.ndarray], list[int]]]:
        """Yields the activations of each batch, and for each of its images a number derived from its pixels.

        If a model's tensors for one image exceed OUTPUT_BYTES, they are split into parts, with one pass for each.
        """
        elements = self.scan(names, "Sizes", num_images=1).elements
        chunks = _chunks(elements, OUTPUT_BYTES)
        for number, chunk in enumerate(chunks, start=1):
            session = self._session(chunk, reduce=False)
            fitting = OUTPUT_BYTES // (4 * sum(elements[name] for name in chunk))
            bar = label if len(chunks) == 1 else f"{label} {number}/{len(chunks)}"
            for pixels, outputs in self._stream(session, self.images, max(1, min(self.batch_size, fitting)), bar):
                yield dict(zip(chunk, outputs)), [zlib.crc32(image.tobytes()) for image in pixels]

    def _session(self, names: Sequence[str], *, reduce: bool) -> onnxruntime.InferenceSession:
        """Opens the graph with the given tensors (or what `_REDUCTIONS` makes of them) as its only outputs.

        Only the graph is copied in memory; weights stay in the file's external data.
        """
        proto = onnx.load(self.onnx_path, load_external_data=False)
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
        session = open_proto(proto, self.onnx_path.parent, device=self.device)
        self.used = device_of(session)
        return session

    def _stream(
        self, session: onnxruntime.InferenceSession, images: np.ndarray, batch_size: int, label: str
    ) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """Yields (the pixels of a batch, the session's outputs)."""
        with self.progress.bar(label, total=len(images)) as advance:
            for start in range(0, len(images), batch_size):
                pixels = np.asarray(images[start : start + batch_size])
                feeds = feeds_of(session, self.normalize(pixels))
                _require_shapes(session, feeds)
                yield pixels, self._outputs(session, feeds)
                advance(len(pixels))

    def _outputs(self, session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return session.run(None, feeds)
        except Exception as e:  # onnxruntime's exceptions have no common base class
            if self.used == "cpu":
                raise
            raise DeviceError(
                f"calibration on {self.used}: onnxruntime: {e}",
                fix="Free the GPU's memory, or set config.calibration.device=cpu.",
            ) from e


def not_finite(name: str) -> CalibrationError:
    """The error for an activation that is NaN or infinite."""
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


def _require_shapes(session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]) -> None:
    for tensor in session.get_inputs():
        given, expected = feeds[tensor.name].shape[1:], tuple(tensor.shape[1:])
        if len(given) != len(expected) or any(isinstance(e, int) and e != size for e, size in zip(expected, given)):
            raise CalibrationError(
                f"calibration images are {given}, the graph takes {expected}", fix="Decode them again."
            )
