"""Which engine to use: the fastest that passed its check, and why a lower precision that does not pay is not
recommended."""

from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.core.config import QUANTIZED
from vit_convert.core.proof import UNQUANTIZED
from vit_convert.engine.measure.benchmark import RESIDENT

_LEAST_GAIN = 1.01  # a smaller one is not worth a quantized model's risk, even where the noise is smaller still


def recommend(rows: Sequence[Mapping[str, Any]], verified: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Judges the measured precisions.

    A quantized engine is recommended if it passed its check and is faster than the best unquantized one at every batch,
    by more than the noise of the two measurements.

    Args:
        rows: of the benchmark.
        verified: by precision, {"passed", "top1" (None without labels)} of the engines that were verified.

    Returns:
        {"precision", "reason", "top1" (of that engine in percent, or None), "comparisons": [{precision, against, batch,
        ratio, noise_percent, pays}]}; precision "" if no engine passed its check, or none was verified.
    """
    best = {
        (row["precision"], row["batch"]): row
        for row in sorted(rows, key=lambda row: row["images_per_second"])
        if row["transfers"] == RESIDENT
    }
    measured = list(dict.fromkeys(precision for precision, _ in best))
    passed = [precision for precision in measured if verified.get(precision, {}).get("passed") is True]
    plain = _fastest([precision for precision in passed if precision in UNQUANTIZED], best)
    comparisons: list[dict[str, Any]] = []
    reasons: list[str] = []
    chosen = plain
    for precision in (p for p in measured if p in QUANTIZED):
        if precision not in passed:
            reasons.append(
                f"{precision} did not pass its check" if precision in verified else f"{precision} was not verified"
            )
        if not plain:
            continue
        found = [
            _compare(best[precision, batch], best[plain, batch])
            for name, batch in sorted(best)
            if name == precision and (plain, batch) in best
        ]
        comparisons += found
        slower = [row for row in found if not row["pays"]]
        if slower:
            worst = min(slower, key=lambda row: row["ratio"])
            where = f"{plain} at batch {worst['batch']}{_too_little(worst)}"
            reasons.append(
                f"{precision} runs at {worst['ratio']:.2f}x of {where}{_accuracy(verified, precision, plain)}"
            )
        elif found and precision in passed:
            gain = min(row["ratio"] for row in found)
            reasons.append(
                f"{precision} is at least {gain:.2f}x as fast as {plain}{_accuracy(verified, precision, plain)}"
            )
            chosen = precision
    if not any(precision in verified for precision in measured):
        reasons = [f"none of {', '.join(measured)} was verified: verify, then benchmark again"]
    elif not chosen:
        reasons.insert(
            0, "no unquantized engine passed its check, to compare with" if passed else "no engine passed its check"
        )
    reason = "; ".join(reasons) or "the fastest that passed its check"
    return {
        "precision": chosen,
        "reason": reason,
        "top1": verified.get(chosen, {}).get("top1"),
        "comparisons": comparisons,
    }


def _compare(row: Mapping[str, Any], against: Mapping[str, Any]) -> dict[str, Any]:
    known = [part["noise_percent"] for part in (row, against) if part["noise_percent"] is not None]
    noise = max(known) if len(known) == 2 else None  # one pass does not tell how far it can be trusted
    ratio = row["images_per_second"] / against["images_per_second"]
    pays = noise is not None and ratio > max(_LEAST_GAIN, 1 + noise / 100)
    names = {"precision": row["precision"], "against": against["precision"], "batch": row["batch"]}
    return {**names, "ratio": round(ratio, 4), "noise_percent": noise, "pays": pays}


def _too_little(comparison: Mapping[str, Any]) -> str:
    """Why a gain does not pay; "" without a gain."""
    if comparison["ratio"] <= 1:
        return ""
    if comparison["noise_percent"] is None:
        return ", by only one pass"
    within = comparison["ratio"] <= 1 + comparison["noise_percent"] / 100
    return (
        f", within the noise of {comparison['noise_percent']:g} %"
        if within
        else ", too little for a quantized model's risk"
    )


def _fastest(precisions: Sequence[str], best: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
    """The fastest of some precisions at the largest batch that all of them were measured at, "" of none."""
    batches = {precision: {batch for name, batch in best if name == precision} for precision in precisions}
    common = max(set.intersection(*batches.values()), default=0) if batches else 0
    return max(precisions, key=lambda name: best[name, common or max(batches[name])]["images_per_second"], default="")


def _accuracy(verified: Mapping[str, Mapping[str, Any]], precision: str, plain: str) -> str:
    ours, theirs = (verified.get(name, {}).get("top1") for name in (precision, plain))
    if ours is None or theirs is None:
        return ""
    return f" (top-1 {ours:.2f} % against {theirs:.2f} %)"
