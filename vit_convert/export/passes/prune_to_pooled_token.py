"""Prunes the last block to one token: if the head reads only the class token, the others are not computed.

After the last attention product, every operator of a ViT works on each token by itself, so that taking the token first
gives the same numbers. Only the keys and values of the last block need all tokens: this saves 5/6 of that block's
arithmetic (exactly, for an MLP four times as wide), or 7 % of a 12-block model.

The token is the same of every row, and taken by Gather; or each row has its own (CLIP's end of the text), and it is
taken by a product with a row of zeros and one 1, which the model computes from its inputs anyway.
"""

from collections.abc import Callable, Iterator

import onnx_ir as ir

from vit_convert.export.passes.contract import GraphPass
from vit_convert.export.weights import add_constant

# Nodes whose output is needed for one token only: the token axis of the output, and their `_token_operands`.
_Chosen = dict[ir.Node, tuple[int, list[tuple[ir.Value, int]]]]
ELEMENTWISE = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Max",
    "Sqrt",
    "Exp",
    "Neg",
    "Relu",
    "Gelu",
    "Sigmoid",
    "Tanh",
    "Erf",
    "Cast",
}
# if they reduce the last axis, which is never the token axis
_ROWWISE = {"LayerNormalization", "Softmax", "ReduceMean"}


def pooled_token(model: ir.Model, token: int | str | None = None) -> int | str | None:
    """The index, from the beginning, of the one token that a graph keeps, or the name `token` if each row keeps its
    own; None if it keeps all or another."""
    pool = _find_pool(model.graph, token)
    if pool is None or isinstance(token, str):
        return None if pool is None else token
    return _index(pool)


def prune_tokens(model: ir.Model, token: int | str | None = None) -> int:
    """Moves the selection of the pooled token up to the point where all tokens are needed, in place.

    Args:
        model: one whose head reads one token through Gather(x [batch, tokens, width], index, axis=1), or MatMul(chosen
            [batch, 1, tokens], x) where `token` is a name; others are left alone.
        token: index of the token, negative from the end; None for any; a name if each row has its own: `chosen`,
            computed only from the inputs, is 1 at one token of each row and 0 elsewhere.

    Returns:
        The number of nodes that now compute only one token.
    """
    pool = _find_pool(model.graph, token)
    if pool is None:
        return 0
    chosen = _choose(model.graph, pool)
    if not chosen or (_is_by_row(pool) and not _can_take_rows(chosen)):
        return 0
    _restrict(model.graph, pool, chosen)
    if _is_by_row(pool):
        model.graph.sort()  # the choice of each row was computed after the blocks
    return len(chosen)


def pruning(token: int | str | None) -> GraphPass:
    """`prune_tokens` for one token, or any, with its contract."""
    return GraphPass(lambda model: prune_tokens(model, token), name="prune_tokens")


def _find_pool(graph: ir.Graph, token: int | str | None) -> ir.Node | None:
    if isinstance(token, str):
        return next((node for node in reversed(list(graph)) if _is_pool_by_row(node)), None)
    pools = (node for node in graph if _is_pool(node))
    return next((pool for pool in pools if token is None or _index(pool) in (token, token + _num_tokens(pool))), None)


def _num_tokens(pool: ir.Node) -> int:
    data = pool.inputs[0]
    assert data is not None and data.shape is not None
    return data.shape[1] if isinstance(data.shape[1], int) else 0


def _index(pool: ir.Node) -> int:
    index = pool.inputs[1]
    assert index is not None and index.const_value is not None
    number = int(index.const_value.numpy())
    return number + _num_tokens(pool) if number < 0 else number


def _is_pool(node: ir.Node) -> bool:
    if node.op_type != "Gather" or node.attributes["axis"].as_int() != 1:
        return False
    data, index = node.inputs
    shape = data.shape if data is not None else None
    several = shape is not None and len(shape) == 3 and shape[1] != 1  # attention pooling returns one token anyway
    return several and index is not None and index.const_value is not None and len(index.const_value.shape) == 0


def _is_pool_by_row(node: ir.Node) -> bool:
    if not _is_by_row(node):
        return False
    shapes = [None if value is None else value.shape for value in node.inputs]
    if any(shape is None or len(shape) != 3 for shape in shapes) or node.outputs[0].is_graph_output():
        return False
    (_, one, tokens), (_, length, _) = shapes  # type: ignore[misc]
    computed = node.inputs[0].producer() is not None  # type: ignore[union-attr]
    return one == 1 and length != 1 and tokens == length and computed


def _is_by_row(pool: ir.Node) -> bool:
    return pool.op_type == "MatMul"


def _read(pool: ir.Node) -> ir.Value:
    """The tokens from which a pool takes one."""
    value = pool.inputs[1 if _is_by_row(pool) else 0]
    assert value is not None
    return value


def _can_take_rows(chosen: _Chosen) -> bool:
    """Whether a product can do what Gather does: it takes rows of matrices."""
    taken = ((value, axis) for _, operands in chosen.values() for value, axis in operands)
    return all(axis == _rank(value) - 2 for value, axis in taken if value.producer() not in chosen)


