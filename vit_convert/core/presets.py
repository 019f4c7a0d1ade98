"""Presets for kinds of GPUs: values for keys that a config leaves at their defaults, and what such a GPU cannot do."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from vit_convert.core.defaults import default_config
from vit_convert.core.errors import UsageError, nearest


@dataclasses.dataclass(frozen=True)
class Preset:
    """One kind of GPU.

    Attributes:
        name: as in `config.engine.preset`.
        archs: its architectures; building on a GPU of another architecture is refused.
        memory_gib: of the smallest GPU of the kind.
        shared: whether the host uses the same memory.
        batch: `config.batch`, taken as a whole.
        workspace_gib: for `config.engine.workspace_gib`.
        batches: for `config.benchmark.batches`.
        missing: precisions that it cannot compute in.
        backend: for `config.engine.backend`; "" leaves that unchanged.
        dla: whether it also has deep learning accelerators.
    """

    name: str
    archs: tuple[str, ...]
    memory_gib: float
    batch: Mapping[str, Any]
    workspace_gib: float
    batches: tuple[int, ...]
    missing: tuple[str, ...] = ()
    shared: bool = False
    backend: str = ""
    dla: bool = False


def _batch(best: int, most: int, *profiles: int) -> dict[str, Any]:
    return {"min": 1, "opt": best, "max": most, "profiles": profiles}


# Sizes and arithmetic are from the vendor's data sheets; batches suit the typical use of such a GPU: single images at
# the edge, many in a data center. None of this was measured on these GPUs.
_ROWS = (
    Preset("jetson_orin", ("sm87",), 4, _batch(1, 8, 1), 1.0, (1, 4, 8), ("fp8",), shared=True, dla=True),
    Preset("jetson_thor", ("sm101", "sm110"), 64, _batch(1, 16, 1), 4.0, (1, 4, 16), shared=True),
    Preset("t4", ("sm75",), 16, _batch(8, 32, 1), 2.0, (1, 8, 32), ("bf16", "fp8")),
    Preset("l4", ("sm89",), 24, _batch(8, 64, 1), 4.0, (1, 8, 64)),
    Preset("a10", ("sm86",), 24, _batch(8, 64, 1), 4.0, (1, 8, 64), ("fp8",)),
    Preset("a100", ("sm80",), 40, _batch(32, 256, 64), 8.0, (1, 32, 64, 256), ("fp8",)),
    Preset("h100", ("sm90",), 80, _batch(32, 256, 64), 8.0, (1, 32, 64, 256)),
    Preset("rtx", ("sm75", "sm86", "sm89", "sm120", "sm121"), 8, _batch(1, 32, 1), 2.0, (1, 8, 32), backend="rtx"),
)
PRESETS = {row.name: row for row in _ROWS}


def preset_named(name: str) -> Preset:
    """Looks a preset up.

    Raises:
        UsageError: no preset has this name.

    Example:
        >>> preset_named("jetson_orin").batch["max"]
        8
    """
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise UsageError(f"config.engine.preset={name!r}: not one of {known}.{nearest(name, PRESETS)}")
    return PRESETS[name]


def apply_preset(config: ml_collections.ConfigDict) -> None:
    """Applies `config.engine.preset` in place, to keys that still have their defaults.

    Raises:
        UsageError: no such preset, or a precision that this GPU cannot compute in.
    """
    if not config.engine.preset:
        return
    preset, defaults = preset_named(config.engine.preset), default_config()
    asked = {word.strip() for word in config.precision.split(",")}
    if impossible := sorted(asked & {*preset.missing}):
        raise UsageError(
            f"config.engine.preset={preset.name} with config.precision={config.precision}: "
            f"{preset.name} has no {', '.join(impossible)}",
            fix="Use fp16 or int8.",
        )
    if config.batch.to_dict() == defaults.batch.to_dict():
        config.batch.update(preset.batch)
    if config.engine.workspace_gib == defaults.engine.workspace_gib:
        config.engine.workspace_gib = preset.workspace_gib
    if preset.backend and config.engine.backend == defaults.engine.backend:
        config.engine.backend = preset.backend
    if config.benchmark.batches == defaults.benchmark.batches:
        config.benchmark.batches = preset.batches


def require_arch(config: ml_collections.ConfigDict, arch: str, gpu: str) -> None:
    """Refuses to build with a preset for another kind of GPU.

    Args:
        config: the full config.
        arch: of the GPU of this host, "sm90".
        gpu: its name.

    Raises:
        UsageError: see above.
    """
    if config.engine.preset and arch not in (preset := preset_named(config.engine.preset)).archs:
        raise UsageError(
            f"config.engine.preset={preset.name}: is for {', '.join(preset.archs)}, here is {arch} ({gpu})",
            fix="Build on that GPU, or leave engine.preset out.",
        )
