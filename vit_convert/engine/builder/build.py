"""From ONNX to an engine: parse, refuse what TensorRT would not honour, build, write the plan and its sidecar."""

import dataclasses
import datetime
import os
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from vit_convert import kernels
from vit_convert.core.bundle import atomic
from vit_convert.core.engine_results import EngineSummary
from vit_convert.core.errors import BuildError, UnbuildableError
from vit_convert.core.progress import Progress
from vit_convert.engine.backend.graph_file import graph_file
from vit_convert.engine.backend.log_capture import make_monitor
from vit_convert.engine.backend.sidecar import PlanFile, Sidecar, TensorRecord, plan_file, write_sidecar
from vit_convert.engine.backend.trt import DTYPES, Backend
from vit_convert.engine.builder.builder_config import configure
from vit_convert.engine.builder.network import ParsedGraph, parse_graph
from vit_convert.engine.builder.precision import (
    TypeCounts,
    builds_strongly_typed,
    count_types,
    require_precision,
    require_types,
    set_ranges,
    set_weak_precision,
)
from vit_convert.engine.builder.request import BuildRequest
from vit_convert.engine.builder.summary import summarise
from vit_convert.engine.builder.timing_cache import find_timings, kept_timings
from vit_convert.engine.runtime.profiles import Profile, Shape

_MAX_OPT_LEVEL = 5
_LEAN = "libnvinfer_lean"


def build_engine(
    backend: Backend, request: BuildRequest, plan_path: str | os.PathLike[str], *, progress: Progress
) -> EngineSummary:
    """Builds an engine and writes `plan_path`, its sidecar and, if TensorRT shows them, its layers (`.layers.json`).

    Args:
        backend: the TensorRT that builds.
        request: what to build.
        plan_path: the engine's file; it appears whole or not at all.
        progress: shows warnings and the progress bar.

    Returns:
        Its summary, which the sidecar also keeps.

    Raises:
        BuildError: the graph does not parse, the precision would not be honoured, TensorRT fails, or the plan or the
            timing cache cannot be written.
    """
    plan_path = pathlib.Path(plan_path)
    _require_buildable(backend, request)
    _require_writable(plan_path, fix="Choose a writable --workdir.")
    timings = find_timings(backend, request.timing_cache)
    if timings is not None:
        _require_writable(timings, fix="engine.timing_cache is a folder: choose one that can be written.")
    asked, started = request.asked, time.perf_counter()
    with backend.logger.listening(progress):
        serialized, sidecar = _built(backend, request, timings, progress)
        seconds, warnings = time.perf_counter() - started, tuple(backend.logger.warnings)
    if graph_file(request.onnx_path) != asked.onnx:
        raise BuildError(
            f"{os.fspath(request.onnx_path)}: was {asked.onnx.sha256[:12]}… when its build began, and is another now",
            fix="Build it again.",
        )
    _write(plan_path, serialized)
    del serialized  # the engine is about to be loaded from its file
    sidecar = dataclasses.replace(sidecar, plan=plan_file(plan_path), build_seconds=round(seconds, 3), built_at=_now())
    write_sidecar(plan_path, sidecar)
    summary = summarise(backend, plan_path, sidecar, warnings=warnings, progress=progress)
    write_sidecar(plan_path, dataclasses.replace(sidecar, summary=summary))
    return summary


def _require_buildable(backend: Backend, request: BuildRequest) -> None:
    require_precision(backend, request)
    onnx_path = pathlib.Path(request.onnx_path)
    if backend.name == "tensorrt" and kernels.needed_by(onnx_path) and not kernels.register():
        raise UnbuildableError(
            f"{onnx_path.name}: needs the library of our kernels, and there is no {kernels.library()}",
            fix=f"Build it (python -m vit_convert.kernels --help), or set {kernels.ENVIRONMENT} to it.",
        )
    if not 0 <= request.opt_level <= _MAX_OPT_LEVEL:  # TensorRT silently accepts any number
        raise BuildError(
            f"opt_level {request.opt_level}: the builder knows 0 to {_MAX_OPT_LEVEL}", fix="Use one of those."
        )


