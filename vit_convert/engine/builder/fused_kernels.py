"""Fused attention read from the kernels that an engine launches, for engines whose layer information hides it."""

from vit_convert.core.engine_results import ProfileKernels
from vit_convert.core.errors import ConvertError
from vit_convert.engine.builder.kernel_kinds import kernel_kinds
from vit_convert.engine.builder.layer_info import count_fused
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.session import Session


def fused_attention_by_kernels(engine: Engine) -> list[ProfileKernels]:
    """Records one run of each profile as a CUDA graph and looks at the names of its kernels.

    Args:
        engine: the loaded engine.

    Returns:
        What each profile launches, or why that is unknown.
    """
    rows: list[ProfileKernels] = []
    with Session(engine) as session:
        for candidate in engine.ranges:
            batch = candidate.optimal[0]
            try:
                prepared = session.prepare(candidate.optimal)
                names = prepared.graph.kernel_names() if prepared.graph is not None else []
            except ConvertError as e:
                rows.append(ProfileKernels(batch=batch, unknown=str(e)))
                continue
            if prepared.graph is None:
                rows.append(ProfileKernels(batch=batch, unknown=prepared.why_no_graph))
                continue
            # TensorRT fuses attention only in fp16, bf16, int8 and fp8, so in an fp16 engine a kernel that does not
            # name its type is fp16.
            known = "fp16" if engine.record.precision == "fp16" else ""
            fused = count_fused((name, f"{name} {known}") for name in names)
            text = fused.describe(engine.record.attentions)
            rows.append(
                ProfileKernels(
                    batch=batch,
                    kernels=len(names),
                    count=fused.count,
                    precisions=fused.precisions,
                    text=text,
                    kinds=kernel_kinds(names),
                )
            )
    return rows
