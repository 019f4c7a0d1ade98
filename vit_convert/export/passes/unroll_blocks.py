"""Unrolls stacks without tracing every block: all blocks of a stack compute the same function, so two are traced and
rewritten, and the second is repeated.

The first block may share nodes with what precedes it, so the second is the template.
"""

import functools
from collections.abc import Callable, Sequence

import onnx_ir as ir

from vit_convert.core.errors import ExportError
from vit_convert.core.stack import Stack
from vit_convert.export.passes.contract import GraphPass
from vit_convert.export.weights import Weight, add_weight, weight_of


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


def unroll(model: ir.Model, stack: Stack) -> None:
    """Repeats a stack's second period of blocks until the stack has its full depth, in place; a complete stack is left
    alone.

    Args:
        model: a graph traced with `stack.traced` blocks, whose residual streams are the values named by the stack's
            taps.
        stack: the stack; its last block then feeds what the last traced one fed.

    Raises:
        ExportError: a block reads a weight that is not one of its own parameters, so that the other blocks would share
            it.
    """
    graph, period = model.graph, stack.period
    values = {value.name: value for node in graph for value in node.outputs}
    if stack.tap(stack.depth - 1) in values:
        return
    start, end = values[stack.tap(period - 1)], values[stack.tap(2 * period - 1)]
    template = between(start, end, graph)
    after = [(node, i) for node, i in end.uses() if node not in template]
    last, stream = end.producer(), end
    assert last is not None
    for offset in range(period, stack.depth - period, period):
        rename = functools.partial(_renamed, stack, offset)
        copies: dict[ir.Value, ir.Value] = {start: stream}
        for node in template:
            inputs = [
                value if value is None else copies[value] if value in copies else _weight_of_block(graph, value, rename)
                for value in node.inputs
            ]
            copy = ir.Node(
                node.domain,
                node.op_type,
                inputs,
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
                version=node.version,
            )
            for old, new in zip(node.outputs, copy.outputs):
                new.shape, new.type = old.shape, old.type
                new.name = tap_of_copy(stack, offset, old.name)
                copies[old] = new
            graph.insert_after(last, copy)
            last = copy
        stream = copies[end]
    for node, i in after:
        node.replace_input_with(i, stream)


def unrolling(stack: Stack) -> GraphPass:
    """`unroll` for a stack, with its contract: two periods of blocks before it, all blocks after it."""

    def missing(model: ir.Model, blocks: Sequence[int]) -> str:
        there = {value.name for node in model.graph for value in node.outputs}
        lost = [tap for tap in map(stack.tap, blocks) if tap not in there]
        return f"no value is {lost[0]}, the stream after a block" if lost else ""

    def has_pattern(model: ir.Model) -> str:
        whole = not missing(model, [stack.depth - 1])
        return "" if whole else missing(model, [stack.period - 1, 2 * stack.period - 1])

    def has_all_blocks(model: ir.Model) -> str:
        return missing(model, range(stack.period - 1, stack.depth, stack.period))

    return GraphPass(
        lambda model: unroll(model, stack), name="unroll", requires=(has_pattern,), ensures=(has_all_blocks,)
    )


def _renamed(stack: Stack, offset: int, name: str) -> str:
    """The name of a template's parameter in the block `offset` further on; "" if it is not a parameter of the
    template."""
    for block in range(stack.period, 2 * stack.period):
        if name.startswith(stack.prefix(block)):
            return stack.prefix(block + offset) + name.removeprefix(stack.prefix(block))
    return ""


def unrolled_taps(stack: Stack, taps: Sequence[str]) -> list[str]:
    """The taps of the whole stack, from those of its traced blocks, in the model's order."""
    if stack.tap(stack.depth - 1) in taps:
        return list(taps)
    template = [tap for tap in taps if tap_of_copy(stack, 0, tap) is not None]
    end = taps.index(template[-1]) + 1
    offsets = range(stack.period, stack.depth - stack.period, stack.period)
    copies = [tap_of_copy(stack, offset, tap) for offset in offsets for tap in template]
    return [*taps[:end], *filter(None, copies), *taps[end:]]


def tap_of_copy(stack: Stack, offset: int, name: str | None) -> str | None:
    """The name in a copy of a tapped value of the template (the stream after a block, or a value within it); None for
    other values."""
    for block in range(stack.period, 2 * stack.period):
        tap = stack.tap(block)
        if name is not None and (name == tap or name.startswith(f"{tap}/")):
            return stack.tap(block + offset) + name.removeprefix(tap)
    return None


def _weight_of_block(graph: ir.Graph, value: ir.Value, rename: Callable[[str], str]) -> ir.Value:
    """The same weight in another block; constants are shared."""
    weight = weight_of(value)
    if weight is None:
        return value
    assert value.name is not None
    name, sources = rename(value.name), tuple(map(rename, weight.sources))
    if not name or not all(sources):
        raise ExportError(
            f"{', '.join(weight.sources)}: read within a block that is repeated, and not one of its parameters: all "
            "blocks would share it",
            fix="Give every block of the stack parameters of its own, under its scope.",
        )
    if name in graph.initializers:
        return graph.initializers[name]
    return add_weight(graph, name, Weight(sources, weight.shape, weight.compute, weight.num_read))
