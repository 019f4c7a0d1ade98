"""Adds the results of commands on a GPU host to the report of a conversion."""

import dataclasses
from collections.abc import Collection

from vit_convert.core.benchmark_results import BenchmarkResult
from vit_convert.core.engine_results import EngineSummary, Verification
from vit_convert.core.recommend import Evidence, engine_of, recommend_unmeasured
from vit_convert.report.record import Report


def with_engines(report: Report, built: Collection[EngineSummary], proved: Collection[str]) -> Report:
    """Adds engines that were built; each replaces the one that was in the same file.

    Args:
        report: before.
        built: the engines.
        proved: paths of those that were verified and not rebuilt since.
    """
    paths = {engine.path for engine in built}
    engines = (*(engine for engine in report.engines if engine.path not in paths), *built)
    gone = {engine.precision for engine in built if engine.path not in proved}
    known = report.verify.engines if report.verify else {}
    kept = {precision: found for precision, found in known.items() if precision not in gone}
    return dataclasses.replace(report, engines=engines, verify=Verification.of(kept) if kept else None)


def with_verification(report: Report, verify: Verification) -> Report:
    """Adds the results of verification; engines that it left out keep their earlier results."""
    engines = {**(report.verify.engines if report.verify else {}), **verify.engines}
    return _with_top1(dataclasses.replace(report, verify=Verification.of(engines)), verify.top1)


def with_benchmark(report: Report, measured: BenchmarkResult) -> Report:
    """Takes over the measurements, and the engine that they recommend, if any."""
    recommended = measured.recommended
    engine = engine_of(recommended, measured.backend, measured.tensorrt, report.engines)
    report = dataclasses.replace(
        report, benchmark=measured.rows, recommended=recommended, engine=engine, roofline=measured.roofline
    )
    return _with_top1(report, recommended.top1 if engine and recommended else None)


def with_recommendation(report: Report, evidence: Evidence) -> Report:
    """Sets the recommended engine: the benchmark's choice as long as it is proved, otherwise another proved one."""
    if report.recommended is not None and report.recommended.precision:
        precision = report.recommended.precision
        proof = evidence.verified.get(report.engine.path) if report.engine else None
        found = proof or (report.verify.engines.get(precision) if report.verify else None)
        if found is not None and found.passed:
            return report
        report = dataclasses.replace(report, recommended=None)  # it was rebuilt since, or missed its tolerance
    return dataclasses.replace(report, engine=recommend_unmeasured(report.engines, evidence))


def _with_top1(report: Report, top1: float | None) -> Report:
    return report if top1 is None else dataclasses.replace(report, accuracy={**report.accuracy, "engine": top1})