def _built(
    backend: Backend, request: BuildRequest, timings: pathlib.Path | None, progress: Progress
) -> tuple[Any, Sidecar]:
    """The plan, and its sidecar without the file's size and hash. The network, which holds the weights, is freed."""
    onnx_path = pathlib.Path(request.onnx_path)
    builder, typed = _make_builder(backend), builds_strongly_typed(backend, request)
    parsed = parse_graph(backend, builder, onnx_path, strongly_typed=typed)
    counts = count_types(parsed)
    require_types(counts, request, strongly_typed=typed, graph=onnx_path.name)
    builder_config = configure(parsed, builder, request)
    if not typed:
        set_weak_precision(parsed, builder, builder_config, request)
    set_ranges(parsed, request.ranges)
    with kept_timings(builder_config, timings, progress):
        serialized = _serialize(parsed, builder, builder_config, request, progress)
    return serialized, _sidecar(parsed, request, counts)


def _make_builder(backend: Backend) -> Any:
    try:
        return backend.module.Builder(backend.logger)
    except TypeError as e:  # the bindings' error for a null builder
        reason = "; ".join(backend.logger.errors + backend.logger.warnings)
        raise BuildError(
            f"{backend.module.__name__} {backend.version}: no builder ({reason})",
            fix="Check the driver with nvidia-smi.",
        ) from e


def _serialize(
    parsed: ParsedGraph, builder: Any, builder_config: Any, request: BuildRequest, progress: Progress
) -> Any:
    backend = parsed.backend
    if not backend.has_progress_monitor:  # the bar cannot move, and without rich there is none
        profiles = "; ".join(_describe(ranges) for ranges in request.profiles) or "the graph's own shape"
        progress.say(f"building {request.precision} from {pathlib.Path(request.onnx_path).name} for {profiles}")
    with progress.bar(f"TensorRT {request.precision}", total=1.0 if backend.has_progress_monitor else None) as advance:
        if backend.has_progress_monitor:
            # builder_config keeps no reference of its own on every version, so `monitor` must outlive the call
            monitor = make_monitor(backend.module, backend.logger, advance)
            builder_config.progress_monitor = monitor
        serialized = builder.build_serialized_network(parsed.network, builder_config)
    for failure in (backend.logger.failure, getattr(request.calibrator, "failure", None)):
        if failure is not None:  # kept by a callback, which could not raise through TensorRT
            raise failure
    if serialized is None:
        reason = backend.logger.explain()
        fix = "See TensorRT's reason above; a smaller batch.max or another opt_level may build."
        if request.version_compatible and _LEAN in reason:
            where = (
                f" (from tensorrt_lean=={backend.version}, on LD_LIBRARY_PATH under the name above)"
                if backend.name == "tensorrt"
                else ""
            )
            fix = (
                f"Such an engine carries TensorRT's lean runtime: install {_LEAN} of this version{where}, "
                "or leave engine.version_compatible off."
            )
        raise UnbuildableError(f"{pathlib.Path(request.onnx_path).name} as {request.precision}: {reason}", fix=fix)
    return serialized


def _describe(ranges: Profile) -> str:
    """ "images 8x224x224x3", or of a range its smallest, optimal and largest shape."""

    def spell(shapes: Sequence[Shape]) -> str:
        return " - ".join(dict.fromkeys("x".join(map(str, shape)) for shape in shapes))

    return ", ".join(f"{name} {spell(shapes)}" for name, shapes in ranges.items())


def _require_writable(path: pathlib.Path, *, fix: str) -> None:
    try:  # before the build: some take minutes
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise BuildError(f"{path}: cannot be written ({e.strerror})", fix=fix) from e


def _write(path: pathlib.Path, data: Any) -> None:
    try:
        with atomic(path) as temporary:
            temporary.write_bytes(data)
    except OSError as e:
        raise BuildError(f"{path}: cannot be written ({e.strerror})", fix="Choose a writable --workdir.") from e


def _sidecar(parsed: ParsedGraph, request: BuildRequest, counts: TypeCounts) -> Sidecar:
    def tensors(found: list[Any]) -> tuple[TensorRecord, ...]:
        return tuple(
            TensorRecord(name=tensor.name, dtype=DTYPES[tensor.dtype.name], shape=tuple(tensor.shape))
            for tensor in found
        )

    backend, asked = parsed.backend, request.asked
    return Sidecar(
        **{field.name: getattr(asked, field.name) for field in dataclasses.fields(asked)},
        backend=backend.name,
        version=backend.version,
        targets=tuple(backend.targets),
        gpu=dataclasses.asdict(backend.gpu) if backend.gpu else None,
        inputs=tensors(parsed.inputs),
        outputs=tensors(parsed.outputs),
        products=dict(counts.products),
        attentions=parsed.num_attentions,
        plan=PlanFile(bytes=0, sha256=""),
        model=request.model,
        instead_of=request.instead_of,
    )


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
