"""What each TensorRT generation needs from a graph: its opset and an ordered list of substitutions."""

import dataclasses

from vit_convert.core.dialect import DIALECTS, Dialect, dialect_named
from vit_convert.core.errors import UsageError, nearest
from vit_convert.export.passes.attention_plugin import (
    ATTENTION_FOR_KERNELS,
    ATTENTION_TO_PLUGIN,
    ATTENTION_TO_PLUGIN_IF_IT_FITS,
)
from vit_convert.export.passes.contract import GraphPass
from vit_convert.export.passes.fold_attention_scale import FOLD_SCALE
from vit_convert.export.passes.fused_encoder import ENCODER_TO_HALF_KERNELS, ENCODER_TO_KERNELS
from vit_convert.export.passes.group_norms import GROUP_NORMS_TO_KERNELS
from vit_convert.export.passes.mlp_as_convolution import MLPS_TO_CONVOLUTIONS
from vit_convert.export.passes.moves_as_gather import MOVES_TO_GATHER
from vit_convert.export.passes.patch_as_matmul import PATCH_TO_MATMUL
from vit_convert.export.passes.window_kernels import NORMS_TO_KERNELS, WINDOWS_TO_KERNELS
from vit_convert.export.rules import (
    attention,
    dense,
    einsum,
    gather,
    gelu,
    layernorm,
    reduce,
    reshape,
    select,
    slices,
    softmax,
)
from vit_convert.export.rules.rule import Rule

_SHARED: tuple[type[Rule], ...] = (
    reshape.NoDropout,
    dense.DenseToMatMul,
    dense.DenseNoBiasToMatMul,
    dense.NoZeroBias,
    reshape.ConstantReshape,
    slices.ConstantSlice,
    reshape.TokenGather,
    gather.GatherByInt32,
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
    attention.EinsumAttention,
    einsum.EinsumWithoutExpand,
    einsum.EinsumToMatMul,
    attention.ScaleOnQuery,
)


@dataclasses.dataclass(frozen=True)
class Target:
    """One TensorRT generation.

    Attributes:
        dialect: what it reads: its name and the graph's opset.
        rules: substitutions in the order in which they are applied.
        max_nodes_per_block: the most nodes that the rules may leave in a ViT's encoder block.
        finish: passes over the whole, pruned graph, in order, each with its contract.
        last: the same for the graph whose nodes and values have their names.
    """

    dialect: Dialect
    rules: tuple[type[Rule], ...]
    max_nodes_per_block: int
    finish: tuple[GraphPass, ...] = ()
    last: tuple[GraphPass, ...] = ()

    @property
    def name(self) -> str:
        """The dialect's."""
        return self.dialect.name

    @property
    def opset(self) -> int:
        """ONNX opset of the graph."""
        return self.dialect.opset


_MODERN: tuple[type[Rule], ...] = (*_SHARED, gelu.TanhGelu, gelu.ErfGelu)

# Opset 17 has no Gelu.
_TRT8: tuple[type[Rule], ...] = (reduce.ReduceAxesToAttribute, *_SHARED)

_TRT8_MATMUL = Target(DIALECTS["trt8"], (*_TRT8, gelu.TanhGeluToExp), 34, (FOLD_SCALE, PATCH_TO_MATMUL))

TARGETS = {
    "trt8": Target(
        DIALECTS["trt8"], (*_TRT8, gelu.TanhGeluToPower), 36, (FOLD_SCALE, PATCH_TO_MATMUL, MLPS_TO_CONVOLUTIONS)
    ),
    "trt10": Target(DIALECTS["trt10"], _MODERN, 30),
    "trt11": Target(DIALECTS["trt11"], _MODERN, 30),
    "rtx": Target(DIALECTS["rtx"], _MODERN, 30),
}

# For images of several sizes, where it differs: a convolution needs a fixed number of tokens.
_DYNAMIC = {"trt8": _TRT8_MATMUL}

_TRT8_PLUGIN = dataclasses.replace(TARGETS["trt8"], finish=(*TARGETS["trt8"].finish, ATTENTION_TO_PLUGIN))
_TRT8_KERNELS = dataclasses.replace(TARGETS["trt8"], finish=(*TARGETS["trt8"].finish, ATTENTION_FOR_KERNELS))

# Other ways to write the same model, by target. Which is fastest depends on the GPU, the batch and the profile, so
# `tune` times them.
LOWERINGS: dict[str, dict[str, Target]] = {
    "trt8": {
        "plugin": _TRT8_PLUGIN,
        "kernels": dataclasses.replace(_TRT8_KERNELS, last=(ENCODER_TO_HALF_KERNELS,)),
        "fused": dataclasses.replace(_TRT8_PLUGIN, last=(ENCODER_TO_KERNELS,)),
        "matmul": _TRT8_MATMUL,
        "primitives": dataclasses.replace(
            _TRT8_MATMUL, rules=(*_TRT8_MATMUL.rules, layernorm.LayerNormToPrimitives), max_nodes_per_block=50
        ),
        "windows": dataclasses.replace(
            TARGETS["trt8"],
            finish=(*TARGETS["trt8"].finish, WINDOWS_TO_KERNELS, MOVES_TO_GATHER),
            last=(NORMS_TO_KERNELS,),
        ),
        "groupnorm": dataclasses.replace(
            TARGETS["trt8"],
            finish=(*TARGETS["trt8"].finish, ATTENTION_TO_PLUGIN_IF_IT_FITS),
            last=(GROUP_NORMS_TO_KERNELS,),
        ),
        "gather": dataclasses.replace(_TRT8_MATMUL, finish=(*_TRT8_MATMUL.finish, MOVES_TO_GATHER)),
    }
}


def lowering_named(target: str, lowering: str) -> Target:
    """Looks up a further lowering for a target.

    Args:
        target: name of a target.
        lowering: its name: "plugin" uses TensorRT's attention plugin; "kernels" uses ours for attention and LayerNorm,
            in FP16; "fused" the same between INT8 convolutions; "matmul" writes MLPs as matrix products; "primitives"
            also expands LayerNorm, which overflows in fp16 once an activation is more than 255 from its LayerNorm's
            mean (its square then exceeds the type's range); "gather" is "matmul" with each move of a Swin's tokens as
            one Gather; "windows" uses our kernels for a Swin's attention and LayerNorms, in FP16, and those Gathers;
            "groupnorm" uses our kernels for a hybrid's GroupNorms, in FP16, and TensorRT's attention plugin if it fits.

    Raises:
        UsageError: the target has no lowering of that name.
    """
    known = LOWERINGS.get(target, {})
    if lowering not in known:
        choice = f"target {target} has {', '.join(known) or 'only its own'}"
        raise UsageError(
            f"lowering {lowering!r}: {choice}.{nearest(lowering, known)}",
            fix="Leave `lowerings` empty for the target's own.",
        )
    return known[lowering]


def target_named(name: str, *, dynamic: bool = False) -> Target:
    """Looks up a target.

    Args:
        name: of a target.
        dynamic: whether the graph must take images of several sizes, which rules out convolutions over a fixed number
            of tokens.

    Raises:
        UsageError: no target has that name.
    """
    name = dialect_named(name).name
    return _DYNAMIC.get(name, TARGETS[name]) if dynamic else TARGETS[name]
