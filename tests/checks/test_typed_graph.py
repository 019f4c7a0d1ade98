"""A graph that only has other types is told from one that computes in another way, and is not asked again what does not
depend on types."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from repeated import DEPTH, block_nodes, forward, model
from test_shortened import PROBES, ROWS

from vit_convert.checks.onnx_graph import check_graph_and_itself
from vit_convert.checks.typed import same_but_for_types
from vit_convert.core.compare import Tolerance
from vit_convert.core.consistency import ALONE
from vit_convert.quantize.half_precision import to_bf16, to_fp16

BY_COSINE = Tolerance(0.0, np.inf, 0.99)


def typed(proto, to=to_fp16, **options):
    return ir.to_proto(to(ir.from_proto(proto), **options).model)


@pytest.mark.parametrize("to", [to_fp16, to_bf16])
@pytest.mark.parametrize("options", [{}, {"keep_fp32": ("block_02",)}, {"keep_fp32": ("*/product", "block_0*")}])
def test_a_typed_graph_is_the_same_with_or_without_islands(to, options):
    graph = typed(model(), to, **options)
    assert len(graph.graph.node) > len(model().graph.node)  # Casts
    assert same_but_for_types(model(), graph) and same_but_for_types(graph, model())


def test_weights_may_be_other_ones_and_constants_may_be_nodes():
    """As those of a graph of equal structure; a Constant and an initializer are the same."""
    values = {"encoderblock_2/kernel": np.ones((4, 4), np.float32), "two": np.float32(3)}
    assert same_but_for_types(model(), model(values=values))
    graph = model()
    tensor = next(tensor for tensor in graph.graph.initializer if tensor.name == "axis_1")
    node = helper.make_node("Constant", [], ["axis_1"], value=tensor)
    graph.graph.node.insert(0, node)
    graph.graph.initializer.remove(tensor)
    assert same_but_for_types(model(), graph)


def operator(nodes):
    nodes[0].op_type = "Neg"


def attribute(nodes):
    nodes[4].attribute[0].ints[:] = [1, 0]


def source(nodes):
    nodes[3].input[0] = nodes[0].output[0]


def one_more(nodes):
    nodes.insert(4, helper.make_node("Identity", [nodes[3].output[0]], ["again"]))
    nodes[5].input[0] = "again"


def no_longer_a_float(nodes):
    """Rounds to integers and back: the second Cast alone does not count."""
    nodes.insert(4, helper.make_node("Cast", [nodes[3].output[0]], ["whole"], to=onnx.TensorProto.INT32))
    nodes.insert(5, helper.make_node("Cast", ["whole"], ["back"], to=onnx.TensorProto.FLOAT))
    nodes[6].input[0] = "back"


@pytest.mark.parametrize("change", [operator, attribute, source, one_more, no_longer_a_float])
def test_another_node_or_connection_is_another_graph(change):
    graph = model()
    nodes = [node for node in graph.graph.node if "encoderblock_2/" in node.output[0] or node.output[0] == "block_02"]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    change(kept)
    before = [node for node in graph.graph.node if node.output[0] not in {name for one in nodes for name in one.output}]
    place = next(number for number, node in enumerate(before) if "encoderblock_3/" in node.output[0])
    new = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (*before[:place], *kept, *before[place:])]
    del graph.graph.node[:]
    graph.graph.node.extend(new)
    assert not same_but_for_types(model(), graph) and not same_but_for_types(typed(model()), graph)


def test_integers_and_shapes_and_outputs_count():
    assert not same_but_for_types(model(), model(values={"axis_1": np.array([0])}))
    assert not same_but_for_types(model(), model(values={"two": np.full((4,), 2, np.float32)}))
    assert not same_but_for_types(model(), model(outputs=("block_02",)))
    assert not same_but_for_types(model(), model(depth=DEPTH - 1))


def test_what_is_the_same_is_run_once_on_all_rows_and_what_is_not_is_asked_again(tmp_path):
    """A graph that mixes rows is found beside one that does not; rows are what tells, since its weights are right."""
    onnx.save(model(), tmp_path / "model.onnx")
    mixing = {block: block_nodes(block, f"block_{block - 1:02d}", axis=0) for block in range(1, DEPTH)}
    onnx.save(typed(model()), tmp_path / "typed.onnx")
    onnx.save(typed(model(nodes=mixing)), tmp_path / "mixing.onnx")
    reference = {"x": ROWS, **forward(ROWS)}
    options = {"judged": ["logits"], "outputs": ["logits"], "inputs": ["x"], "like": tmp_path / "model.onnx"}
    found = check_graph_and_itself(tmp_path / "typed.onnx", reference, {"x": PROBES}, BY_COSINE, **options)
    assert (found.like, found.alone, found.left_out) == ("model.onnx", [], ()) and {
        row.batch for row in found.rows
    } == {4}
    assert [row.passed for row in found.rows if row.tensor == "logits"] == [True]
    assert found.answers["logits"].shape == (4, 4)
    found = check_graph_and_itself(tmp_path / "mixing.onnx", reference, {"x": PROBES}, BY_COSINE, **options)
    assert found.like == "" and ALONE in {row.check for row in found.alone if not row.passed}