def _token_operands(node: ir.Node, axis: int, *, by_row: bool) -> Iterator[tuple[ir.Value, int]]:
    """The operands that `node` reads token by token, each with its token axis, if its output is needed for one token on
    `axis`.

    Nothing is yielded for an operator that mixes tokens, or that adds a table with another row for each token: such a
    constant is an operand only if each row of the batch has its own token (its row of a causal mask has to be
    selected).
    """
    operands = [
        value for value in node.inputs if value is not None and value.const_value is None and not value.is_initializer()
    ]
    rank = _rank(node.outputs[0])
    if node.op_type in ELEMENTWISE:
        constants = [value for value in node.inputs if value is not None and value not in operands]
        same = all(
            _rank(value) == rank and _length(value, axis - rank) == _length(node.outputs[0], axis - rank)
            for value in operands
        )
        tables = [value for value in constants if _length(value, axis - rank) != 1]
        if same and (by_row or not tables):
            yield from ((value, axis) for value in operands)
            yield from ((value, axis - rank + _rank(value)) for value in tables)
    elif node.op_type in _ROWWISE and axis < rank - 1 and _along_last(node):
        yield operands[0], axis
    elif node.op_type == "MatMul" and axis == rank - 2:
        # rows of the left operand; the right one is a weight, the keys or the values
        yield node.inputs[0], axis  # type: ignore[misc]
    elif node.op_type == "Transpose":
        yield operands[0], node.attributes["perm"].as_ints()[axis]
    elif node.op_type == "Reshape" and axis == 1:  # heads are split or merged after the token axis
        source, target = operands[0].shape, node.outputs[0].shape
        if source is not None and target is not None and source[1] == target[1]:
            yield operands[0], 1


def _choose(graph: ir.Graph, pool: ir.Node) -> _Chosen:
    """The nodes whose output is needed for one token only, found from the pool upwards, with their token axis and
    `_token_operands`."""
    token_uses: dict[ir.Value, list[int]] = {_read(pool): [1]}
    chosen: _Chosen = {}
    for node in reversed(list(graph)):
        value = node.outputs[0]
        axes = token_uses.get(value, [])
        if (
            len(node.outputs) != 1
            or not axes
            or len(axes) != len(value.uses())
            or len(set(axes)) != 1
            or value.is_graph_output()
        ):
            continue
        operands = list(_token_operands(node, axes[0], by_row=_is_by_row(pool)))
        if not operands:
            continue
        chosen[node] = axes[0], operands
        for operand, axis in operands:
            token_uses.setdefault(operand, []).append(axis)
    return chosen


def _restrict(graph: ir.Graph, pool: ir.Node, chosen: _Chosen) -> None:
    take = _by_product(graph, pool) if _is_by_row(pool) else _by_index(graph, pool)
    taken: dict[tuple[ir.Value, int], ir.Value] = {}

    def one_token(value: ir.Value, axis: int, before: ir.Node) -> ir.Value:
        if (value, axis) not in taken:
            node = take(value, axis, before)
            node.outputs[0].type = value.type
            graph.insert_before(before, node)
            taken[value, axis] = node.outputs[0]
        return taken[value, axis]

    for node in [node for node in graph if node in chosen]:
        axis, operands = chosen[node]
        for operand, operand_axis in operands:
            if operand.producer() not in chosen:
                node.replace_input_with(node.inputs.index(operand), one_token(operand, operand_axis, node))
        if node.op_type == "Reshape":
            _reshape_to_one(graph, node)
        _set_token(node.outputs[0], node.outputs[0], axis)
    _skip_transposes(graph, [node for node in graph if node in chosen])
    if _is_by_row(pool):
        ir.convenience.replace_all_uses_with(pool.outputs[0], _read(pool))  # [batch, 1, width], as it gave
    else:
        squeeze = add_constant(graph, "pooled_shape", [0, -1])
        node = ir.Node("", "Reshape", [pool.inputs[0], squeeze], num_outputs=1)
        node.outputs[0].shape, node.outputs[0].type = pool.outputs[0].shape, pool.outputs[0].type
        node.outputs[0].name, pool.outputs[0].name = pool.outputs[0].name, None  # it may be the graph's output
        graph.insert_after(pool, node)
        ir.convenience.replace_all_uses_with(pool.outputs[0], node.outputs[0], replace_graph_outputs=True)
    graph.remove(pool, safe=True)


def _by_index(graph: ir.Graph, pool: ir.Node) -> Callable[[ir.Value, int, ir.Node], ir.Node]:
    """Selects the token that is the same for every row of the batch."""
    index = pool.inputs[1]
    assert index is not None and index.const_value is not None
    one = add_constant(graph, "pooled_token", [int(index.const_value.numpy())])

    def take(value: ir.Value, axis: int, before: ir.Node) -> ir.Node:
        node = ir.Node("", "Gather", [value, one], [ir.AttrInt64("axis", axis)], num_outputs=1)
        _set_token(node.outputs[0], value, axis)
        return node

    return take


