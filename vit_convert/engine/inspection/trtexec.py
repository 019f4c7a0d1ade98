"""The same build with NVIDIA's command line tool, using only flags that each generation has."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence

from vit_convert.core.dialect import DIALECTS

Shapes = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]  # by input: smallest, optimal, largest

# The flags that we use, by generation. Source: samples/common/sampleOptions of each release; TensorRT-RTX's
# tool is called tensorrt_rtx.
_ALL = {
    "onnx",
    "saveEngine",
    "minShapes",
    "optShapes",
    "maxShapes",
    "memPoolSize",
    "builderOptimizationLevel",
    "noTF32",
}
_ALL |= {"skipInference", "profilingVerbosity"}
FLAGS: Mapping[str, frozenset[str]] = {
    "trt8": frozenset({*_ALL, "fp16", "int8", "calib", "versionCompatible", "hardwareCompatibilityLevel", "preview"}),
    "trt10": frozenset({*_ALL, "stronglyTyped", "versionCompatible", "hardwareCompatibilityLevel"}),
    "trt11": frozenset({*_ALL, "versionCompatible", "hardwareCompatibilityLevel"}),
    "rtx": frozenset(_ALL),
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A build; the keys of `config.engine` for which trtexec has a flag."""

    precision: str
    workspace_gib: float = 4.0
    opt_level: int = 3
    tf32: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False


def trtexec_line(target: str, graph: str, shapes: Shapes, asked: Asked) -> str:
    """The command.

    Args:
        target: the TensorRT generation.
        graph: the ONNX file.
        shapes: one profile; {} for a graph with fixed shapes.
        asked: the build.

    Example:
        >>> words = trtexec_line("trt8", "model.onnx", {}, Asked("fp16", tf32=True)).split()
        >>> words[:2], words[4:]
        (['trtexec', '--onnx=model.onnx'], ['--builderOptimizationLevel=3', '--fp16', '--skipInference'])
    """
    flags: dict[str, str | None] = {"onnx": graph, "saveEngine": f"{graph.removesuffix('.onnx')}.plan"}
    for number, name in enumerate(("minShapes", "optShapes", "maxShapes")):
        if shapes:
            flags[name] = ",".join(f"{key}:{'x'.join(map(str, sizes[number]))}" for key, sizes in shapes.items())
    flags["memPoolSize"] = f"workspace:{round(asked.workspace_gib * 1024)}"  # in MiB
    flags["builderOptimizationLevel"] = str(asked.opt_level)
    if DIALECTS[target].precision_by_flag:  # Q/DQ needs both flags
        flags |= dict.fromkeys(["fp16"] if asked.precision == "fp16" else [])
        flags |= dict.fromkeys(["fp16", "int8"] if asked.precision == "int8" else [])
    if "stronglyTyped" in FLAGS[target]:
        flags["stronglyTyped"] = None
    if not asked.tf32:
        flags["noTF32"] = None
    if asked.version_compatible and "versionCompatible" in FLAGS[target]:
        flags["versionCompatible"] = None
    if asked.hardware_compatible and "hardwareCompatibilityLevel" in FLAGS[target]:
        flags["hardwareCompatibilityLevel"] = "ampere+"
    flags["skipInference"] = None
    words = [f"--{name}" if value is None else f"--{name}={value}" for name, value in flags.items()]
    return shlex.join(["tensorrt_rtx" if target == "rtx" else "trtexec", *words])
