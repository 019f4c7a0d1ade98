"""What each TensorRT generation wants of a graph: its opset and its ordered list of substitutions."""

import dataclasses

from vit_convert.errors import UsageError, nearest
from vit_convert.export.rules import attention, dense, einsum, gelu, layernorm, reduce, reshape, select, softmax
from vit_convert.export.rules.rule import Rule

_SHARED: tuple[type[Rule], ...] = (
    reshape.NoDropout,
    dense.DenseToMatMul,
    dense.DenseNoBiasToMatMul,
    dense.NoZeroBias,
    reshape.ConstantReshape,
    reshape.TokenGather,
    reshape.TileToExpand,
    select.ConstantWhere,
    layernorm.MeanOfSum,
    layernorm.DivideByRoot,
    layernorm.FastVarianceLayerNorm,
    layernorm.TwoPassLayerNorm,
    layernorm.GuardedLayerNorm,
    layernorm.LayerNormScale,
    layernorm.LayerNormBias,
    softmax.ExpToSoftmax,
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


_MODERN: tuple[type[Rule], ...] = (
    *_SHARED,
    attention.EinsumAttention,
    einsum.EinsumWithoutExpand,
    einsum.EinsumToMatMul,
    attention.ScaleOnQuery,
    gelu.TanhGelu,
    gelu.ErfGelu,
)

_MODERN_OPSET = 20  # the first with Gelu, and still old enough for TensorRT 10.0; nothing later helps a ViT

TARGETS = {
    # TensorRT 8.6 reads opset 17 at most, without Gelu.
    "trt8": Target(
        "trt8",
        17,
        (
            reduce.ReduceAxesToAttribute,
            *_SHARED,
            attention.EinsumAttentionScoresScaled,
            einsum.EinsumWithoutExpand,
            einsum.EinsumToMatMul,
            attention.ScaleOnScores,
            gelu.TanhGeluToSigmoid,
            layernorm.LayerNormToPrimitives,
        ),
        50,
    ),
    "trt10": Target("trt10", _MODERN_OPSET, _MODERN, 30),
    "trt11": Target("trt11", _MODERN_OPSET, _MODERN, 30),
    "rtx": Target("rtx", _MODERN_OPSET, _MODERN, 30),
}


def target_named(name: str) -> Target:
    """Looks a target up.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in TARGETS:
        raise UsageError(f"target={name!r}: not one of {', '.join(TARGETS)}.{nearest(name, TARGETS)}")
    return TARGETS[name]
