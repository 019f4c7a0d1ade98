"""Which lowerings a config's engines are built from: the names that it gives, or what the export advises."""

from collections.abc import Sequence

import ml_collections

from vit_convert.core.config import AUTO, is_planned, may_be_lowered, precisions
from vit_convert.core.dialect import Dialect


def lowering(config: ml_collections.ConfigDict, advised: str) -> str:
    """The lowering that fp16 engines are built from; "" for model.onnx.

    Args:
        config: the full config.
        advised: what `engine.lowering=auto` stands for, unless blocks are to stay in fp32 or the engine is to run
            elsewhere too: the attention plugin is fp16 everywhere, and belongs to one version and GPU.
    """
    if config.engine.lowering != AUTO:
        return config.engine.lowering
    return advised if _may_be_advised(config) else ""


def lowerings(config: ml_collections.ConfigDict, advised: Sequence[str], advised_int8: str = "") -> list[str]:
    """The lowerings written beside model.onnx: those asked for, and those that engines may be built from.

    Args:
        config: the full config.
        advised: what `engine.lowering=auto` stands for, see `lowering`, and what it gives way to.
        advised_int8: what `engine.int8_lowering=auto` stands for, see `int8_lowering`.
    """
    used = lowering(config, next(iter(advised), ""))
    names = (
        *config.lowerings,
        *(advised if used and config.engine.lowering == AUTO else (used,)),
        _int8_lowering(config, advised_int8),
    )
    return list(dict.fromkeys(name for name in names if name))


def int8_lowering(config: ml_collections.ConfigDict, dialect: Dialect, advised: str = "") -> str:
    """The lowering without Q/DQ that int8 engines of a dialect are built from; "" for the Q/DQ graph.

    Args:
        config: the full config.
        dialect: of the graphs.
        advised: what `engine.int8_lowering=auto` stands for where a plan is asked for and nothing forbids it.
    """
    found = _int8_lowering(config, advised)
    return found if found in dialect.int8_lowerings else ""


def _int8_lowering(config: ml_collections.ConfigDict, advised: str) -> str:
    if "int8" not in precisions(config):
        return ""
    if config.engine.int8_lowering != AUTO:
        return config.engine.int8_lowering
    return advised if is_planned(config) and may_be_lowered(config) and _may_be_advised(config) else ""


def _may_be_advised(config: ml_collections.ConfigDict) -> bool:
    """Whether "auto" may stand for a lowering: all of it is fp16 or int8, and it belongs to one version and GPU."""
    return not (config.keep_fp32 or config.engine.version_compatible or config.engine.hardware_compatible)
