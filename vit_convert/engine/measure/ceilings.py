"""Measures a GPU's limits: with a large matrix product in an engine of its own, and with a copy."""

import contextlib
import pathlib
import struct
import tempfile
from collections.abc import Sequence

from vit_convert.core.errors import BenchmarkError, ConvertError
from vit_convert.core.progress import Progress
from vit_convert.core.roofline import MEMORY, Ceilings, data_sheet
from vit_convert.engine.backend import cuda
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.builder.build import build_engine
from vit_convert.engine.builder.request import BuildRequest
from vit_convert.engine.measure.loops import Worker, measure_throughput
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.session import Session

SIDE = 8192  # side of the matrices: large enough for every unit of a GPU, with memory traffic a hundredth of the time
_SECONDS, _WARMUP_SECONDS = 0.5, 0.2
_COPIED, _COPIES = 1 << 29, 20  # bytes: more than any cache holds
_TYPES = {"fp32": 1, "fp16": 10, "bf16": 16}  # ONNX's type numbers; for quantized types there are only data sheets
_OPSET, _IR = 17, 8


def measure_ceilings(
    backend: Backend, precisions: Sequence[str], *, progress: Progress, side: int = SIDE, seconds: float = _SECONDS
) -> Ceilings | None:
    """Measures what it can, and takes the rest from the GPU's data sheet.

    Args:
        backend: the TensorRT that builds and runs the product.
        precisions: to measure, as far as they are in _TYPES.
        progress: warns about what could not be measured.
        side: of the matrices.
        seconds: of one measurement.

    Returns:
        The Ceilings; None if nothing is known.
    """
    gpu = backend.gpu.name if backend.gpu else ""
    sheet = data_sheet(gpu)
    tflops: dict[str, float] = {}
    for precision in (name for name in precisions if name in _TYPES and backend.supports(name)):
        try:
            tflops[precision] = round(product_tflops(backend, precision, side, seconds, progress=progress), 1)
        except ConvertError as e:
            progress.warn(f"no ceiling of {precision} was measured: {e}")
    memory = None
    try:
        memory = round(copy_gb_per_s(_COPIED), 1)
    except ConvertError as e:
        progress.warn(f"no ceiling of the memory was measured: {e}")
    if sheet is None and (memory is None or not tflops):
        return None
    return Ceilings(
        tflops={**(sheet.tflops if sheet else {}), **tflops},
        memory_gb_per_s=memory if memory is not None else sheet.memory_gb_per_s if sheet else 0.0,
        measured=(*tflops, *([MEMORY] if memory is not None else [])),
        sheet=sheet.sheet if sheet else "",
    )


def product_tflops(backend: Backend, precision: str, side: int, seconds: float, *, progress: Progress) -> float:
    """The speed of the product of a square matrix with itself, in TFLOP/s.

    Raises:
        BuildError, BenchmarkError: it does not build or run.
    """
    with tempfile.TemporaryDirectory() as folder:
        graph, plan = pathlib.Path(folder) / "product.onnx", pathlib.Path(folder) / "product.plan"
        graph.write_bytes(product_graph(side, precision))
        build_engine(backend, BuildRequest(graph, precision), plan, progress=progress)
        with Session(Engine(backend, plan)) as session:
            workers = [Worker(session, (side, side), transfers=False)]
            measure_throughput(workers, min(seconds, _WARMUP_SECONDS))
            runs_per_second = measure_throughput(workers, seconds) / side  # the loop counts rows as images
    return 2e-12 * side**3 * runs_per_second


def copy_gb_per_s(num_bytes: int) -> float:
    """The speed of a copy within the GPU's memory, in GB/s read plus written.

    Args:
        num_bytes: of one copy.

    Raises:
        BuildError: there is no GPU, or not enough memory.
        BenchmarkError: the GPU's clock saw no time pass.
    """
    with contextlib.ExitStack() as held:
        source, target = (held.enter_context(contextlib.closing(cuda.DeviceBuffer(num_bytes))) for _ in range(2))
        stream = held.enter_context(contextlib.closing(cuda.Stream()))
        begin, end = (held.enter_context(contextlib.closing(cuda.Event())) for _ in range(2))
        target.copy_from(source.pointer, num_bytes, stream)
        begin.record(stream)
        for _ in range(_COPIES):
            target.copy_from(source.pointer, num_bytes, stream)
        end.record(stream)
        stream.synchronize()
        milliseconds = begin.elapsed_ms(end)
    if not milliseconds > 0:
        raise BenchmarkError(f"{_COPIES} copies of {num_bytes} bytes took {milliseconds} ms")
    return 2e-6 * _COPIES * num_bytes / milliseconds


def product_graph(side: int, precision: str) -> bytes:
    """An ONNX file of y = x · x, written without the onnx package.

    Source: onnx/onnx.proto, and protobuf's encoding.

    Args:
        side: of x.
        precision: of x and y.
    """

    def number(field: int, value: int) -> bytes:
        return _varint(field << 3) + _varint(value)

    def message(field: int, *parts: bytes) -> bytes:
        content = b"".join(parts)
        return _varint(field << 3 | 2) + _varint(len(content)) + content

    sides = message(2, *(message(1, number(1, side)) for _ in range(2)))
    matrix = message(2, message(1, number(1, _TYPES[precision]), sides))
    node = message(
        1, message(1, b"x"), message(1, b"x"), message(2, b"y"), message(3, b"product"), message(4, b"MatMul")
    )
    values = [message(11, message(1, b"x"), matrix), message(12, message(1, b"y"), matrix)]
    graph = message(7, node, message(2, b"product"), *values)
    return number(1, _IR) + graph + message(8, message(1, b""), number(2, _OPSET))


def _varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + struct.pack("B", value & 127 | 128), value >> 7
    return found + struct.pack("B", value)
