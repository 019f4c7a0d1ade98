"""Whether an engine is proved, and which one to use: the one place that reports, sessions and serving ask."""

from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.core.bundle import graph_name

UNQUANTIZED = ("fp16", "bf16", "fp32")  # the one to prefer first


def doubt(
    precision: str,
    graph: str,
    verification: Mapping[str, Any] | None,
    checks: Mapping[str, Mapping[str, Any]],
    *,
    lowered: bool = False,
) -> str:
    """Why an engine is not proved; "" if it is.

    What `verify` found for this engine decides. Before `verify` has run, the check of the graph that it was built from
    decides, if that graph has the engine's precision; a precision that is set by a builder flag is not proved then.

    Args:
        precision: of the engine.
        graph: name of the file that it was built from.
        verification: what `verify` found for this engine, {"passed", …}; None or empty if it has not run.
        checks: by precision, what the conversion's check of its graph found, {"passed", …}.
        lowered: whether the builder was free to compute in less than the graph's precision, for example in TF32.
    """
    if verification:
        return (
            ""
            if verification.get("passed") is True
            else f"{precision} missed its tolerance when the engine was verified"
        )
    if graph != graph_name(precision) or lowered:
        return f"{precision} is made of {graph} by a flag, so no check has seen it yet: verify the engine first"
    passed = checks.get(precision, {}).get("passed")
    if passed is True:
        return ""
    return f"{graph} did not pass its check against JAX" if passed is False else f"{graph} was not checked against JAX"


def recommend_unmeasured(
    engines: Sequence[Mapping[str, Any]],
    verified: Mapping[str, Mapping[str, Any]],
    checks: Mapping[str, Mapping[str, Any]],
    verdicts: Mapping[str, Mapping[str, Any]],
    *,
    lowered: bool = False,
) -> dict[str, Any]:
    """The engine to use before a benchmark: the smallest unquantized one that is proved. A quantized one has to prove
    itself faster first.

    Args:
        engines: rows of `build_bundle`.
        verified: by path, what `verify` found for the engine.
        checks: by precision, what the conversion's check of its graph found.
        verdicts: by quantized precision, {"text", "accurate"}.
        lowered: whether fp32 engines may round to TF32.

    Returns:
        Its row with "recommended_because"; {} if none is proved.
    """
    doubts: list[str] = []
    for precision in UNQUANTIZED:
        for engine in (row for row in engines if row["precision"] == precision):
            found = verified.get(engine["path"])
            tf32 = lowered and precision == "fp32"
            if reason := doubt(precision, engine["graph"], found, checks, lowered=tf32):
                doubts.append(reason)
                continue
            why = (
                "verified against JAX"
                if found
                else "its graph was checked against JAX; `verify` on its GPU proves the engine itself"
            )
            others = [_verdict(verdicts[row["precision"]]) for row in engines if row["precision"] in verdicts]
            return {**engine, "recommended_because": "; ".join(dict.fromkeys([why, *doubts, *others]))}
    return {}


def _verdict(verdict: Mapping[str, Any]) -> str:
    faith = (
        "" if verdict["accurate"] is False else ", and it has to prove itself faster in a benchmark on your GPU first"
    )
    return f"{verdict['text']}{faith}"
