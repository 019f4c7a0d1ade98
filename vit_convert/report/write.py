"""The report of a conversion, made from what its stages returned."""

import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence

from vit_convert.core.benchmark_results import Recommendation
from vit_convert.core.check_results import GraphCheck
from vit_convert.core.config import PRECISIONS
from vit_convert.core.engine_results import Proof
from vit_convert.core.manifest import Manifest, StageRecord
from vit_convert.core.pipeline import Context
from vit_convert.core.recommend import Evidence, engine_of, recommend_unmeasured
from vit_convert.core.results import Results
from vit_convert.core.stage_results import Calibration, Checkpoint, OnnxGraph, Reference
from vit_convert.core.version import __version__
from vit_convert.report.record import Report, StageRow, read_report, write


def write_report(context: Context, rows: Sequence[StageRecord], command: Sequence[str]) -> Report:
    """Gathers what the stages returned and writes `report.json`.

    Args:
        context: of the conversion, finished or failed.
        rows: of the pipeline, one per stage.
        command: the command line.

    Returns:
        The report.
    """
    report = make_report(context, rows, command)
    if all(row.status == "fresh" for row in report.stages) and not report.engines:
        report = _with_gpu_host(report, read_report(context.bundle))  # its graphs are the same
    write(context.bundle, report)
    return report


def make_report(context: Context, rows: Sequence[StageRecord], command: Sequence[str]) -> Report:
    """The report of a conversion, made only from what its stages returned."""
    results, manifest = context.results, Manifest.read(context.bundle)
    quantized, calibrated, exported = results.get("quantize"), results.get("calibrate"), results.get("export")
    checks = _checks(results)
    engines = results.build.engines if results.get("build") else ()
    verdicts = quantized.verdicts if quantized else {}
    verify, measured = results.get("verify"), results.get("benchmark")
    verified = {found.plan: Proof.of(found) for found in verify.engines.values()} if verify else {}
    evidence = Evidence(verified, checks, verdicts, tf32=context.config.engine.tf32)
    recommended: Recommendation | None = measured.recommended if measured else None
    engine = engine_of(recommended, measured.backend, measured.tensorrt, engines) if measured else None
    return Report(
        name=context.config.name,
        vit_convert=__version__,
        command=shlex.join(command),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        status="done" if all(row.finished for row in rows) else "failed",
        versions=manifest.versions,
        hashes=_hashes(context, manifest),
        checkpoint=Checkpoint.part_of(results.checkpoint) if results.get("checkpoint") else None,
        stages=tuple(StageRow.of(row) for row in rows),
        onnx=OnnxGraph.part_of(exported) if exported else None,
        reference=Reference.part_of(results.reference) if results.get("reference") else None,
        check=next(iter(checks.values()), None),
        checks=checks,
        max_abs_activation=quantized.max_abs_activation if quantized else None,
        calibration=Calibration.part_of(calibrated) if calibrated else None,
        sensitivity=results.get("sensitivity"),
        plan=results.get("plan"),
        accuracy=_accuracy(results, checks),
        verdicts=verdicts,
        engines=engines,
        engine=engine or recommend_unmeasured(engines, evidence),
        benchmark=measured.rows if recommended else (),
        verify=verify,
        recommended=recommended,
        roofline=measured.roofline if recommended else None,
    )


def _checks(results: Results) -> dict[str, GraphCheck]:
    """Each graph that was checked, fp32 first."""
    quantized = results.get("quantize")
    checks = [*([results.check] if results.get("check") else []), *(quantized.checks.values() if quantized else ())]
    return {check.precision: check for check in checks}


def _hashes(context: Context, manifest: Manifest) -> dict[str, str]:
    """Of each graph that a finished stage left, and of its weights beside it."""
    found: dict[str, str] = {}
    for path in (context.bundle.onnx(precision) for precision in PRECISIONS):
        hashes = manifest.files.graph_hashes(path)
        names = {"sha256": path.name, "data_sha256": f"{path.name}.data"}
        found |= {names[key]: value for key, value in hashes.items()}
    return found


def _accuracy(results: Results, checks: Mapping[str, GraphCheck]) -> dict[str, float | None]:
    """Top-1 in percent, if measured: of JAX, and of each graph under onnxruntime."""
    accuracy: dict[str, float | None] = {"jax": results.reference.top1 if results.get("reference") else None}
    accuracy |= {"onnx" if precision == "fp32" else precision: check.top1 for precision, check in checks.items()}
    return accuracy | {"engine": results.verify.top1 if results.get("verify") else None}


def _with_gpu_host(report: Report, old: Report | None) -> Report:
    """Keeps what the commands on a GPU host added to an earlier report of the same graphs."""
    if old is None:
        return report
    kept = ("engine", "engines", "verify", "benchmark", "recommended", "roofline", "tuning")
    return dataclasses.replace(report, **{key: getattr(old, key) for key in kept})
