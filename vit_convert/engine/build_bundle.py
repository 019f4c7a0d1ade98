"""Builds the engines of a bundle, on an export host or a GPU host: selects graph, profiles and options for each
precision."""

import dataclasses
import pathlib
from collections.abc import Sequence

import ml_collections

from vit_convert.core import chosen_lowering
from vit_convert.core import config as configs
from vit_convert.core.bundle import Bundle, read_json
from vit_convert.core.dialect import Dialect
from vit_convert.core.engine_results import EngineSummary
from vit_convert.core.errors import BuildError, UnbuildableError
from vit_convert.engine.backend.graph_file import GraphFile
from vit_convert.engine.backend.sidecar import Asked, InsteadOf, Sidecar, check_sidecar, write_sidecar
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.builder.build import build_engine
from vit_convert.engine.builder.calibrator import bundle_calibrator
from vit_convert.engine.builder.request import BuildRequest
from vit_convert.engine.handoff import require_graph_of
from vit_convert.engine.host import EngineHost
from vit_convert.engine.memory_guard import guard
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
        return bundle.lowering(f"{int8_lowering}.int8")  # written by calibration
    if dialect.builds_from_lowerings(precision):
        return bundle.lowering(lowering) if lowering else bundle.onnx()
    return bundle.onnx("fp32" if calibrator else precision)


