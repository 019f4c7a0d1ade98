"""Where an engine of the lowering "fused" reads INT8, on a graph of a few nodes."""

import numpy as np
import onnx_ir as ir
import pytest

from vit_convert.quantize.placement import Site
from vit_convert.quantize.ranged import sites_with_ranges

TEXT = """<ir_version: 8, opset_import: ["" : 17, "vit" : 1]> g (float[n, 4, 1, 1] x) => (float[n, 4, 1, 1] y) {
    start = ConstantOfShape(shape)
    a = Conv(x, "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel")
    g = Gelu(a)
    c = Conv(g, "Transformer/encoderblock_0/MlpBlock_0/Dense_1/kernel")
    t = vit.VitAttention(c)
    sum, norm = vit.VitAddNorm(t, x)
    p = MatMul(norm, w)
    y = Conv(g, t)
}"""


@pytest.fixture(scope="module")
def model():
    text = TEXT.replace('"Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"', "w1")
    found = ir.from_onnx_text(text.replace('"Transformer/encoderblock_0/MlpBlock_0/Dense_1/kernel"', "w2"))
    values = {value.name: value for node in found.graph for value in node.inputs if value is not None}
    names = {f"w{i}": f"Transformer/encoderblock_0/MlpBlock_0/Dense_{i - 1}/kernel" for i in (1, 2)}
    for name, shape in {"w1": (4, 4, 1, 1), "w2": (4, 4, 1, 1), "w": (4, 4), "shape": (1,)}.items():
        value = values[name]
        value.name = names.get(name, name)
        value.const_value = ir.tensor(np.ones(shape, np.int64 if name == "shape" else np.float32), name=value.name)
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        found.graph.register_initializer(value)
    for node in found.graph:
        node.name = f"the {node.op_type}"
    return found


FC1 = Site("block_00", "fc1", "x", "a", "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel")
FC2 = Site("block_00", "fc2", "g", "c", "Transformer/encoderblock_0/MlpBlock_0/Dense_1/kernel")
ATTENTION = Site("the VitAttention", "VitAttention", "c", "t")
ADDED = Site("the VitAddNorm", "VitAddNorm", "t", "sum")


@pytest.mark.parametrize(
    ("ranged", "sites"),
    [
        (["x"], [FC1]),
        (["c", "g", "x"], [FC1, FC2, ATTENTION]),  # in the graph's order
        (["t"], [ADDED]),
        (["a"], []),  # inside the convolution's kernel: no activation function reads INT8
        (["a", "g"], [FC2]),
        (["norm"], []),  # a product is none of an engine of this lowering
        ([], []),
    ],
)
def test_who_reads_a_tensor_with_a_range(model, ranged, sites):
    assert sites_with_ranges(model, ranged) == sites
