"""ONNX to engine: parse, refuse what would not be honoured, build, write the plan and its sidecar."""

import dataclasses
import datetime
import os
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import vit_convert
from vit_convert.bundle import atomic, write_json
from vit_convert.engine import inspect
from vit_convert.engine.listen import make_monitor
from vit_convert.engine.network import count_attentions, inputs, parse_graph
from vit_convert.engine.precision import builds_strongly_typed, count_types, require_precision, require_types, set_weak_precision
from vit_convert.engine.sidecar import graph_hashes, write_sidecar
from vit_convert.engine.trt import DTYPES, Backend
from vit_convert.errors import BuildError
from vit_convert.progress import Progress

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]

_MAX_OPT_LEVEL = 5


@dataclasses.dataclass(frozen=True)
class BuildRequest:
    """What an engine is to be.

    Attributes:
        onnx_path: the graph; external weights lie beside it.
        precision: fp32, fp16, bf16, int8 or fp8; the graph has to have it, save where the backend lowers fp32 by a flag.
        profiles: for each optimization profile, {input: (smallest, optimal, largest shape)}; none for static graphs.
        workspace_gib: most GPU memory that a layer may use as scratch; None leaves TensorRT's default, all of it.
        opt_level: builder optimization level, 0 to 5.
        timing_cache: folder in which timings are kept between builds, a file for each version and GPU; None keeps none.
        tf32: whether fp32 products may round their inputs to TF32's 10 mantissa bits.
        keep_fp32: node names, prefixes or patterns that a flag-lowered build keeps in fp32; a typed graph holds its own.
        hardware_compatible: make an engine for Ampere and every later GPU, at some cost in speed.
        version_compatible: make an engine that later versions of the same major load.
        calibrator: what `make_calibrator` returned, for int8 from a graph without Q/DQ nodes.
        preprocessing: the preprocessing record that travels with the engine.
    """

    onnx_path: str | os.PathLike[str]
    precision: str
    profiles: Sequence[Profile] = ()
    workspace_gib: float | None = None
    opt_level: int = 3
    timing_cache: str | os.PathLike[str] | None = None
    tf32: bool = False
    keep_fp32: Sequence[str] = ()
    hardware_compatible: bool = False
    version_compatible: bool = False
    calibrator: Any = None
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BuildResult:
    """What a build gave.

    Attributes:
        num_bytes: size of the plan.
        seconds: wall time of parsing and building.
        products: how many matrix products and convolutions of the parsed graph have each precision.
        attentions: how many attentions the parsed graph computes.
        layer_info: the inspector's JSON, None where `layers_missing` says why.
        layers_missing: why there is no layer information, else "".
        fused_attention: fused attention kernels; None where the layer information does not tell.
        warnings: what TensorRT warned of.
    """

    num_bytes: int
    seconds: float
    products: dict[str, int]
    attentions: int
    layer_info: dict[str, Any] | None
    layers_missing: str
    fused_attention: inspect.FusedAttention | None
    warnings: list[str]


