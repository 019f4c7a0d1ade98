"""The settings of a build: limits, flags, optimization profiles, calibrator."""

from collections.abc import Mapping
from typing import Any

from vit_convert.core.errors import BuildError
from vit_convert.engine.builder.network import ParsedGraph
from vit_convert.engine.builder.request import BuildRequest
from vit_convert.engine.runtime.profiles import Profile, Shape


def configure(parsed: ParsedGraph, builder: Any, request: BuildRequest) -> Any:
    """Makes the `IBuilderConfig` of a build, except for the precision of a weakly typed one (see precision.py).

    Args:
        parsed: the graph.
        builder: the `Builder` of its TensorRT.
        request: what to build.

    Raises:
        BuildError: a profile does not fit the graph's inputs.
    """
    backend = parsed.backend
    trt = backend.module
    builder_config = builder.create_builder_config()
    builder_config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    builder_config.builder_optimization_level = request.opt_level
    if request.workspace_gib is not None:
        builder_config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(request.workspace_gib * 2**30))
    if not request.tf32:
        builder_config.clear_flag(trt.BuilderFlag.TF32)
    if request.hardware_compatible and backend.name != "rtx":  # RTX engines run on all of `targets` as they are
        builder_config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if request.version_compatible:
        builder_config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if (sharing := backend.find("PreviewFeature.PROFILE_SHARING_0806")) is not None:  # later versions always share
        # several contexts, one for each stream and batch size, on one profile
        builder_config.set_preview_feature(sharing, True)
    graph_inputs = {tensor.name: tuple(tensor.shape) for tensor in parsed.inputs}
    if not request.profiles and any(-1 in shape for shape in graph_inputs.values()):
        raise BuildError(
            f"profiles: none given, and {graph_inputs} has dynamic sizes (-1)",
            fix="Give batch.min, batch.opt and batch.max.",
        )
    for ranges in request.profiles:
        _add_profile(builder, builder_config, graph_inputs, ranges)
    if request.calibrator is not None:
        builder_config.int8_calibrator = request.calibrator
        batch = request.calibrator.get_batch_size()
        profile = builder.create_optimization_profile()
        for name, shape in graph_inputs.items():
            profile.set_shape(name, *[(batch, *shape[1:])] * 3)
        builder_config.set_calibration_profile(profile)
    return builder_config


def _add_profile(builder: Any, builder_config: Any, graph_inputs: Mapping[str, Shape], ranges: Profile) -> None:
    if set(ranges) != set(graph_inputs):
        raise BuildError(
            f"profile for {sorted(ranges)}: the graph's inputs are {sorted(graph_inputs)}",
            fix="Give a shape range for each input.",
        )
    profile = builder.create_optimization_profile()
    for name, (smallest, optimal, largest) in ranges.items():
        graph = graph_inputs[name]
        fits = {len(smallest), len(optimal), len(largest)} == {len(graph)} and all(
            0 < low <= middle <= high and size in (-1, low) and size in (-1, high)
            for size, low, middle, high in zip(graph, smallest, optimal, largest)
        )
        if not fits:
            raise BuildError(
                f"profile of {name}: {smallest} <= {optimal} <= {largest} does not fit the graph's {graph} (-1 is "
                "dynamic)",
                fix="Use min <= opt <= max, and the graph's own sizes where they are fixed.",
            )
        profile.set_shape(name, smallest, optimal, largest)
    if builder_config.add_optimization_profile(profile) < 0:
        raise BuildError(f"profile {dict(ranges)}: TensorRT rejects it", fix="Use another range.")
