"""Which engine to use: the one place that conversions, the commands on a GPU host, sessions and serving ask.

Only proved engines are recommended (`core/proof.py`). If there is a benchmark, it decides; before that, the smallest
proved unquantized engine is recommended.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from vit_convert.core.benchmark_results import BenchmarkRow, Recommendation, SpeedComparison
from vit_convert.core.check_results import GraphCheck, Verdict
from vit_convert.core.config import QUANTIZED
from vit_convert.core.engine_results import EngineSummary, Proof, RecommendedEngine
from vit_convert.core.proof import UNQUANTIZED, doubt

RESIDENT = "none: images and results stay in GPU memory"  # `transfers` of the rows that are compared


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is known about a bundle's engines before they are measured.

    Attributes:
        verified: by path, the result of `verify` for the engine.
        checks: by precision, the conversion's check of its graph.
        verdicts: by quantized precision.
        tf32: whether fp32 engines may round to TF32.
    """

    verified: Mapping[str, Proof]
    checks: Mapping[str, GraphCheck]
    verdicts: Mapping[str, Verdict]
    tf32: bool = False


def engine_of(
    recommended: Recommendation | None, backend: str, version: str, engines: Sequence[EngineSummary]
) -> RecommendedEngine | None:
    """The engine that a benchmark recommends; None if it recommends none, or one that does not exist.

    Args:
        recommended: by `recommend_measured`.
        backend: the measured one.
        version: of that backend.
        engines: of the bundle.
    """
    if recommended is None or not recommended.precision:
        return None
    chosen = (recommended.precision, backend, version)
    found = [row for row in engines if (row.precision, row.backend, row.version) == chosen]
    return _because(found[-1], recommended.reason) if found else None


def recommend_unmeasured(engines: Sequence[EngineSummary], evidence: Evidence) -> RecommendedEngine | None:
    """The engine to use before a benchmark: the smallest proved unquantized one. A quantized one must first prove to be
    faster.

    Args:
        engines: of the bundle.
        evidence: what is known about them.

    Returns:
        The engine; None if none is proved.
    """
    doubts: list[str] = []
    for precision in UNQUANTIZED:
        for engine in (row for row in engines if row.precision == precision):
            found = evidence.verified.get(engine.path)
            tf32 = evidence.tf32 and precision == "fp32"
            if reason := doubt(precision, engine.graph, found, evidence.checks, lowered=tf32):
                doubts.append(reason)
                continue
            why = (
                "verified against JAX"
                if found
                else "its graph was checked against JAX; `verify` on its GPU proves the engine itself"
            )
            verdicts = [evidence.verdicts[row.precision] for row in engines if row.precision in evidence.verdicts]
            return _because(engine, "; ".join(dict.fromkeys([why, *doubts, *map(_text, verdicts)])))
    return None


def _because(engine: EngineSummary, reason: str) -> RecommendedEngine:
    fields = {field.name: getattr(engine, field.name) for field in dataclasses.fields(EngineSummary)}
    return RecommendedEngine(**fields, recommended_because=reason)


def _text(verdict: Verdict) -> str:
    faith = "" if verdict.accurate is False else ", and it has to prove itself faster in a benchmark on your GPU first"
    return f"{verdict.text}{faith}"


def recommend_measured(
    rows: Sequence[BenchmarkRow], verified: Mapping[str, Proof], *, min_gain: float
) -> Recommendation:
    """Judges the measured precisions.

    A quantized engine is recommended if it passed its check and is faster than the best unquantized one at every batch,
    by more than the noise of the two measurements and by more than `min_gain`.

    Args:
        rows: of the benchmark.
        verified: by precision, of the engines that were verified.
        min_gain: `benchmark.min_gain`: the gain in percent that is worth a quantized model's risk.

    Returns:
        The recommendation; its precision is "" if no engine passed its check, or none was verified.
    """
    best = {
        (row.precision, row.batch): row
        for row in sorted(rows, key=lambda row: row.images_per_second)
        if row.transfers == RESIDENT
    }
    measured = list(dict.fromkeys(precision for precision, _ in best))
    passed = [name for name in measured if name in verified and verified[name].passed]
    plain = _fastest([name for name in passed if name in UNQUANTIZED], best)
    comparisons: list[SpeedComparison] = []
    reasons: list[str] = []
    chosen = plain
    for precision in (name for name in measured if name in QUANTIZED):
        if precision not in passed:
            reasons.append(
                f"{precision} did not pass its check" if precision in verified else f"{precision} was not verified"
            )
        if not plain:
            continue
        found = [
            _compare(best[precision, batch], best[plain, batch], min_gain)
            for name, batch in sorted(best)
            if name == precision and (plain, batch) in best
        ]
        comparisons += found
        accuracy = _accuracy(verified, precision, plain)
        slower = [row for row in found if not row.pays]
        if slower:
            worst = min(slower, key=lambda row: row.ratio)
            where = f"{plain} at batch {worst.batch}{_too_little(worst)}"
            reasons.append(f"{precision} runs at {worst.ratio:.2f}x of {where}{accuracy}")
        elif found and precision in passed:
            gain = min(row.ratio for row in found)
            reasons.append(f"{precision} is at least {gain:.2f}x as fast as {plain}{accuracy}")
            chosen = precision
    if not any(precision in verified for precision in measured):
        reasons = [f"none of {', '.join(measured)} was verified: verify, then benchmark again"]
    elif not chosen:
        reasons.insert(
            0, "no unquantized engine passed its check, to compare with" if passed else "no engine passed its check"
        )
    return Recommendation(
        precision=chosen,
        reason="; ".join(reasons) or "the fastest that passed its check",
        top1=verified[chosen].top1 if chosen in verified else None,
        comparisons=tuple(comparisons),
    )


def _compare(row: BenchmarkRow, against: BenchmarkRow, min_gain: float) -> SpeedComparison:
    known = [part.noise_percent for part in (row, against) if part.noise_percent is not None]
    noise = max(known) if len(known) == 2 else None  # a single pass says nothing about its own noise
    ratio = row.images_per_second / against.images_per_second
    return SpeedComparison(
        precision=row.precision,
        against=against.precision,
        batch=row.batch,
        ratio=round(ratio, 4),
        noise_percent=noise,
        pays=noise is not None and ratio > 1 + max(min_gain, noise) / 100,
    )


def _too_little(comparison: SpeedComparison) -> str:
    """Why a gain does not pay; "" without a gain."""
    if comparison.ratio <= 1:
        return ""
    if comparison.noise_percent is None:
        return ", by only one pass"
    within = comparison.ratio <= 1 + comparison.noise_percent / 100
    return (
        f", within the noise of {comparison.noise_percent:g} %" if within else ", which is less than benchmark.min_gain"
    )


def _fastest(precisions: Sequence[str], best: Mapping[tuple[str, int], BenchmarkRow]) -> str:
    """The fastest of some precisions at the largest batch at which all were measured; "" if there are none."""
    batches = {precision: {batch for name, batch in best if name == precision} for precision in precisions}
    common = max(set.intersection(*batches.values()), default=0) if batches else 0
    return max(precisions, key=lambda name: best[name, common or max(batches[name])].images_per_second, default="")


def _accuracy(verified: Mapping[str, Proof], precision: str, plain: str) -> str:
    ours, theirs = (verified[name].top1 if name in verified else None for name in (precision, plain))
    if ours is None or theirs is None:
        return ""
    return f" (top-1 {ours:.2f} % against {theirs:.2f} %)"
