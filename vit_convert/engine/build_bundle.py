"""Builds the engines of a bundle: which graph, profiles and options each precision gets, on an export host or a GPU
host."""

import dataclasses
import pathlib
from collections.abc import Sequence

import ml_collections

from vit_convert.core import config as configs
from vit_convert.core.bundle import Bundle, read_json
from vit_convert.core.dialect import Dialect
from vit_convert.core.engine_results import AttentionKernels, EngineSummary, ProfileKernels
from vit_convert.core.errors import BuildError, CalibrationError, ConvertError, UnbuildableError
from vit_convert.core.progress import Progress
from vit_convert.core.record import RecordError
from vit_convert.engine.backend.sidecar import add_to_sidecar, check_sidecar, read_sidecar
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.builder import layer_info
from vit_convert.engine.builder.build import build_engine
from vit_convert.engine.builder.calibrator import bundle_calibrator
from vit_convert.engine.builder.fused_kernels import fused_attention_by_kernels
from vit_convert.engine.builder.request import BuildRequest, request_record
from vit_convert.engine.bundle_engines import keep_model
from vit_convert.engine.handoff import Facts, require_graph_of
from vit_convert.engine.memory_guard import guard
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.profiles import batch_profiles


def graph_for(
    bundle: Bundle,
    precision: str,
    dialect: Dialect,
    *,
    calibrator: bool = False,
    lowering: str = "",
    int8_lowering: str = "",
) -> pathlib.Path:
    """Returns the ONNX file to build a precision from: its typed graph.

    Where a builder flag sets the precision (TensorRT 8), it is the fp32 graph, or for fp16 the chosen lowering of it.
    """
    if precision == "int8" and int8_lowering:
        return bundle.lowering(f"{int8_lowering}.int8")  # which calibration wrote
    if dialect.builds_from_lowerings(precision):
        return bundle.lowering(lowering) if lowering else bundle.onnx()
    return bundle.onnx("fp32" if calibrator else precision)


def request_for(bundle: Bundle, config: ml_collections.ConfigDict, facts: Facts, precision: str) -> BuildRequest:
    """What to build for one precision, but for a calibrator.

    Args:
        bundle: holds the graphs.
        config: the resolved config.
        facts: of the bundle.
        precision: of the engine.

    Returns:
        The request.
    """
    options, calibrator = config.engine, _asks_for_calibrator(config, precision)
    unquantized = configs.int8_lowering(config, facts.dialect) if precision == "int8" else ""
    return BuildRequest(
        onnx_path=graph_for(
            bundle,
            precision,
            facts.dialect,
            calibrator=calibrator,
            lowering=configs.lowering(config, facts.lowering),
            int8_lowering=unquantized,
        ),
        precision=precision,
        profiles=batch_profiles(facts.signature.inputs, facts.image_size, config.batch),
        workspace_gib=options.workspace_gib,
        opt_level=options.opt_level,
        timing_cache=pathlib.Path(options.timing_cache) if options.timing_cache else bundle.root / "timing",
        tf32=options.tf32,
        keep_fp32=tuple(config.keep_fp32),
        hardware_compatible=options.hardware_compatible,
        version_compatible=options.version_compatible,
        ranges=_ranges(bundle, unquantized) if unquantized else {},
        preprocessing=dict(facts.preprocess),
    )


def _ranges(bundle: Bundle, lowering: str) -> dict[str, float]:
    path = bundle.ranges(lowering)
    found = (read_json(path) or {}).get("thresholds", {})
    if not found:
        raise BuildError(
            f"{path}: no ranges for int8", fix=f"Convert again with --config.engine.int8_lowering={lowering}."
        )
    # A tensor that is zero on all calibration images has no range of its own.
    return {name: float(threshold) or 1.0 for name, threshold in found.items()}


def _asks_for_calibrator(config: ml_collections.ConfigDict, precision: str) -> bool:
    return precision == "int8" and config.engine.calibrator


def build_bundle(
    backend: Backend,
    bundle: Bundle,
    config: ml_collections.ConfigDict,
    facts: Facts,
    *,
    precisions: Sequence[str],
    progress: Progress,
    force: bool = False,
) -> list[EngineSummary]:
    """Builds one engine per precision, except those that are there already, built from the same graph by the same
    request.

    Args:
        backend: the TensorRT that builds.
        bundle: holds the graphs; gets the engines.
        config: the resolved config.
        facts: of the bundle.
        precisions: what to build, in order.
        progress: what people and machines see.
        force: build those that are there, too.

    Returns:
        A summary of each engine, in the same order.

    Raises:
        BuildError: a graph does not parse, a precision would not be honoured, or TensorRT fails.
        CalibrationError: TensorRT's calibrator is asked for, and its images are missing or its cache is another's.
    """
    engines = []
    for precision in precisions:
        calibrator = _asks_for_calibrator(config, precision)
        by_flags = not backend.strongly_typed or (calibrator and backend.has_calibrator)
        if facts.dialect.precision_by_flag and precision != "fp32" and not by_flags:
            here, target = f"{backend.module.__name__} {backend.version}", backend.dialect.name
            raise BuildError(
                f"{precision}: {bundle.root.name} has graphs for {facts.dialect.name}, whose precision is a flag; "
                f"{here} builds typed graphs only",
                fix=f"Build with TensorRT 8, or convert again with --config.target={target}.",
            )
        request = request_for(bundle, config, facts, precision)
        require_graph_of(facts, request.onnx_path)
        guard(backend, config, facts, request, progress)
        if calibrator:
            if wrong := facts.files.wrong(bundle.images("calibration")):
                raise CalibrationError(wrong, fix="Run the conversion's calibrate stage first.")
            request = dataclasses.replace(
                request, calibrator=bundle_calibrator(backend, bundle, config, request, progress)
            )
        plan = bundle.plan(backend.name, backend.version, backend.arch, precision)
        advised = config.engine.lowering == configs.AUTO and not request.ranges  # those were asked for by name
        if advised and pathlib.Path(request.onnx_path).parent == bundle.lowerings:
            found = _build_advised(backend, bundle, request, plan, force=force, progress=progress)
        else:
            found = _build(backend, bundle, request, plan, force=force, progress=progress)
        engines.append(dataclasses.replace(found, path=str(plan.relative_to(bundle.root))))
    return engines


