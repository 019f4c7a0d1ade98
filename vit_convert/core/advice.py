"""What usually helps when a graph or an engine misses its tolerance, without what the config does already."""

import ml_collections

from vit_convert.core.config import AUTO, QUANTIZED, is_planned

_DOCS = "docs/checks.md"


def advice(config: ml_collections.ConfigDict, precision: str, *, engine: bool = False) -> str:
    """What to try, one or two sentences.

    Args:
        config: the full config.
        precision: of the graph or engine that missed.
        engine: whether it is an engine; its graph may have passed.

    Example:
        >>> from vit_convert.config import default_config
        >>> advice(default_config(), "fp16", engine=True)
        'Keep the blocks of largest activation in fp32 (max_abs_activation in report.json, config.keep_fp32).'
    """
    if precision in QUANTIZED:
        return f"{_quantized(config, precision)} {_DOCS} has what each of them gained on a trained model."
    if not engine:
        return f"{_DOCS} says what usually causes it."
    if precision == "fp32":
        first = "Build without engine.tf32; if" if config.engine.tf32 else "Build it again; if"
        return f"{first} it still misses, this TensorRT computes something other than the graph."
    return "Keep the blocks of largest activation in fp32 (max_abs_activation in report.json, config.keep_fp32)."


def _quantized(config: ml_collections.ConfigDict, precision: str) -> str:
    """Advice for a quantized precision, best ratio of gain to cost first."""
    calibration, tries = config.calibration, []
    if precision == "int8" and calibration.method != "entropy":
        tries.append(f"config.calibration.method=entropy instead of {calibration.method}")
    if calibration.attention:
        tries.append("config.calibration.attention=False")
    if precision == "int8" and calibration.method == "entropy":
        tries.append(
            f"config.calibration.max_error below {calibration.max_error:g}, which leaves more products in fp16"
        )
    lowered = precision == "int8" and config.engine.int8_lowering not in (AUTO, "")
    if lowered and not is_planned(config):
        tries.append("a higher config.calibration.min_cosine, which leaves in fp16 what costs the output most")
    if is_planned(config):
        tries.append("a higher config.plan.cosine")
    elif config.engine.int8_lowering in (AUTO, ""):
        tries.append("config.precision=auto, which leaves the layers in fp16 that cost most")
    return f"Try {'; then '.join(tries)}." if tries else "Stay with fp16."
