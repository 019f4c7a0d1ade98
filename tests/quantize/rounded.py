"""What fp16 does: onnx's reference evaluator rounds after every node, which onnxruntime's CPU provider does not."""

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx_ir.passes.common import LiftConstantsToInitializersPass

HALF = ir.DataType.FLOAT16


class LayerNormalization(OpRun):
    """The operator as specified: stash_type 1 computes the statistics in float32 (onnx's own evaluator ignores it)."""

    op_domain = ""

    def _run(self, x, scale, bias, axis=-1, epsilon=1e-5, stash_type=1):
        assert stash_type == 1 and x.dtype == scale.dtype == bias.dtype
        wide = x.astype(np.float32)
        centred = wide - wide.mean(axis, keepdims=True)
        normalized = centred / np.sqrt((centred**2).mean(axis, keepdims=True) + np.float32(epsilon))
        return (normalized.astype(x.dtype) * scale + bias,)


def run_rounded(path, images, feed="images", **others):
    """The logits of a graph whose every node rounds to its type."""
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(str(path), new_ops=[LayerNormalization]).run(None, {feed: images, **others})[0]


def naive(model):
    """Every float32 type and weight becomes fp16, as plain converters do."""
    model = model.clone()
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16))
    for value in [
        *model.graph.inputs,
        *model.graph.initializers.values(),
        *(v for node in model.graph for v in node.outputs),
    ]:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(HALF)
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", HALF)
    return model
