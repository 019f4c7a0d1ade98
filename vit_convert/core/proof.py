"""What is proved of an engine, and which one to use: reports, sessions and serving all ask here."""

from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.core.bundle import graph_name

UNQUANTIZED = ("fp16", "bf16", "fp32")  # the one to prefer first


def doubt(
    precision: str, graph: str, verification: Mapping[str, Any] | None, checks: Mapping[str, Mapping[str, Any]], *, lowered: bool = False
) -> str:
    """Why an engine is not proved, "" where it is.

    What `verify` found of the very engine decides. Before it ran, an engine stands for the graph that it was built from, if that graph has
    the engine's precision and passed its own check against JAX; a precision that a builder's flag makes was seen by nobody then.

    Args:
        precision: of the engine.
        graph: name of the file that it was built from.
        verification: what `verify` found of this engine, {"passed", …}; None or empty where it was not run.
        checks: by precision, what the conversion's check of its graph found, {"passed", …}.
        lowered: whether the builder was free to compute in less than the graph says, as TF32 is.
    """
    if verification:
        return "" if verification.get("passed") is True else f"{precision} missed its tolerance when the engine was verified"
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
    """The engine to use as long as nothing was measured: the smallest unquantized one that is proved; a quantized one has to show its gain.

    Args:
        engines: rows of `build_bundle`.
        verified: by path, what `verify` found of the engine.
        checks: by precision, what the conversion's check of its graph found.
        verdicts: by quantized precision, {"text", "accurate"}.
        lowered: whether fp32 engines may round to TF32.

    Returns:
        Its row with "recommended_because"; {} where none is proved.
    """
    doubts: list[str] = []
    for precision in UNQUANTIZED:
        for engine in (row for row in engines if row["precision"] == precision):
            found = verified.get(engine["path"])
            tf32 = lowered and precision == "fp32"
            if reason := doubt(precision, engine["graph"], found, checks, lowered=tf32):
                doubts.append(reason)
                continue
            why = "verified against JAX" if found else "its graph was checked against JAX; `verify` on its GPU proves the engine itself"
            others = [_verdict(verdicts[row["precision"]]) for row in engines if row["precision"] in verdicts]
            return {**engine, "recommended_because": "; ".join(dict.fromkeys([why, *doubts, *others]))}
    return {}


def _verdict(verdict: Mapping[str, Any]) -> str:
    faith = "" if verdict["accurate"] is False else ", and it has to prove itself faster in a benchmark on your GPU first"
    return f"{verdict['text']}{faith}"
