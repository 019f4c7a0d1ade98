"""Graphs as inspection reads them, written out node by node."""

from vit_convert.engine.inspection.onnx_wire import Graph, Node, Value


def node(op, inputs="x", outputs="y", domain="", name="", **attributes):
    return Node(name, op, domain, inputs.split(), outputs.split(), attributes)


def graph(*nodes, opset=17, inputs=(), outputs=(), weights=(), constants=None, functions=(), **values):
    known = {name: value if isinstance(value, Value) else Value(value, (4,)) for name, value in values.items()}
    small = constants or {}
    return Graph({"": opset}, nodes, inputs, outputs, known, frozenset(weights), small, frozenset(functions), {})
