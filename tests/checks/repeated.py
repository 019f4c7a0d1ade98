"""A graph of a few small blocks, each a row's product with a matrix, scaled by the largest value of the row, and what
NumPy makes of it."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

WIDTH, DEPTH = 4, 5
VECTOR = (WIDTH,)


def weights(depth=DEPTH):
    """By name, for a stem and these blocks."""
    generator = np.random.default_rng(0)
    found = {"stem/kernel": generator.normal(size=(WIDTH, WIDTH))}
    for block in range(depth):
        found[f"encoderblock_{block}/kernel"] = generator.normal(size=(WIDTH, WIDTH))
        found[f"encoderblock_{block}/bias"] = generator.normal(size=VECTOR)
    return {name: value.astype(np.float32) for name, value in found.items()}


def block_nodes(block, source, axis=1, floor="floor"):
    """The nodes of one block: `axis` 0 would mix the rows of a batch."""
    name = f"encoderblock_{block}"
    return [
        helper.make_node("Abs", [source], [f"{name}/size"]),
        helper.make_node("ReduceMax", [f"{name}/size", f"axis_{axis}"], [f"{name}/most"], keepdims=1),
        helper.make_node("Add", [f"{name}/most", floor], [f"{name}/safe"]),
        helper.make_node("Div", [source, f"{name}/safe"], [f"{name}/scaled"]),
        helper.make_node("Transpose", [f"{name}/scaled"], [f"{name}/turned"], perm=[0, 1]),
        helper.make_node("MatMul", [f"{name}/turned", f"{name}/kernel"], [f"{name}/product"]),
        helper.make_node("Add", [f"{name}/product", f"{name}/bias"], [f"block_{block:02d}"]),
    ]


def model(nodes=None, values=None, outputs=(), depth=DEPTH):
    """The graph: a stem, the blocks, and `logits`, twice the last block's output.

    Args:
        nodes: of blocks, by number, in place of `block_nodes`.
        values: of constants and weights, in place of `weights`.
        outputs: further ones.
        depth: how many blocks.
    """
    constants = weights(depth) | {
        "floor": np.float32(1e-6),
        "two": np.float32(2),
        "axis_0": np.array([0]),
        "axis_1": np.array([1]),
    }
    constants |= values or {}
    found = [helper.make_node("MatMul", ["x", "stem/kernel"], ["stem/product"])]
    for block in range(depth):
        source = f"block_{block - 1:02d}" if block else "stem/product"
        found += (nodes or {}).get(block) or block_nodes(block, source)
    found.append(helper.make_node("Mul", [f"block_{depth - 1:02d}", "two"], ["logits"]))
    rows = ["n", WIDTH]
    graph = helper.make_graph(
        found,
        "g",
        [helper.make_tensor_value_info("x", 1, rows)],
        [helper.make_tensor_value_info(name, 1, rows) for name in ("logits", *outputs)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    return onnx.shape_inference.infer_shapes(made, strict_mode=True)


def forward(rows, blocks=range(DEPTH)):
    """What the graph gives for rows [n, WIDTH] with these blocks, and after each of them, in float64."""
    known = {name: value.astype(np.float64) for name, value in weights().items()}
    values, found = rows.astype(np.float64) @ known["stem/kernel"], {}
    for block in blocks:
        values = values / (np.abs(values).max(1, keepdims=True) + 1e-6)
        values = values @ known[f"encoderblock_{block}/kernel"] + known[f"encoderblock_{block}/bias"]
        found[f"block_{block:02d}"] = values.astype(np.float32)
    return found | {"logits": (2 * values).astype(np.float32)}
