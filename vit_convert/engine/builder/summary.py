"""What a finished engine shows if it can be loaded: its layers, and whether its attention is fused."""

import pathlib
from collections.abc import Sequence

from vit_convert.core.bundle import write_json
from vit_convert.core.engine_results import AttentionKernels, EngineSummary
from vit_convert.core.errors import ConvertError
from vit_convert.core.progress import Progress
from vit_convert.engine.backend.sidecar import Sidecar
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.builder.fused_kernels import fused_attention_by_kernels
from vit_convert.engine.builder.kernel_kinds import kinds_of_layers
from vit_convert.engine.builder.layer_info import Layers, count_int8, engine_layers, fused_attention
from vit_convert.engine.runtime.engine import Engine


def summarise(
    backend: Backend, plan: pathlib.Path, sidecar: Sidecar, *, warnings: Sequence[str], progress: Progress
) -> EngineSummary:
    """Loads an engine if this host has a GPU, writes its layers beside it, and summarises it.

    Args:
        backend: the TensorRT that built it.
        plan: the engine.
        sidecar: of it.
        warnings: TensorRT's.
        progress: warns if an int8 engine seems to have no int8 layer.
    """
    layers, fused, unknown = look_at(backend, plan, sidecar)
    layers_path = plan.with_name(f"{plan.name}.layers.json")
    if layers is not None:
        write_json(layers_path, layers)
    else:
        layers_path.unlink(missing_ok=True)  # of an earlier engine
    int8_layers = count_int8(layers) if sidecar.precision == "int8" and layers is not None else None
    if int8_layers == 0:
        graph = sidecar.onnx.path
        progress.warn(f"{graph} as int8: TensorRT shows none of its products in int8, so it may be an fp16 engine")
    return EngineSummary(
        backend=backend.name,
        version=backend.version,
        arch=backend.arch,
        precision=sidecar.precision,
        graph=sidecar.onnx.path,
        path=plan.name,
        bytes=sidecar.plan.bytes,
        build_seconds=sidecar.build_seconds,
        products=sidecar.products,
        int8_layers=int8_layers,
        fused_attention=fused,
        fused_attention_unknown=unknown,
        warnings=tuple(warnings),
    )


def look_at(
    backend: Backend, plan: pathlib.Path, sidecar: Sidecar
) -> tuple[Layers | None, AttentionKernels | None, str]:
    """An engine's layers and its fused attention, each None if unknown, and the reason."""
    if backend.gpu is None:
        return None, None, "engines are loaded only on a GPU, and this host has none"
    layers: Layers | None = None
    try:
        engine = Engine(backend, plan, record=sidecar)
        layers, unknown = engine_layers(engine)
        if layers is None:
            return None, None, unknown
        found = fused_attention(layers)
        if found is None:
            return layers, *_by_kernels(engine)
    except ConvertError as e:  # the engine is built, but there is too little memory to look at it
        return layers, None, str(e)
    text = found.describe(sidecar.attentions)
    found_fused = AttentionKernels(
        count=found.count,
        precisions=found.precisions,
        text=text,
        source="engine inspector",
        kinds=kinds_of_layers(layers),
    )
    return layers, found_fused, ""


def _by_kernels(engine: Engine) -> tuple[AttentionKernels | None, str]:
    """Fused attention read from the kernels' names, and why it is partly or wholly unknown."""
    profiles = fused_attention_by_kernels(engine)
    unknown = next((row.unknown for row in profiles if row.unknown is not None), "")
    told = [(row.count, row) for row in profiles if row.count is not None]
    if not told:
        return None, unknown
    count, least = min(told, key=lambda each: each[0])  # profiles may differ in what they fuse
    fused = AttentionKernels(
        count=count,
        precisions=least.precisions or {},
        text=least.text or "",
        source="kernel names",
        profiles=tuple(profiles),
    )
    return fused, unknown
