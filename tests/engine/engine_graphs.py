"""Tiny ONNX graphs, each a stand-in for what the exporter writes: one linear layer, LayerNormalization and softmax."""

import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TOKENS, WIDTH = 4, 8
BATCH = {"min": 1, "opt": 4, "max": 8}  # of the bundles in conftest.py, and their images
IMAGE = (64, 64, 3)
PROFILE = {"images": ((1, TOKENS, WIDTH), (4, TOKENS, WIDTH), (8, TOKENS, WIDTH))}


def save(
    path: pathlib.Path, nodes: list, weights: list, *, opset: int = 17, batch: int | str = "batch"
) -> pathlib.Path:
    """Saves a graph `images` [batch, TOKENS, WIDTH] float32 -> `logits` of the same shape."""
    shape = [batch, TOKENS, WIDTH]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", "logits")]
    graph = helper.make_graph(nodes, "tiny", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def block(
    path: pathlib.Path, dtype: int = TensorProto.FLOAT, *, opset: int = 17, batch: int | str = "batch"
) -> pathlib.Path:
    """A graph whose compute runs in `dtype`: MatMul, LayerNormalization over the last axis, Softmax, between Casts."""
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], name="in", to=dtype),
        helper.make_node("MatMul", ["x", "w"], ["h"], name="block_00/linear"),
        helper.make_node("LayerNormalization", ["h", "scale", "bias"], ["n"], name="block_00/norm", axis=-1),
        helper.make_node("Softmax", ["n"], ["s"], name="block_00/softmax", axis=-1),
        helper.make_node("Cast", ["s"], ["logits"], name="out", to=TensorProto.FLOAT),
    ]
    values = {"w": weight(), "scale": np.ones(WIDTH), "bias": np.zeros(WIDTH)}
    weights = [helper.make_tensor(name, dtype, value.shape, value.ravel().tolist()) for name, value in values.items()]
    return save(path, nodes, weights, opset=opset, batch=batch)


def quantized(path: pathlib.Path, dtype: int = TensorProto.INT8) -> pathlib.Path:
    """A linear layer with Q/DQ on its input and its weight, INT8 or FLOAT8E4M3FN."""
    nodes = []
    for source, scale in (("images", "sx"), ("w", "sw")):
        nodes.append(helper.make_node("QuantizeLinear", [source, scale, "zero"], [f"{source}_q"], name=f"{source}/q"))
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{source}_q", scale, "zero"], [f"{source}_dq"], name=f"{source}/dq")
        )
    nodes.append(helper.make_node("MatMul", ["images_dq", "w_dq"], ["logits"], name="block_00/linear"))
    scalars = {"sx": np.float32(0.1), "sw": np.float32(0.02)}
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in {"w": weight(), **scalars}.items()]
    return save(path, nodes, [*weights, helper.make_tensor("zero", dtype, [], [0])], opset=19)


def weight() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(WIDTH, WIDTH)).astype(np.float32)
