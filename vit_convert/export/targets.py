"""What each TensorRT generation wants of a graph: its opset and its ordered list of substitutions."""

import dataclasses

from vit_convert.errors import UsageError, nearest
from vit_convert.export.rules import attention, dense, gelu, layernorm, reduce, reshape
from vit_convert.export.rules.rule import Rule

_SHARED: tuple[type[Rule], ...] = (
    reshape.NoDropout,
    dense.DenseToMatMul,
    dense.DenseNoBiasToMatMul,
    reshape.ConstantReshape,
    reshape.TokenGather,
    layernorm.FastVarianceLayerNorm,
    layernorm.TwoPassLayerNorm,
)


@dataclasses.dataclass(frozen=True)
class Target:
    """One TensorRT generation.

    Attributes:
        name: "trt8", "trt10", "trt11" or "rtx".
        opset: ONNX opset of the graph.
        rules: substitutions in the order in which they are applied.
        max_nodes_per_block: what the rules have to reach for a ViT's encoder block.
    """

    name: str
    opset: int
    rules: tuple[type[Rule], ...]
    max_nodes_per_block: int


# Opset 20 is the first with Gelu and still old enough for TensorRT 10.0; nothing later helps a ViT.
_MODERN = (20, (*_SHARED, attention.EinsumAttention, gelu.TanhGelu, gelu.ErfGelu), 30)

TARGETS = {
    # TensorRT 8.6 reads opset 17 at most, without Gelu.
    "trt8": Target(
        "trt8",
        17,
        (
            *_SHARED,
            reduce.ReduceAxesToAttribute,
            attention.EinsumAttentionScoresScaled,
            gelu.TanhGeluToSigmoid,
            layernorm.LayerNormToPrimitives,
        ),
        50,
    ),
    "trt10": Target("trt10", *_MODERN),
    "trt11": Target("trt11", *_MODERN),
    "rtx": Target("rtx", *_MODERN),
}


def target_named(name: str) -> Target:
    """Looks a target up.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in TARGETS:
        raise UsageError(f"target={name!r}: not one of {', '.join(TARGETS)}.{nearest(name, TARGETS)}")
    return TARGETS[name]
