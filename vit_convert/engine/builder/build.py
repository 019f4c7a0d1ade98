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
from vit_convert.core.bundle import atomic, write_json
from vit_convert.core.errors import BuildError, UnbuildableError
from vit_convert.core.progress import Progress
from vit_convert.engine.backend.log_capture import make_monitor
from vit_convert.engine.backend.sidecar import Asked, Sidecar, TensorRecord, plan_file, write_sidecar
from vit_convert.engine.backend.trt import DTYPES, Backend
from vit_convert.engine.builder import layer_info
from vit_convert.engine.builder.builder_config import configure
from vit_convert.engine.builder.network import count_attentions, inputs, parse_graph
from vit_convert.engine.builder.precision import (
    builds_strongly_typed,
    count_types,
    require_precision,
    require_types,
    set_ranges,
    set_weak_precision,
)
from vit_convert.engine.builder.request import BuildRequest, graph_file
from vit_convert.engine.builder.timing_cache import find_timings, load_timings, save_timings
from vit_convert.engine.runtime.profiles import Profile, Shape

_MAX_OPT_LEVEL = 5
_LEAN = "libnvinfer_lean"


@dataclasses.dataclass(frozen=True)
class BuildResult:
    """What a build gave.

    Attributes:
        sidecar: of the plan, as it was written.
        num_bytes: size of the plan.
        seconds: wall time of parsing and building.
        products: how many matrix products and convolutions of the parsed graph have each precision.
        attentions: how many attentions the parsed graph computes.
        layers: the inspector's JSON, or None.
        layers_missing: why `layers` is None, else "".
        fused_attention: fused attention kernels; None if the layer information does not tell.
        warnings: TensorRT's warnings.
    """

    sidecar: Sidecar
    num_bytes: int
    seconds: float
    products: dict[str, int]
    attentions: int
    layers: dict[str, Any] | None
    layers_missing: str
    fused_attention: layer_info.FusedAttention | None
    warnings: list[str]


def build_engine(
    backend: Backend, request: BuildRequest, plan_path: str | os.PathLike[str], *, progress: Progress
) -> BuildResult:
    """Builds an engine and writes `plan_path`, its sidecar and, if TensorRT tells them, its layers (`.layers.json`).

    Args:
        backend: the TensorRT that builds.
        request: what to build.
        plan_path: where the engine goes; it appears whole or not at all.
        progress: where warnings and the progress bar go.

    Returns:
        The BuildResult.

    Raises:
        BuildError: the graph does not parse, the precision would not be honoured, TensorRT fails, or the plan or the
            timing cache cannot be written.
    """
    plan_path, onnx_path = pathlib.Path(plan_path), pathlib.Path(request.onnx_path)
    has_calibrator = request.calibrator is not None or bool(request.ranges)  # either way int8 is no matter of the graph
    require_precision(backend, request.precision, has_calibrator=has_calibrator)
    if backend.name == "tensorrt" and kernels.needed_by(onnx_path) and not kernels.register():
        raise BuildError(
            f"{onnx_path.name}: needs the library of our kernels, and there is no {kernels.library()}",
            fix=f"Build it (python -m vit_convert.kernels --help), or set {kernels.ENVIRONMENT} to it.",
        )
    if not 0 <= request.opt_level <= _MAX_OPT_LEVEL:  # TensorRT takes any number without a word
        raise BuildError(
            f"opt_level {request.opt_level}: the builder knows 0 to {_MAX_OPT_LEVEL}", fix="Use one of those."
        )
    _require_writable(plan_path, fix="Choose a writable --workdir.")
    timing_path = find_timings(backend, request.timing_cache)
    if timing_path is not None:
        _require_writable(timing_path, fix="engine.timing_cache is a folder: choose one that can be written.")
    asked, started = request.asked, time.perf_counter()
    with backend.logger.listening(progress):
        builder = _make_builder(backend)
        typed = builds_strongly_typed(backend, has_calibrator=has_calibrator)
        network, parser = parse_graph(backend, builder, onnx_path, strongly_typed=typed)
        counts = count_types(backend, network)
        require_types(
            counts,
            request.precision,
            strongly_typed=typed,
            has_calibrator=has_calibrator,
            graph=onnx_path.name,
        )
        builder_config = configure(backend, builder, network, request)
        if not typed:
            set_weak_precision(
                backend,
                builder,
                builder_config,
                network,
                request.precision,
                request.keep_fp32,
                has_calibrator=has_calibrator,
                ranged=request.ranges.keys(),
            )
        set_ranges(network, request.ranges, graph=onnx_path.name)
        timing_cache = None if timing_path is None else load_timings(builder_config, timing_path, progress)
        serialized = _build(backend, builder, network, builder_config, request, progress)
        seconds, attentions = time.perf_counter() - started, count_attentions(backend, network)
        del parser  # it owns the weights that the builder read
        if graph_file(onnx_path) != asked.onnx:
            raise BuildError(
                f"{onnx_path}: was {asked.onnx.sha256[:12]}… when its build began, and is another now",
                fix="Build it again.",
            )
        _write(plan_path, serialized)
        built = {"products": dict(counts["products"]), "attentions": attentions, "build_seconds": round(seconds, 3)}
        sidecar = _sidecar(backend, network, asked, plan_path, **built)
        write_sidecar(plan_path, sidecar)
        if timing_path is not None and timing_cache is not None:
            save_timings(timing_path, timing_cache, progress)
        layers, missing = layer_info.engine_layers(backend, serialized, version_compatible=request.version_compatible)
        layers_path = plan_path.with_name(f"{plan_path.name}.layers.json")
        if layers is not None:
            write_json(layers_path, layers)
        else:
            layers_path.unlink(missing_ok=True)  # an earlier engine's
        warnings = list(backend.logger.warnings)
    fused = None if layers is None else layer_info.fused_attention(layers)
    return BuildResult(
        sidecar, serialized.nbytes, seconds, dict(counts["products"]), attentions, layers, missing, fused, warnings
    )


