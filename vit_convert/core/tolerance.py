"""The policy by which graphs and engines are judged against JAX; all its numbers are in `config.check`."""

import ml_collections

from vit_convert.core.compare import Tolerance
from vit_convert.core.config import QUANTIZED
from vit_convert.core.similarity import RECALL, Ranking

_FP32_GRAPHS = ("fp32", "smooth")  # SmoothQuant moves scales between fp32 weights and does not change results


def judges_blocks(precision: str) -> bool:
    """Whether every block must meet the tolerance; for a lower precision, only the output is judged, and blocks are
    just reported."""
    return precision in _FP32_GRAPHS


def tolerance_for(
    config: ml_collections.ConfigDict, precision: str, *, engine: bool = False, tf32: bool = False
) -> Tolerance:
    """The tolerance of a precision against JAX in float32.

    Args:
        config: the full config; `check` holds the numbers.
        precision: of the graph or engine; "smooth" for the fp32 graph after SmoothQuant.
        engine: whether it is an engine: TensorRT sums in an order different from JAX's and onnxruntime's.
        tf32: whether an engine may round fp32 products to TF32, which has fp16's mantissa.

    Returns:
        The tolerance; a lower precision is judged by its cosine.

    Example:
        >>> from vit_convert.config import default_config
        >>> str(tolerance_for(default_config(), "fp16"))
        'cosine >= 0.999'
    """
    check = config.check
    if precision in _FP32_GRAPHS and not tf32:
        return Tolerance(check.atol, check.engine_rtol if engine else check.rtol, check.cosine)
    return Tolerance(0.0, float("inf"), check.int8_cosine if precision in QUANTIZED else check.fp16_cosine)


def top1_miss(config: ml_collections.ConfigDict, top1: float, top1_of_jax: float) -> str:
    """What is wrong with a top-1, in words; "" if it is at most `check.max_top1_drop` points below JAX's.

    Args:
        config: the full config.
        top1: in percent.
        top1_of_jax: on the same images, in percent.

    Example:
        >>> from vit_convert.config import default_config
        >>> top1_miss(default_config(), 95.4, 96.6)
        "top-1 is 95.40 %, 1.20 points below JAX's 96.60 %; allowed 1"
    """
    drop, allowed = top1_of_jax - top1, config.check.max_top1_drop
    return (
        ""
        if drop <= allowed
        else f"top-1 is {top1:.2f} %, {drop:.2f} points below JAX's {top1_of_jax:.2f} %; allowed {allowed:g}"
    )


def agreement_miss(config: ml_collections.ConfigDict, precision: str, agreement: float | None, num_images: int) -> str:
    """What is wrong with the share of images on which an engine's first class is JAX's, in words; "" if it is high
    enough.

    Args:
        config: the full config; `check.min_agreement` is in percent.
        precision: of the engine; a quantized one is judged by its top-1 instead.
        agreement: in percent; None if JAX's own predictions are unknown.
        num_images: number of images compared.
    """
    needed = config.check.min_agreement
    if precision in QUANTIZED or agreement is None or agreement >= needed:
        return ""
    return f"agrees with JAX on {agreement:.2f} % of {num_images} images; needed {needed:g} %"


def allowed_similarity_error(config: ml_collections.ConfigDict, precision: str, *, engine: bool = False) -> float:
    """How far the cosine of an image and a text may be from JAX's.

    Args:
        config: the full config of the pair; `check` holds the numbers.
        precision: of the pair: the lower one of its towers.
        engine: see `tolerance_for`.

    Example:
        >>> from vit_convert.config import default_config
        >>> allowed_similarity_error(default_config(), "fp16")
        0.01
    """
    check = config.check
    if judges_blocks(precision):
        rtol: float = check.engine_rtol if engine else check.rtol
        return rtol + check.atol  # relative to the largest possible cosine
    found: float = check.int8_similarity if precision in QUANTIZED else check.fp16_similarity
    return found


def similarity_misses(
    config: ml_collections.ConfigDict, precision: str, found: Ranking, *, judges_ranks: bool, engine: bool = False
) -> list[str]:
    """What is wrong with the similarities of a pair of graphs or engines, in words; [] if they are close enough.

    Args:
        config: the full config of the pair; `check` holds the numbers.
        precision: of the pair: the lower one of its towers.
        found: from `compare_rankings`.
        judges_ranks: whether the images and texts are the user's, so that their ranking is meaningful.
        engine: whether engines are judged, see `tolerance_for`.

    Example:
        >>> from vit_convert.config import default_config
        >>> found = Ranking(1000, 10, 0.02, 2.0, 0.1, 99.5, 100.0)
        >>> similarity_misses(default_config(), "fp16", found, judges_ranks=True)
        ['the cosine of an image and a text is off by 0.02; allowed 0.01']
    """
    check, quantized = config.check, precision in QUANTIZED
    allowed, misses = allowed_similarity_error(config, precision, engine=engine), []
    if not found.max_cosine_error <= allowed:
        misses.append(f"the cosine of an image and a text is off by {found.max_cosine_error:.3g}; allowed {allowed:g}")
    if not judges_ranks:
        return misses
    needed = check.int8_agreement if quantized else check.min_agreement
    if found.top1 < needed:
        misses.append(
            f"puts JAX's first text first for {found.top1:.2f} % of {found.images} images; needed {needed:g} %"
        )
    if found.recall < check.min_recall:
        among = f"JAX's first text is among the first {RECALL} for {found.recall:.2f} % of {found.images} images"
        misses.append(f"{among}; needed {check.min_recall:g} %")
    return misses
