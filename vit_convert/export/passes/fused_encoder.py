"""An encoder of INT8 convolutions: between them the kernels of `vit_convert/kernels`, which read and write INT8 rows,
and a stream in FP16.

TensorRT's own LayerNorm cannot write INT8, and its FP16 attention cannot read it, so each would need two kernels that
do nothing but convert. As with TensorRT's attention plugin, a model-local function defines what a node computes for
every other reader of the file.
"""

import dataclasses
from collections.abc import Collection

import onnx_ir as ir

from vit_convert.core.errors import ExportError
from vit_convert.core.operators import ADD_NORM, ATTENTION, NORM
from vit_convert.export.passes.attention_plugin import CAUSAL, DOMAIN, PLUGIN, is_causal
from vit_convert.export.passes.contract import GraphPass, functions_known, names_unique, needed_nodes
from vit_convert.export.passes.prune_to_pooled_token import ELEMENTWISE

_READERS = {"Conv", ATTENTION, ADD_NORM, *ELEMENTWISE}  # of what may be INT8
MAX_WIDTH = 2048  # limit of the kernels, which keep a row in the registers of one warp


def encoder_to_half_kernels(model: ir.Model) -> int:
    """As `encoder_to_kernels`, with all that the kernels read and write in FP16."""
    return encoder_to_kernels(model, quantized=False)


def encoder_to_kernels(model: ir.Model, *, quantized: bool = True) -> int:
    """Turns attention plugins, LayerNorms and the residual additions before these into nodes of our kernels, in place.

    Args:
        model: a ViT after `attention_to_plugin`, its nodes named.
        quantized: whether what convolutions and attention read is INT8.

    Returns:
        The number of such nodes.

    Raises:
        ExportError: there is no kernel for the model's width.
    """
    graph = model.graph
    attentions = [node for node in graph if node.op_type == PLUGIN]
    norms = [node for node in graph if node.op_type == "LayerNormalization" and _is_flat(node)]
    widths = {node.attributes["hidden_size"].as_int() for node in attentions}
    if width := next((width for width in sorted(widths, reverse=True) if width > MAX_WIDTH or width % 32), 0):
        raise ExportError(
            f"lowering {'fused' if quantized else 'kernels'}: a width of {width}; the kernels are for multiples of "
            f"32 up to {MAX_WIDTH}",
            fix="Leave it out of `lowerings`.",
        )
    causal = any(is_causal(node) for node in attentions)
    for node in attentions:
        _replace_attention(graph, node, quantized, causal)
    for node in norms:
        _replace_norm(graph, node, quantized)
    opset = model.opset_imports[""]
    del model.functions[DOMAIN, PLUGIN, ""]
    for function in (_attention_function(opset, causal), _norm_function(ADD_NORM, opset), _norm_function(NORM, opset)):
        model.functions[function.identifier()] = function
    return len(attentions) + len(norms)


def norms_to_half_kernels(model: ir.Model) -> int:
    """Turns LayerNorms between convolutions, and the residual additions before these, into nodes of our kernels, in
    FP16 and in place, in a model whose attention uses our kernels already.

    Args:
        model: with named nodes.

    Returns:
        The number of such nodes.
    """
    graph, opset = model.graph, model.opset_imports[""]
    norms = [node for node in graph if node.op_type == "LayerNormalization" and _is_flat(node)]
    for node in norms:
        _replace_norm(graph, node, quantized=False)
    for function in (_norm_function(ADD_NORM, opset), _norm_function(NORM, opset)):
        model.functions[function.identifier()] = function
    return len(norms)


def has_attention_plugins(model: ir.Model) -> str:
    """Attention uses TensorRT's plugin, which our kernels replace."""
    return "" if any(node.op_type == PLUGIN for node in needed_nodes(model)) else f"no node is {PLUGIN}"


def no_attention_plugin(model: ir.Model) -> str:
    """None of TensorRT's plugins is left; our kernels do not support their layout."""
    left = [node.name for node in needed_nodes(model) if node.op_type == PLUGIN]
    return f"{left[0]} is {PLUGIN}" if left else ""


_BEFORE, _AFTER = (has_attention_plugins, names_unique), (no_attention_plugin, functions_known)
ENCODER_TO_KERNELS = GraphPass(encoder_to_kernels, requires=_BEFORE, ensures=_AFTER)
ENCODER_TO_HALF_KERNELS = GraphPass(encoder_to_half_kernels, requires=_BEFORE, ensures=_AFTER)


def write_in_fp16(model: ir.Model, tensors: Collection[str]) -> None:
    """Makes our kernels write some tensors in FP16 instead of INT8, in place, so that the products that read these stay
    in FP16.

    Args:
        model: after `encoder_to_kernels`.
        tensors: names of the kernels' outputs; for the outputs of other nodes it is enough to give them no range.
    """
    for node in model.graph:
        if node.domain == DOMAIN and node.outputs[-1].name in tensors:
            node.attributes["quantized"] = ir.AttrInt64("quantized", 0)