def _by_product(graph: ir.Graph, pool: ir.Node) -> Callable[[ir.Value, int, ir.Node], ir.Node]:
    """Selects each row's own token."""
    chosen = pool.inputs[0]
    assert chosen is not None and chosen.shape is not None
    batch, _, tokens = chosen.shape
    of_rank: dict[int, ir.Value] = {3: chosen}

    def take(value: ir.Value, axis: int, before: ir.Node) -> ir.Node:
        assert value.shape is not None
        if (rank := _rank(value)) not in of_rank:  # [batch, heads, tokens, …]
            shape = add_constant(graph, "pooled_rows", [0, *[1] * (rank - 2), -1])
            wider = ir.Node("", "Reshape", [chosen, shape], num_outputs=1)
            wider.outputs[0].shape, wider.outputs[0].type = ir.Shape([batch, *[1] * (rank - 2), tokens]), chosen.type
            graph.insert_before(before, wider)
            of_rank[rank] = wider.outputs[0]
        node = ir.Node("", "MatMul", [of_rank[rank], value], num_outputs=1)
        node.outputs[0].shape = ir.Shape([batch, *value.shape[1:-2], 1, value.shape[-1]])
        return node

    return take


def _skip_transposes(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """With one token, swapping tokens and heads moves nothing: Transpose and the Reshape beside it become one
    Reshape."""
    for node in nodes:
        if node.op_type != "Transpose" or tuple(node.attributes["perm"].as_ints()) != (0, 2, 1, 3):
            continue
        source, shape = node.inputs[0], node.outputs[0].shape
        assert source is not None and shape is not None
        before, after = _reshape_above(source), [user for user, _ in node.outputs[0].uses()]
        if before is not None:  # [B, 1, D] -> [B, 1, H, d] -> [B, H, 1, d]
            before.replace_input_with(1, add_constant(graph, "pooled_heads", [0, *_behind_batch(shape)]))
            before.outputs[0].shape = source.shape = shape
            _merge(graph, node, source)
        elif len(after) == 1 and after[0].op_type == "Reshape":  # [B, H, 1, d] -> [B, 1, H, d] -> [B, 1, D]
            target = after[0].outputs[0].shape
            assert target is not None
            after[0].replace_input_with(1, add_constant(graph, "pooled_width", [0, *_behind_batch(target)]))
            _merge(graph, node, source)


def _behind_batch(shape: ir.Shape) -> list[int]:
    return [int(dim) for dim in shape[1:] if isinstance(dim, int)]  # a pooled token has nothing dynamic but its batch


def _reshape_above(value: ir.Value) -> ir.Node | None:
    """The Reshape that a value comes from, perhaps through a multiplication by a scalar (the attention scale)."""
    node = value.producer()
    if (
        node is not None
        and node.op_type == "Mul"
        and node.inputs[1] is not None
        and node.inputs[1].const_value is not None
    ):
        inner = node.inputs[0]
        node = (
            inner.producer()
            if inner is not None and node.inputs[1].const_value.size == 1 and len(inner.uses()) == 1
            else None
        )
    return node if node is not None and node.op_type == "Reshape" and len(value.uses()) == 1 else None


def _merge(graph: ir.Graph, transpose: ir.Node, source: ir.Value) -> None:
    ir.convenience.replace_all_uses_with(transpose.outputs[0], source)
    graph.remove(transpose, safe=True)


def _reshape_to_one(graph: ir.Graph, node: ir.Node) -> None:
    shape = node.inputs[1]
    assert shape is not None and shape.const_value is not None
    numbers = shape.const_value.numpy().tolist()
    node.replace_input_with(1, add_constant(graph, "pooled_shape", [numbers[0], 1, *numbers[2:]]))


def _set_token(value: ir.Value, like: ir.Value, axis: int) -> None:
    assert like.shape is not None
    value.type = like.type
    value.shape = ir.Shape([1 if i == axis else dim for i, dim in enumerate(like.shape)])


def _length(value: ir.Value, axis: int) -> int | ir.SymbolicDim:
    """The length of an axis counted from the end; 1 if the value is broadcast along it."""
    assert value.shape is not None
    return value.shape[axis] if -axis <= len(value.shape) else 1


def _along_last(node: ir.Node) -> bool:
    """Whether a normalisation or a mean is along the last axis only."""
    rank = _rank(node.inputs[0])  # type: ignore[arg-type]
    if node.op_type != "ReduceMean":
        # ONNX's default is -1
        return node.attributes.get_int("axis", -1) in (-1, rank - 1)
    axes = node.attributes["axes"].as_ints() if "axes" in node.attributes else ()
    if len(node.inputs) > 1 and node.inputs[1] is not None and node.inputs[1].const_value is not None:
        axes = node.inputs[1].const_value.numpy().tolist()
    return len(axes) == 1 and axes[0] in (-1, rank - 1)


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)
