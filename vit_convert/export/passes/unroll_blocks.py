"""Depth without tracing it: all encoder blocks compute one function, so two are traced and rewritten, and the second is repeated."""

import onnx_ir as ir

from vit_convert.export.weights import Weight, add_weight, weight_of

TRACED_DEPTH = 2  # the first block may share nodes with the embedding; the second is the pattern


def between(start: ir.Value, end: ir.Value, graph: ir.Graph) -> list[ir.Node]:
    """The nodes that compute `end` from `start`, in the graph's order."""
    wanted: set[ir.Node] = set()
    stack = [end.producer()]
    while stack:
        node = stack.pop()
        if node is None or node in wanted:
            continue
        wanted.add(node)
        stack.extend(value.producer() for value in node.inputs if value is not None and value is not start)
    return [node for node in graph if node in wanted]


def unroll(model: ir.Model, depth: int) -> None:
    """Repeats the second encoder block until there are `depth`, in place.

    Args:
        model: a graph traced with two blocks, whose residual streams are the values `block_00` and `block_01`.
        depth: number of blocks wanted, at least 2; the last one's stream feeds what `block_01` fed.
    """
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    start, end = values["block_00"], values["block_01"]
    template = between(start, end, graph)
    after = [(node, i) for node, i in end.uses() if node not in template]
    last, stream = end.producer(), end
    assert last is not None
    for block in range(TRACED_DEPTH, depth):
        copies: dict[ir.Value, ir.Value] = {start: stream}
        for node in template:
            inputs = [
                value if value is None else copies[value] if value in copies else _weight_of_block(graph, value, block)
                for value in node.inputs
            ]
            copy = ir.Node(
                node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs), version=node.version
            )
            for old, new in zip(node.outputs, copy.outputs):
                new.shape, new.type = old.shape, old.type
                copies[old] = new
            graph.insert_after(last, copy)
            last = copy
        stream = copies[end]
        stream.name = f"block_{block:02d}"
    for node, i in after:
        node.replace_input_with(i, stream)


def _weight_of_block(graph: ir.Graph, value: ir.Value, block: int) -> ir.Value:
    """The same weight of another block; constants are shared."""
    weight = weight_of(value)
    if weight is None:
        return value
    assert value.name is not None

    def rename(name: str) -> str:
        return name.replace(f"encoderblock_{TRACED_DEPTH - 1}/", f"encoderblock_{block}/")

    name = rename(value.name)
    if name in graph.initializers:
        return graph.initializers[name]
    return add_weight(graph, name, Weight(tuple(map(rename, weight.sources)), weight.shape, weight.compute))