def build_engine(backend: Backend, request: BuildRequest, plan_path: str | os.PathLike[str], *, progress: Progress) -> BuildResult:
    """Builds an engine and writes `plan_path`, its sidecar and, where TensorRT tells them, its layers (`.layers.json`).

    Args:
        backend: the TensorRT that builds.
        request: what to build.
        plan_path: where the engine goes; it appears whole or not at all.
        progress: where warnings and the progress bar go.

    Returns:
        The BuildResult.

    Raises:
        BuildError: the graph does not parse, the precision would not be honoured, TensorRT fails, or the plan cannot be written.
    """
    plan_path, onnx_path = pathlib.Path(plan_path), pathlib.Path(request.onnx_path)
    require_precision(backend, request.precision, has_calibrator=request.calibrator is not None)
    if not 0 <= request.opt_level <= _MAX_OPT_LEVEL:  # TensorRT takes any number without a word
        raise BuildError(f"opt_level {request.opt_level}: the builder knows 0 to {_MAX_OPT_LEVEL}", fix="Use one of those.")
    _require_writable(plan_path)
    started = time.perf_counter()
    with backend.logger.listening(progress):
        builder = _make_builder(backend)
        typed = builds_strongly_typed(backend, has_calibrator=request.calibrator is not None)
        network, parser = parse_graph(backend, builder, onnx_path, strongly_typed=typed)
        counts = count_types(backend, network)
        require_types(
            counts,
            request.precision,
            strongly_typed=typed,
            has_calibrator=request.calibrator is not None,
            graph=onnx_path.name,
        )
        builder_config = _configure(backend, builder, network, request)
        if not typed:
            set_weak_precision(backend, builder, builder_config, network, request.precision, request.keep_fp32)
        timing_path, timing_cache = _load_timing_cache(backend, builder_config, request, progress)
        serialized = _build(backend, builder, network, builder_config, request, progress)
        seconds, attentions = time.perf_counter() - started, count_attentions(backend, network)
        del parser  # it owns the weights that the builder read
        _write(plan_path, serialized)
        record = {**request_record(request), **_record(backend, network), "products": dict(counts["products"]), "attentions": attentions}
        write_sidecar(plan_path, {**record, "build_seconds": round(seconds, 3), "built_at": _now()})
        if timing_path is not None:
            _write(timing_path, timing_cache.serialize())
        layer_info, missing = inspect.engine_layers(backend, serialized)
        layers_path = plan_path.with_name(f"{plan_path.name}.layers.json")
        if layer_info is not None:
            write_json(layers_path, layer_info)
        else:
            layers_path.unlink(missing_ok=True)  # an earlier engine's
        warnings = list(backend.logger.warnings)
    fused = None if layer_info is None else inspect.fused_attention(layer_info)
    return BuildResult(serialized.nbytes, seconds, dict(counts["products"]), attentions, layer_info, missing, fused, warnings)


def _make_builder(backend: Backend) -> Any:
    try:
        return backend.module.Builder(backend.logger)
    except TypeError as e:  # the bindings' word for a null builder
        reason = "; ".join(backend.logger.errors + backend.logger.warnings)
        raise BuildError(
            f"{backend.module.__name__} {backend.version}: no builder ({reason})", fix="Check the driver with nvidia-smi."
        ) from e


def _configure(backend: Backend, builder: Any, network: Any, request: BuildRequest) -> Any:
    trt = backend.module
    builder_config = builder.create_builder_config()
    builder_config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    builder_config.builder_optimization_level = request.opt_level
    if request.workspace_gib is not None:
        builder_config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(request.workspace_gib * 2**30))
    if not request.tf32:
        builder_config.clear_flag(trt.BuilderFlag.TF32)
    if request.hardware_compatible and backend.name != "rtx":  # RTX engines run on all of `targets` as they are
        builder_config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if request.version_compatible:
        builder_config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if (sharing := backend.find("PreviewFeature.PROFILE_SHARING_0806")) is not None:  # later versions always share
        builder_config.set_preview_feature(sharing, True)  # several contexts, one for each stream and batch size, on one profile
    graph_inputs = {tensor.name: tuple(tensor.shape) for tensor in inputs(network)}
    if not request.profiles and any(-1 in shape for shape in graph_inputs.values()):
        raise BuildError(f"profiles: none given, and {graph_inputs} has dynamic sizes (-1)", fix="Give batch.min, batch.opt and batch.max.")
    for ranges in request.profiles:
        _add_profile(builder, builder_config, graph_inputs, ranges)
    if request.calibrator is not None:
        builder_config.int8_calibrator = request.calibrator
        batch = request.calibrator.get_batch_size()
        profile = builder.create_optimization_profile()
        for name, shape in graph_inputs.items():
            profile.set_shape(name, *[(batch, *shape[1:])] * 3)
        builder_config.set_calibration_profile(profile)
    return builder_config


def _add_profile(builder: Any, builder_config: Any, graph_inputs: Mapping[str, Shape], ranges: Profile) -> None:
    if set(ranges) != set(graph_inputs):
        raise BuildError(
            f"profile for {sorted(ranges)}: the graph's inputs are {sorted(graph_inputs)}", fix="Give a shape range for each input."
        )
    profile = builder.create_optimization_profile()
    for name, (smallest, optimal, largest) in ranges.items():
        graph = graph_inputs[name]
        fits = {len(smallest), len(optimal), len(largest)} == {len(graph)} and all(
            0 < low <= middle <= high and size in (-1, low) and size in (-1, high)
            for size, low, middle, high in zip(graph, smallest, optimal, largest)
        )
        if not fits:
            raise BuildError(
                f"profile of {name}: {smallest} <= {optimal} <= {largest} does not fit the graph's {graph} (-1 is dynamic)",
                fix="Use min <= opt <= max, and the graph's own sizes where they are fixed.",
            )
        profile.set_shape(name, smallest, optimal, largest)
    if builder_config.add_optimization_profile(profile) < 0:
        raise BuildError(f"profile {dict(ranges)}: TensorRT rejects it", fix="Use another range.")


