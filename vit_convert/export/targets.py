"""What each TensorRT generation wants of a graph: its opset and its ordered list of substitutions."""

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from vit_convert.errors import UsageError, nearest
from vit_convert.export.patch import patch_to_matmul
from vit_convert.export.rules import attention, dense, einsum, gelu, layernorm, reduce, reshape, select, softmax
from vit_convert.export.rules.rule import Rule
from vit_convert.export.scale import fold_scale

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
        finish: changes to the whole, pruned graph, in order and in place; each returns how many places it changed.
    """

    name: str
    opset: int
    rules: tuple[type[Rule], ...]
    max_nodes_per_block: int
    finish: tuple[Callable[[ir.Model], int], ...] = ()


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
            attention.EinsumAttention,
            einsum.EinsumWithoutExpand,
            einsum.EinsumToMatMul,
            attention.ScaleOnQuery,
            gelu.TanhGeluToExp,
        ),
        34,
        (fold_scale, patch_to_matmul),
    ),
    "trt10": Target("trt10", _MODERN_OPSET, _MODERN, 30),
    "trt11": Target("trt11", _MODERN_OPSET, _MODERN, 30),
    "rtx": Target("rtx", _MODERN_OPSET, _MODERN, 30),
}


def target_named(name: str, layernorm_as: str = "operator") -> Target:
    """Looks a target up.

    Args:
        name: of a target.
        layernorm_as: "operator", or "primitives" for opset 17 alone: TensorRT 8.6 runs them faster, and in fp16 they overflow once
            an activation is further than 180 from its mean (its square then leaves the type's range).

    Raises:
        UsageError: there is none of that name.
    """
    if name not in TARGETS:
        raise UsageError(f"target={name!r}: not one of {', '.join(TARGETS)}.{nearest(name, TARGETS)}")
    target = TARGETS[name]
    if layernorm_as == "operator":
        return target
    if name != "trt8":
        raise UsageError(f"layernorm={layernorm_as!r}: target {name} runs the operator faster", fix="It is for target trt8.")
    return dataclasses.replace(target, rules=(*target.rules, layernorm.LayerNormToPrimitives), max_nodes_per_block=50)
