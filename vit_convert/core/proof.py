"""Whether an engine is proved: the one place that reports, sessions and serving ask. For which engine to use, see
recommend.py."""

from collections.abc import Mapping

from vit_convert.core.bundle import graph_name
from vit_convert.core.check_results import GraphCheck
from vit_convert.core.engine_results import Proof

UNQUANTIZED = ("fp16", "bf16", "fp32")  # in order of preference


def doubt(
    precision: str,
    graph: str,
    verification: Proof | None,
    checks: Mapping[str, GraphCheck],
    *,
    lowered: bool = False,
) -> str:
    """Why an engine is not proved; "" if it is.

    The result of `verify` for this engine decides. Before `verify` has run, the check of the engine's graph decides,
    provided that the graph has the engine's precision; a precision set by a builder flag is then unproved.

    Args:
        precision: of the engine.
        graph: name of the file that it was built from.
        verification: the result of `verify` for this engine; None if it has not run.
        checks: by precision, the conversion's check of its graph.
        lowered: whether the builder was free to compute in less than the graph's precision, such as TF32.
    """
    if verification is not None:
        return "" if verification.passed else f"{precision} missed its tolerance when the engine was verified"
    if graph != graph_name(precision) or lowered:
        return f"{precision} is made from {graph} by a flag, so no check covers it yet: verify the engine first"
    if precision not in checks:
        return f"{graph} was not checked against JAX"
    return "" if checks[precision].passed else f"{graph} did not pass its check against JAX"