def _build(
    backend: Backend, bundle: Bundle, request: BuildRequest, plan: pathlib.Path, *, force: bool, progress: Progress
) -> EngineSummary:
    found = None if force else _finished(backend, request, plan)
    if found is None:
        found = build_one(backend, request, plan, progress=progress)
        keep_model(bundle, plan)
    return found


def _build_advised(
    backend: Backend, bundle: Bundle, request: BuildRequest, plan: pathlib.Path, *, force: bool, progress: Progress
) -> EngineSummary:
    """Builds an engine from the lowering that engine.lowering=auto chose, or from model.onnx if that does not build
    here.

    The sidecar records what did not build, and why, as "instead_of": finding it out may have taken minutes.
    """
    plain, advised = dataclasses.replace(request, onnx_path=bundle.onnx()), request_record(request)["onnx"]
    kept = read_sidecar(plan).get("instead_of", {})
    if not force and kept.get("onnx") == advised and (found := _finished(backend, plain, plan)) is not None:
        progress.warn(
            f"{kept['reason']}; {request.precision} was built from {bundle.onnx().name} instead, --force tries again"
        )
        return found
    try:
        return _build(backend, bundle, request, plan, force=force, progress=progress)
    except UnbuildableError as e:
        reason = str(e).rstrip(".")
    progress.warn(f"{reason}; {request.precision} is built from {bundle.onnx().name} instead")
    found = _build(backend, bundle, plain, plan, force=force, progress=progress)
    add_to_sidecar(plan, instead_of={"onnx": advised, "reason": reason})
    return found


def build_one(backend: Backend, request: BuildRequest, plan: pathlib.Path, *, progress: Progress) -> EngineSummary:
    """Builds one engine and finds out whether its attention is fused.

    Args:
        backend: the TensorRT that builds.
        request: what to build.
        plan: where the engine goes.
        progress: what people and machines see.

    Returns:
        Its summary, which the sidecar keeps, too.

    Raises:
        BuildError: see `build_engine`.
    """
    result = build_engine(backend, request, plan, progress=progress)
    fused: AttentionKernels | None = None
    unknown = result.layers_missing
    if result.fused_attention is not None:
        fused = AttentionKernels(
            count=result.fused_attention.count,
            precisions=result.fused_attention.precisions,
            text=result.fused_attention.describe(result.attentions),
            source="engine inspector",
        )
    elif result.layers is not None:
        fused, unknown = _fused_by_kernels(backend, plan)
    int8_layers = (
        layer_info.count_int8(result.layers) if request.precision == "int8" and result.layers is not None else None
    )
    if int8_layers == 0:
        graph = pathlib.Path(request.onnx_path).name
        progress.warn(f"{graph} as int8: TensorRT shows none of its products in int8, so it may be an fp16 engine")
    summary = EngineSummary(
        backend=backend.name,
        version=backend.version,
        arch=backend.arch,
        precision=request.precision,
        graph=pathlib.Path(request.onnx_path).name,
        path=plan.name,
        bytes=result.num_bytes,
        build_seconds=round(result.seconds, 3),
        products=result.products,
        int8_layers=int8_layers,
        fused_attention=fused,
        fused_attention_unknown=unknown,
        warnings=tuple(result.warnings),
    )
    add_to_sidecar(plan, summary=summary.to_dict())
    return summary


def _fused_by_kernels(backend: Backend, plan: pathlib.Path) -> tuple[AttentionKernels | None, str]:
    """A summary's "fused_attention" read from the kernels' names, and why some or all of them do not tell."""
    try:
        profiles = fused_attention_by_kernels(Engine(backend, plan))
    except ConvertError as e:  # the engine is built; it is this look at it that found too little memory
        return None, str(e)
    unknown = next((row.unknown for row in profiles if row.unknown is not None), "")
    told = [row for row in profiles if row.count is not None]
    if not told:
        return None, unknown
    least = min(told, key=_count)  # one profile may fuse what another does not
    return AttentionKernels(
        count=_count(least),
        precisions=least.precisions or {},
        text=least.text or "",
        source="kernel names",
        profiles=tuple(profiles),
    ), unknown


def _count(row: ProfileKernels) -> int:
    return row.count or 0


def _finished(backend: Backend, request: BuildRequest, plan: pathlib.Path) -> EngineSummary | None:
    """The summary of an existing engine that was built by the same request, or None."""
    record = read_sidecar(plan)
    asked = request_record(request)
    if "summary" not in record or any(record.get(key) != value for key, value in asked.items()):
        return None
    if backend.gpu is not None and backend.name != "rtx" and record.get("gpu", {}).get("name") != backend.gpu.name:
        return None  # it runs here too, but its kernels were chosen on another GPU
    try:
        check_sidecar(plan, backend)
        return EngineSummary.from_dict(record["summary"])
    except (BuildError, RecordError):
        return None