def request_for(host: EngineHost, precision: str) -> BuildRequest:
    """What to build for one precision, apart from a calibrator.

    Args:
        host: whose bundle holds the graphs.
        precision: of the engine.

    Returns:
        The request.
    """
    bundle, config, facts = host.bundle, host.config, host.facts
    options, unquantized = config.engine, _unquantized(host, precision)
    return BuildRequest(
        onnx_path=graph_for(
            bundle,
            precision,
            facts.dialect,
            calibrator=_asks_for_calibrator(config, precision),
            lowering=chosen_lowering.lowering(config, facts.lowering),
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
        model=facts.files.graph_hashes(bundle.onnx()) or None,
    )


def _unquantized(host: EngineHost, precision: str) -> str:
    """The lowering without Q/DQ that an int8 engine is built from; "" for other engines."""
    facts = host.facts
    return chosen_lowering.int8_lowering(host.config, facts.dialect, facts.int8_lowering) if precision == "int8" else ""


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


def build_bundle(host: EngineHost, *, precisions: Sequence[str], force: bool = False) -> list[EngineSummary]:
    """Builds one engine per precision, except those already built from the same graph by the same request.

    Args:
        host: whose bundle holds the graphs, and gets the engines.
        precisions: what to build, in order.
        force: rebuild existing engines, too.

    Returns:
        A summary of each engine, in the same order.

    Raises:
        BuildError: a graph does not parse, a precision would not be honoured, or TensorRT fails.
        CalibrationError: TensorRT's calibrator is asked for, but its images are missing or its cache belongs to
            something else.
    """
    return [_engine(host, precision, force=force) for precision in precisions]


def _engine(host: EngineHost, precision: str, *, force: bool) -> EngineSummary:
    """The engine of one precision, built or found."""
    _require_buildable(host, precision)
    request = request_for(host, precision)
    require_graph_of(host.facts, request.onnx_path)
    guard(host, request)
    if _asks_for_calibrator(host.config, precision):
        request = dataclasses.replace(request, calibrator=bundle_calibrator(host, request))
    plan = host.plan(precision)
    known = None if force else _fitting(host.backend, plan)
    advised = host.config.engine.lowering == configs.AUTO and not request.ranges  # the user asked for these by name
    if advised and pathlib.Path(request.onnx_path).parent == host.bundle.lowerings:
        found = _build_advised(host, request, plan, known)
    else:
        found = _build(host, request, plan, known)
    return dataclasses.replace(found, path=host.in_bundle(plan))


def _require_buildable(host: EngineHost, precision: str) -> None:
    """Refuses a precision for which these graphs need a builder flag, but this TensorRT a typed graph."""
    backend, facts = host.backend, host.facts
    calibrator = _asks_for_calibrator(host.config, precision)
    by_flags = not backend.strongly_typed or (calibrator and backend.has_calibrator)
    if facts.dialect.precision_by_flag and precision != "fp32" and not by_flags:
        here, target = f"{backend.module.__name__} {backend.version}", backend.dialect.name
        raise BuildError(
            f"{precision}: {host.bundle.root.name} has graphs for {facts.dialect.name}, whose precision is a flag; "
            f"{here} builds typed graphs only",
            fix=f"Build with TensorRT 8, or convert again with --config.target={target}.",
        )


def _fitting(backend: Backend, plan: pathlib.Path) -> Sidecar | None:
    """The sidecar of an existing engine that this host would build in the same way; None if there is none."""
    try:
        sidecar = check_sidecar(plan, backend)
    except BuildError:
        return None
    if backend.gpu is not None and backend.name != "rtx" and (sidecar.gpu or {}).get("name") != backend.gpu.name:
        return None  # it also runs here, but its kernels were chosen on another GPU
    return sidecar


def _summary(known: Sidecar | None, request: BuildRequest) -> EngineSummary | None:
    """The summary of an existing engine, if it was built by this request."""
    same = known is not None and Asked.part_of(known).to_dict() == request.asked.to_dict()
    return known.summary if known is not None and same else None


def _build(host: EngineHost, request: BuildRequest, plan: pathlib.Path, known: Sidecar | None) -> EngineSummary:
    """Builds an engine unless it exists."""
    found = _summary(known, request)
    if found is None:
        return build_engine(host.backend, request, plan, progress=host.progress)
    if known is not None and request.instead_of is not None:
        write_sidecar(plan, dataclasses.replace(known, instead_of=request.instead_of))
    return found


def _build_advised(host: EngineHost, request: BuildRequest, plan: pathlib.Path, known: Sidecar | None) -> EngineSummary:
    """Builds an engine from the lowering that engine.lowering=auto chose, or from the next one, and at last model.onnx,
    if that does not build here.

    The sidecar records what could not be built, and why: finding that out may have taken minutes.
    """
    advised, kept = request.asked.onnx, known.instead_of if known else None
    others = [dataclasses.replace(request, onnx_path=path) for path in _instead_of_advised(host, request)]
    if kept is not None and kept.onnx == advised:
        for other in others:
            if (found := _summary(known, other)) is not None:
                what = f"{request.precision} was built from {_graph_name(other)} instead"
                host.progress.warn(f"{kept.reason}; {what}, --force tries again")
                return found
    reasons: list[str] = []
    for tried, following in zip((request, *others), others):
        try:
            return _build(host, _in_place_of(tried, advised, reasons), plan, known)
        except UnbuildableError as e:
            reasons.append(str(e).rstrip("."))
            host.progress.warn(f"{reasons[-1]}; {request.precision} is built from {_graph_name(following)} instead")
    return _build(host, _in_place_of(others[-1], advised, reasons), plan, known)


def _instead_of_advised(host: EngineHost, request: BuildRequest) -> list[pathlib.Path]:
    """The graphs that an advised lowering gives way to, in order: the attention plugin where it was written beside one
    that needs our kernels, and model.onnx."""
    plugin = host.bundle.lowering(host.facts.dialect.fp16_lowering)
    written = plugin != request.onnx_path and plugin in host.facts.files
    return [*([plugin] if written else []), host.bundle.onnx()]


def _in_place_of(request: BuildRequest, advised: GraphFile, reasons: Sequence[str]) -> BuildRequest:
    """The request with why it is not for the advised graph."""
    instead_of = InsteadOf(onnx=advised, reason="; ".join(reasons))
    return dataclasses.replace(request, instead_of=instead_of) if reasons else request


def _graph_name(request: BuildRequest) -> str:
    return pathlib.Path(request.onnx_path).name
