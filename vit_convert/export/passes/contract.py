"""What a pass requires and ensures, checked whenever it runs: a broken contract is a bug of ours, which is then found
at its source and not in a graph that TensorRT computes differently.

A condition is a function of the graph that returns "" or, in words, what does not hold. Its time is proportional to the
number of nodes: milliseconds. Conditions shared by several passes are here, the others beside their pass.
"""

from collections.abc import Callable, Sequence

import onnx_ir as ir

from vit_convert.export.weights import weight_of

Condition = Callable[[ir.Model], str]


class Changed(ir.passes.PassResult):
    """What a pass did.

    Attributes:
        model: the graph, changed in place.
        modified: whether anything changed.
        places: how many places were changed.
    """

    def __init__(self, model: ir.Model, places: int):
        super().__init__(model, places > 0)
        self.places = places


class GraphPass(ir.passes.InPlacePass):
    """A change to a whole graph with its contract.

    Args:
        change: changes a graph in place; returns the number of places, or None.
        name: of the pass; defaults to the function's.
        requires: conditions that must hold before, besides `is_sound`.
        ensures: conditions that hold afterwards, besides `is_sound` and unchanged names of inputs and outputs.

    Example:
        >>> import onnx_ir as ir
        >>> text = '<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { y = Identity (x) }'
        >>> rename = GraphPass(lambda model: setattr(model.graph.outputs[0], "name", "z"), name="rename")
        >>> rename(ir.from_onnx_text(text))  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        onnx_ir.passes.PostconditionError: rename: the outputs were y and are z
    """

    def __init__(
        self,
        change: Callable[[ir.Model], object],
        *,
        name: str = "",
        requires: Sequence[Condition] = (),
        ensures: Sequence[Condition] = (),
    ):
        self.__name__ = name or change.__name__
        self._change, self._required, self._ensured = change, requires, ensures

    def requires(self, model: ir.Model) -> None:
        """Refuses a graph that the pass cannot handle.

        Raises:
            PreconditionError: a condition does not hold, because an earlier pass broke it or is missing.
        """
        for condition in (is_sound, *self._required):
            if wrong := condition(model):
                raise ir.passes.PreconditionError(f"{self.__name__}: before it {wrong}")

    def call(self, model: ir.Model) -> Changed:
        """Changes the graph."""
        before = _interface(model)
        places = self._change(model)
        for what, names, now in zip(("inputs", "outputs"), before, _interface(model)):
            if names != now:
                raise ir.passes.PostconditionError(
                    f"{self.__name__}: the {what} were {', '.join(names)} and are {', '.join(now)}"
                )
        return Changed(model, int(places) if isinstance(places, int) else 0)

    def ensures(self, model: ir.Model) -> None:
        """Refuses the pass's own result if it broke its contract.

        Raises:
            PostconditionError: a condition does not hold: the pass has a fault.
        """
        for condition in (is_sound, *self._ensured):
            if wrong := condition(model):
                raise ir.passes.PostconditionError(f"{self.__name__}: after it {wrong}")


def _interface(model: ir.Model) -> tuple[list[str], list[str]]:
    graph = model.graph
    return [str(value.name) for value in graph.inputs], [str(value.name) for value in graph.outputs]


def is_sound(model: ir.Model) -> str:
    """Every value that an output needs exists before it is read: as an input, a constant, or the output of an earlier
    node.

    Nodes that no output needs any more may read removed values: `clean` deletes them after the pass.
    """
    graph = model.graph
    known = {*graph.inputs, *graph.initializers.values()}
    for node in needed_nodes(model):
        for value in node.inputs:
            if value is not None and value not in known:
                return f"{node.op_type} {node.name or node.outputs[0].name} reads {value.name}, which is not there yet"
        known.update(node.outputs)
    lost = [value.name for value in graph.outputs if value not in known]
    return f"nothing makes {lost[0]}" if lost else ""


def needed_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes that an output depends on, in the graph's order."""
    found: set[ir.Node] = set()
    stack = [value.producer() for value in model.graph.outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.add(node)
            stack.extend(value.producer() for value in node.inputs if value is not None)
    return [node for node in model.graph if node in found]


def scale_in_weights(model: ir.Model) -> str:
    """No attention multiplies its query by a constant that could be folded into the query's weights."""
    for softmax in (node for node in needed_nodes(model) if node.op_type == "Softmax"):
        scores = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
        scale = _made_by(_behind_moves(scores.inputs[0]), "Mul") if scores is not None else None
        factor = scale.inputs[1] if scale is not None else None
        if scale is None or factor is None or factor.const_value is None or factor.const_value.size != 1:
            continue
        split = _made_by(scale.inputs[0], "Reshape")
        add = _made_by(split.inputs[0], "Add") if split is not None else None
        product = _made_by(add.inputs[0], "MatMul") if add is not None else None
        if add is not None and product is not None and weight_of(product.inputs[1]) and weight_of(add.inputs[1]):
            return f"{scale.outputs[0].name} is scaled after a product with weights"
    return ""


def functions_known(model: ir.Model) -> str:
    """Every node of our own or a plugin's domain has a function that defines what it computes, of all that it is
    given."""
    for node in needed_nodes(model):
        if not node.domain or node.domain not in model.opset_imports:
            continue
        function = model.functions.get((node.domain, node.op_type, ""))
        if function is None:
            return f"{node.domain}.{node.op_type} has no function"
        if unknown := sorted({*node.attributes} - {*function.attributes}):
            return f"the function {node.domain}.{node.op_type} has no attribute {unknown[0]}"
        if len(node.inputs) > len(function.inputs) or len(node.outputs) > len(function.outputs):
            return f"the function {node.domain}.{node.op_type} has fewer inputs or outputs than its node"
    return ""


def names_unique(model: ir.Model) -> str:
    """No two nodes and no two values share a name."""
    for what, names in (
        ("nodes", [node.name for node in model.graph]),
        ("values", [value.name for node in model.graph for value in node.outputs]),
    ):
        seen: set[str | None] = set()
        for name in names:
            if not name or name in seen:
                return f"two {what} are called {name}" if name else f"one of the {what} has no name"
            seen.add(name)
    return ""


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _behind_moves(value: ir.Value | None) -> ir.Value | None:
    """The value of which this one is only a reshaped and transposed copy."""
    while value is not None and (node := value.producer()) is not None and node.op_type in ("Reshape", "Transpose"):
        value = node.inputs[0]
    return value