def with_what_leads_to(model: ir.Model, tensors: Collection[str]) -> set[str]:
    """Some tensors, and those between each of them and the convolution that it comes from.

    If only these had ranges, TensorRT could end that convolution's kernel in INT8, before the activation function.

    Args:
        model: after `encoder_to_kernels`.
        tensors: names of the convolutions' inputs.
    """
    found = {*tensors}
    for node in reversed(list(model.graph)):
        if node.op_type in ELEMENTWISE and node.outputs[0].name in found:
            found |= {value.name or "" for value in node.inputs if value is not None and value.producer() is not None}
    return found


def quantized_tensors(model: ir.Model, *, branches: bool = False) -> tuple[list[str], list[str]]:
    """The tensors of such an encoder that TensorRT may hold in INT8: all but the residual stream, and what other nodes
    read, such as a hybrid's GroupNorms: the check on the CPU would not compute that in INT8.

    Args:
        model: after `encoder_to_kernels`.
        branches: also what is added to the stream; it has a few large channels, so that a single scale for all is
            costly.

    Returns:
        Names of the convolutions' inputs, and of the other outputs of convolutions, of the activation functions after
        them, and of our kernels.
    """
    read: list[str] = []
    other: list[str] = []
    after: set[ir.Node] = set()  # convolutions and the activation functions after them
    for node in model.graph:
        value = node.outputs[-1]
        if any(user.op_type not in _READERS for user, _ in value.uses()):
            continue
        names = read if any(user.op_type == "Conv" for user, _ in value.uses()) else other
        if node.op_type == "Conv" or (node.op_type in ELEMENTWISE and all(p in after for p in node.predecessors())):
            after.add(node)
            if branches or not any(user.op_type == ADD_NORM and index == 0 for user, index in value.uses()):
                names.append(value.name or "")
        elif node.domain == DOMAIN and node.attributes["quantized"].as_int():
            names.append(value.name or "")
    return read, other


def _is_flat(norm: ir.Node) -> bool:
    shape = norm.outputs[0].shape
    return shape is not None and len(shape) == 4 and tuple(shape)[2:] == (1, 1)


def _replace_attention(graph: ir.Graph, old: ir.Node, quantized: bool, causal: bool) -> None:
    qkv, _, _, longest = old.inputs
    assert qkv is not None and longest is not None and longest.shape is not None
    tokens = longest.shape[0]
    assert isinstance(tokens, int)
    heads = old.attributes["num_heads"].as_int()
    settings = {
        "heads": heads,
        "tokens": tokens,
        "head": old.attributes["hidden_size"].as_int() // heads,
        "int8_in": int(quantized),
        **({CAUSAL: int(is_causal(old))} if causal else {}),  # if the model has any
    }
    node = ir.node(
        ATTENTION,
        [qkv],
        {**settings, **plugin_settings(quantized and _feeds_convolutions(old.outputs[0]))},
        domain=DOMAIN,
    )
    take_over(graph, old, node.outputs[0], old.outputs[0])


def _replace_norm(graph: ir.Graph, norm: ir.Node, quantized: bool) -> None:
    source, gamma, beta = norm.inputs[:3]
    assert source is not None
    settings = {
        "epsilon": norm.attributes["epsilon"].as_float(),
        **plugin_settings(quantized and _feeds_convolutions(norm.outputs[0])),
    }
    add = source.producer()
    branch = _branch(add) if add is not None and add.op_type == "Add" else None
    if add is None or branch is None or source.is_graph_output():
        node = ir.node(NORM, [source, gamma, beta], settings, domain=DOMAIN)
        take_over(graph, norm, node.outputs[0], norm.outputs[0])
        return
    residual = add.inputs[1 - add.inputs.index(branch)]
    node = ir.node(ADD_NORM, [branch, residual, gamma, beta], settings, num_outputs=2, domain=DOMAIN)
    take_over(graph, norm, node.outputs[1], norm.outputs[0], at=add)
    sum_ = node.outputs[0]
    sum_.shape, sum_.type, sum_.name, source.name = source.shape, source.type, source.name, None
    ir.convenience.replace_all_uses_with(source, sum_)
    graph.remove(add, safe=True)


def plugin_settings(quantized: bool) -> dict[str, int | float | str]:
    """Attributes that every node needs for TensorRT; scales of 0 are taken from the tensors' ranges."""
    return {"quantized": int(quantized), "plugin_version": "1", "plugin_namespace": ""}


def _branch(add: ir.Node) -> ir.Value | None:
    """The operand of a residual addition that a convolution computes."""
    found = [
        value
        for value in add.inputs
        if value is not None and (p := value.producer()) is not None and p.op_type == "Conv"
    ]
    return found[0] if len(found) == 1 else None


def _feeds_convolutions(value: ir.Value) -> bool:
    return all(user.op_type == "Conv" for user, _ in value.uses()) and not value.is_graph_output()


