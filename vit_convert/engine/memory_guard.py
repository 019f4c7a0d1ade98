"""Checks whether a build can succeed on this host before it takes minutes; only if a preset says for which GPU it
is."""

from vit_convert.core.errors import BuildError
from vit_convert.core.presets import preset_named, require_arch
from vit_convert.core.progress import human_bytes
from vit_convert.core.text_length import sides_of
from vit_convert.engine.backend import cuda
from vit_convert.engine.builder.request import BuildRequest
from vit_convert.engine.host import EngineHost
from vit_convert.engine.inspection.dla import dla_refusals
from vit_convert.engine.inspection.estimate import estimate
from vit_convert.engine.inspection.onnx_wire import read_graph


def guard(host: EngineHost, request: BuildRequest) -> None:
    """Refuses a build whose preset is for another GPU, or that will not fit into memory; does nothing without a preset.

    Args:
        host: to build on.
        request: what to build.

    Raises:
        UsageError: the preset is for another GPU.
        BuildError: the graph needs more memory than is free.
    """
    backend, config, facts, progress = host.backend, host.config, host.facts, host.progress
    if not config.engine.preset or backend.gpu is None:
        return
    require_arch(config, backend.gpu.arch, backend.gpu.name)
    preset, graph = preset_named(config.engine.preset), read_graph(request.onnx_path)
    sizes = {"batch": config.batch.max, **sides_of(facts.image_size, "largest")}
    memory = estimate(graph, sizes, half=facts.dialect.precision_by_flag and request.precision == "fp16")
    needed = memory.weights + memory.activations + (memory.building if preset.shared else 0)
    free = cuda.free_memory_bytes()
    if needed > free:
        parts = f"weights {human_bytes(memory.weights)}, values {human_bytes(memory.activations)}"
        parts += f", building {human_bytes(memory.building)}" if preset.shared else ""
        raise BuildError(
            f"{request.precision} at batch {config.batch.max} needs up to {human_bytes(needed)} ({parts}), "
            f"free are {human_bytes(free)}",
            fix="Set a smaller batch.max, or end what else uses this memory.",
        )
    if preset.dla:
        progress.say(f"DLA: not used: {dla_refusals(graph) or 'a build of ours is for the GPU'}")