def _make_builder(backend: Backend) -> Any:
    try:
        return backend.module.Builder(backend.logger)
    except TypeError as e:  # the bindings' word for a null builder
        reason = "; ".join(backend.logger.errors + backend.logger.warnings)
        raise BuildError(
            f"{backend.module.__name__} {backend.version}: no builder ({reason})",
            fix="Check the driver with nvidia-smi.",
        ) from e


def _build(
    backend: Backend, builder: Any, network: Any, builder_config: Any, request: BuildRequest, progress: Progress
) -> Any:
    if not backend.has_progress_monitor:  # the bar cannot move, and without rich there is none
        profiles = "; ".join(_describe(ranges) for ranges in request.profiles) or "the graph's own shape"
        progress.say(f"building {request.precision} from {pathlib.Path(request.onnx_path).name} for {profiles}")
    with progress.bar(f"TensorRT {request.precision}", total=1.0 if backend.has_progress_monitor else None) as advance:
        if backend.has_progress_monitor:
            # builder_config keeps no reference of its own on every version, so `monitor` must outlive the call
            monitor = make_monitor(backend.module, backend.logger, advance)
            builder_config.progress_monitor = monitor
        serialized = builder.build_serialized_network(network, builder_config)
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


def _sidecar(backend: Backend, network: Any, asked: Asked, plan_path: pathlib.Path, **built: Any) -> Sidecar:
    def tensors(found: list[Any]) -> tuple[TensorRecord, ...]:
        return tuple(
            TensorRecord(name=tensor.name, dtype=DTYPES[tensor.dtype.name], shape=tuple(tensor.shape))
            for tensor in found
        )

    return Sidecar(
        **{field.name: getattr(asked, field.name) for field in dataclasses.fields(asked)},
        backend=backend.name,
        version=backend.version,
        targets=tuple(backend.targets),
        gpu=dataclasses.asdict(backend.gpu) if backend.gpu else None,
        inputs=tensors(inputs(network)),
        outputs=tensors([network.get_output(i) for i in range(network.num_outputs)]),
        built_at=_now(),
        plan=plan_file(plan_path),
        **built,
    )


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