def _build(backend: Backend, builder: Any, network: Any, builder_config: Any, request: BuildRequest, progress: Progress) -> Any:
    with progress.bar(f"TensorRT {request.precision}", total=1.0) as advance:
        if backend.has_progress_monitor:
            # builder_config keeps no reference of its own on every version, so `monitor` must outlive the call
            monitor = make_monitor(backend.module, backend.logger, advance)
            builder_config.progress_monitor = monitor
        serialized = builder.build_serialized_network(network, builder_config)
    for failure in (backend.logger.failure, getattr(request.calibrator, "failure", None)):
        if failure is not None:  # kept by a callback, which could not raise through TensorRT
            raise failure
    if serialized is None:
        raise BuildError(
            f"{pathlib.Path(request.onnx_path).name} as {request.precision}: {backend.logger.explain()}",
            fix="See TensorRT's reason above; a smaller batch.max or another opt_level may build.",
        )
    return serialized


def _load_timing_cache(backend: Backend, builder_config: Any, request: BuildRequest, progress: Progress) -> tuple[pathlib.Path | None, Any]:
    if request.timing_cache is None or backend.gpu is None or not backend.has_timing_cache:
        return None, None
    gpu = backend.gpu.name.replace(" ", "-").replace("/", "-")
    path = pathlib.Path(request.timing_cache) / f"timing-{backend.version}-{gpu}.cache"
    timing_cache = builder_config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if not builder_config.set_timing_cache(timing_cache, False):
        progress.warn(f"{path}: TensorRT does not accept it (another driver?); timing anew")
        timing_cache = builder_config.create_timing_cache(b"")
        builder_config.set_timing_cache(timing_cache, False)
    return path, timing_cache


def _require_writable(plan_path: pathlib.Path) -> None:
    try:  # before the build: some take minutes
        plan_path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=plan_path.parent):
            pass
    except OSError as e:
        raise BuildError(f"{plan_path}: cannot be written ({e.strerror})", fix="Choose a writable --workdir.") from e


def _write(path: pathlib.Path, data: Any) -> None:
    try:
        with atomic(path) as temporary:
            temporary.write_bytes(data)
    except OSError as e:
        raise BuildError(f"{path}: cannot be written ({e.strerror})", fix="Choose a writable --workdir.") from e


def request_record(request: BuildRequest) -> dict[str, Any]:
    """The part of a sidecar that says what was asked for: an engine whose sidecar holds the same need not be built again."""
    return {
        "vit_convert": vit_convert.__version__,
        "precision": request.precision,
        "profiles": [{name: [list(shape) for shape in shapes] for name, shapes in ranges.items()} for ranges in request.profiles],
        "onnx": {"path": pathlib.Path(request.onnx_path).name, **graph_hashes(request.onnx_path)},
        "preprocessing": dict(request.preprocessing),
        "options": {
            "workspace_gib": request.workspace_gib,
            "opt_level": request.opt_level,
            "tf32": request.tf32,
            "keep_fp32": list(request.keep_fp32),
            "hardware_compatible": request.hardware_compatible,
            "version_compatible": request.version_compatible,
            "calibrator": request.calibrator.algorithm if request.calibrator is not None else None,
        },
    }


def _record(backend: Backend, network: Any) -> dict[str, Any]:
    def tensors(found: list[Any]) -> list[dict[str, Any]]:
        return [{"name": tensor.name, "dtype": DTYPES[tensor.dtype.name], "shape": list(tensor.shape)} for tensor in found]

    return {
        "backend": backend.name,
        "version": backend.version,
        "targets": backend.targets,
        "gpu": dataclasses.asdict(backend.gpu) if backend.gpu else None,
        "inputs": tensors(inputs(network)),
        "outputs": tensors([network.get_output(i) for i in range(network.num_outputs)]),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