def take_over(graph: ir.Graph, old: ir.Node, new: ir.Value, value: ir.Value, *, at: ir.Node | None = None) -> None:
    """Inserts a node in place of another (or before `at`); its output takes over the other's name and readers.

    Args:
        graph: holds the other node.
        old: the node to remove.
        new: output of the node to insert.
        value: output of `old` that `new` replaces.
        at: a node before `old` in the graph.
    """
    new.shape, new.type, new.name, value.name = value.shape, value.type, value.name, None
    node = new.producer()
    assert node is not None
    node.name = old.name
    graph.insert_before(at or old, node)
    ir.convenience.replace_all_uses_with(value, new, replace_graph_outputs=True)
    graph.remove(old, safe=True)


@dataclasses.dataclass
class Body:
    """Nodes of a function's body."""

    nodes: list[ir.Node] = dataclasses.field(default_factory=list)

    def add(self, op_type: str, *inputs: ir.Value, **attributes) -> ir.Value:
        self.nodes.append(ir.node(op_type, list(inputs), attributes))
        return self.nodes[-1].outputs[0]

    def numbers(self, *values: int) -> ir.Value:
        return self.add("Constant", value_ints=list(values))

    def given(self, name: str) -> ir.Value:
        """An attribute of the call as a tensor of one element."""
        node = ir.Node("", "Constant", [], [ir.RefAttr("value_int", name, ir.AttributeType.INT)], num_outputs=1)
        self.nodes.append(node)
        return self.add("Reshape", node.outputs[0], self.numbers(1))

    def function(
        self, name: str, inputs: list[ir.Value], outputs: list[ir.Value], opset: int, **attributes: ir.AttributeType
    ) -> ir.Function:
        graph = ir.Graph(inputs, outputs, nodes=self.nodes, opset_imports={"": opset}, name=name)
        kinds = {**attributes, "quantized": ir.AttributeType.INT}
        kinds |= dict.fromkeys(("plugin_version", "plugin_namespace"), ir.AttributeType.STRING)
        return ir.Function(
            DOMAIN, name, graph=graph, attributes=[ir.Attr(word, kind, None) for word, kind in kinds.items()]
        )


def _attention_function(opset: int, causal: bool) -> ir.Function:
    """softmax(q kᵀ / √d) v of each image and head, in ONNX's own operators; in a model with causal attention, each node
    says whether it is causal."""
    qkv, body = ir.Value(name="qkv"), Body()
    heads, size = body.given("heads"), body.given("head")
    split = body.add("Concat", body.numbers(-1), body.given("tokens"), heads, body.numbers(3), size, axis=0)
    # [3, images, heads, tokens, d]
    parts = body.add("Transpose", body.add("Reshape", qkv, split), perm=[3, 0, 2, 1, 4])
    query, key, value = (body.add("Gather", parts, body.add("Constant", value_int=i), axis=0) for i in range(3))
    scores = body.add("MatMul", query, body.add("Transpose", key, perm=[0, 1, 3, 2]))
    scores = body.add("Div", scores, body.add("Sqrt", body.add("Cast", size, to=int(ir.DataType.FLOAT))))
    if causal:  # -60 000 for keys later than the query
        tokens, low = body.given("tokens"), body.add("Constant", value_float=-60_000.0)
        ones = body.add("Expand", low, body.add("Concat", tokens, tokens, axis=0))
        later = body.add("Trilu", ones, body.add("Constant", value_int=1), upper=1)
        scores = body.add(
            "Add", scores, body.add("Mul", later, body.add("Cast", body.given(CAUSAL), to=int(ir.DataType.FLOAT)))
        )
    attended = body.add("Transpose", body.add("MatMul", body.add("Softmax", scores, axis=-1), value), perm=[0, 2, 1, 3])
    width = body.add("Mul", heads, size)
    context = body.add("Reshape", attended, body.add("Concat", body.numbers(-1), width, body.numbers(1, 1), axis=0))
    names = ("heads", "tokens", "head", "int8_in", *((CAUSAL,) if causal else ()))
    kinds = dict.fromkeys(names, ir.AttributeType.INT)
    return body.function(ATTENTION, [qkv], [context], opset, **kinds)


def _norm_function(name: str, opset: int) -> ir.Function:
    """LayerNorm over the channels, of the sum with the branch if there is one."""
    branch, residual, gamma, beta = (ir.Value(name=word) for word in ("branch", "residual", "gamma", "beta"))
    body = Body()
    total = body.add("Add", branch, residual) if name == ADD_NORM else residual
    attributes = [ir.AttrInt64("axis", 1), ir.RefAttr("epsilon", "epsilon", ir.AttributeType.FLOAT)]
    body.nodes.append(ir.Node("", "LayerNormalization", [total, gamma, beta], attributes, num_outputs=1))
    result, kinds = body.nodes[-1].outputs[0], {"epsilon": ir.AttributeType.FLOAT}
    if name == ADD_NORM:
        return body.function(name, [branch, residual, gamma, beta], [total, result], opset, **kinds)
    return body.function(name, [residual, gamma, beta], [result], opset, **kinds)
