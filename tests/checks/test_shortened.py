"""Blocks that are equal but for weights are left out; what differs in anything else is kept, and is still found."""

import numpy as np
import onnx
import pytest
from onnx import helper
from repeated import DEPTH, WIDTH, block_nodes, forward, model

from vit_convert.checks.onnx_graph import check_graph_and_itself
from vit_convert.checks.shortened import shortened
from vit_convert.core.compare import Tolerance
from vit_convert.core.consistency import ALONE, FINITE, IDENTICAL, PERMUTED
from vit_convert.core.onnx_file import run_session
from vit_convert.quantize.activation_max import extremes

TOLERANCE = Tolerance(1e-5, 1e-5, 0.999)
ROWS = np.random.default_rng(1).normal(size=(4, WIDTH)).astype(np.float32)
PROBES = np.float32([[0.5, -1, 0.25, 0.1], [0, 0, 0, 0], [9, 9, 9, 9], [0.5, -1, 0.25, 0.1]])


def session(proto):
    import onnxruntime

    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def checked(folder, proto, count=4, measured=()):
    """The rows, findings and blocks left out of a check against what NumPy gives."""
    onnx.save(proto, folder / "model.onnx")
    reference = {"x": ROWS[:count], **forward(ROWS[:count])}
    judged = [name for name in reference if name != "x"]
    options = {"judged": judged, "outputs": ["logits"], "inputs": ["x"], "measured": measured}
    return check_graph_and_itself(folder / "model.onnx", reference, {"x": PROBES}, TOLERANCE, **options)


def test_equal_blocks_are_left_out_and_the_last_of_them_stays():
    whole = model()
    before = whole.SerializeToString()
    short = shortened(whole)
    assert short.left_out == ("block_01", "block_02", "block_03") and whole.SerializeToString() == before
    got = run_session(session(short.proto), {"x": ROWS})["logits"]
    np.testing.assert_allclose(got, forward(ROWS, [0, 4])["logits"], rtol=1e-5, atol=1e-5)
    names = {tensor.name for tensor in short.proto.graph.initializer}
    assert not [name for name in names if "block_1" in name or "block_2" in name or "block_3" in name]
    assert {"encoderblock_0/kernel", "encoderblock_4/kernel", "floor", "two", "axis_1"} <= names
    onnx.checker.check_model(short.proto, full_check=True)


@pytest.mark.parametrize("depth", [1, 2])
def test_two_blocks_of_which_one_follows_the_stem_are_all_there_is(depth):
    assert shortened(model(depth=depth)) is None


def changed(block, **options):
    return {"nodes": {block: block_nodes(block, f"block_{block - 1:02d}", **options)}}


def with_nodes(block, change):
    nodes = block_nodes(block, f"block_{block - 1:02d}")
    change(nodes)
    return {"nodes": {block: nodes}}


def another_operator(nodes):
    nodes[0].op_type = "Neg"


def another_attribute(nodes):
    nodes[1].attribute[0].i = 0
    nodes[2].input[0] = nodes[1].input[0]  # of the same shape, so that the graph stays valid


def another_source(nodes):
    nodes[3].input[0] = nodes[0].output[0]


def inputs_in_another_order(nodes):
    nodes[6].input[:] = nodes[6].input[::-1]


def an_earlier_block(nodes):
    nodes[3].input[0] = "block_00"


def a_body(nodes):
    body = helper.make_graph(
        [helper.make_node("Identity", ["encoderblock_2/most"], ["inner"])],
        "b",
        [],
        [helper.make_tensor_value_info("inner", 1, None)],
    )
    nodes.insert(2, helper.make_node("If", ["yes"], ["encoderblock_2/chosen"], then_branch=body, else_branch=body))


@pytest.mark.parametrize(
    "options",
    [
        changed(2, axis=0),
        changed(2, floor="two"),
        *(with_nodes(2, change) for change in (another_operator, another_source, inputs_in_another_order)),
        with_nodes(2, an_earlier_block),
        with_nodes(2, another_attribute),
    ],
)
def test_a_block_that_differs_stays(options):
    """Of blocks 1, 2, 3 and 4, the last two are equal still."""
    short = shortened(model(**options))
    assert short.left_out == ("block_03",)
    assert {"block_01", "block_02"} <= {name for node in short.proto.graph.node for name in node.output}


def test_what_counts_as_a_weight():
    """A constant of its own that a block has: by content, unless it is an array of floats named after the block."""
    for number, (shape, kind, same) in enumerate(
        [((WIDTH,), np.float32, True), ((), np.float32, False), ((1,), np.float32, False), ((WIDTH,), np.int64, False)]
    ):
        values, nodes = {}, {}
        for block in range(1, DEPTH):
            name = f"encoderblock_{block}/own"
            values[name] = np.full(shape, block + 1, kind)
            nodes[block] = block_nodes(block, f"block_{block - 1:02d}")
            nodes[block].insert(2, helper.make_node("Cast", [name], [f"{name}/cast"], to=1))
            nodes[block][3].input[1] = f"{name}/cast"
        short = shortened(model(nodes=nodes, values=values))
        assert (short is not None) is same, number
        values = {name: np.full_like(value, 3) for name, value in values.items()}
        assert shortened(model(nodes=nodes, values=values)) is not None, number


def test_a_constant_that_is_not_named_after_its_block_counts_by_content():
    """As a mask of a window: floats, but not weights."""
    for values, left in (([1.0] * 5, 3), ([1.0, 1.0, 1.0, 1.0, 2.0], 2)):
        masks = {f"mask_{block}": np.full((WIDTH,), value, np.float32) for block, value in enumerate(values)}
        nodes = {
            block: block_nodes(block, f"block_{block - 1:02d}", floor=f"mask_{block}") for block in range(1, DEPTH)
        }
        assert len(shortened(model(nodes=nodes, values=masks)).left_out) == left


def test_scales_of_pairs_are_weights():
    values, nodes = {}, {}
    for block in range(1, DEPTH):
        name = f"encoderblock_{block}"
        values[f"{name}/scale"] = np.float32(0.1 * block)
        nodes[block] = block_nodes(block, f"block_{block - 1:02d}")
        nodes[block][5].input[0] = f"{name}/dequantized"
        nodes[block][5:5] = [
            helper.make_node("QuantizeLinear", [f"{name}/turned", f"{name}/scale"], [f"{name}/quantized"]),
            helper.make_node("DequantizeLinear", [f"{name}/quantized", f"{name}/scale"], [f"{name}/dequantized"]),
        ]
    assert shortened(model(nodes=nodes, values=values)).left_out == ("block_01", "block_02", "block_03")


def test_a_block_that_something_else_reads_is_not_left_out():
    assert shortened(model(outputs=("block_02",))).left_out == ("block_01",)  # and 3 and 4 are apart from it
    assert shortened(model(outputs=("encoderblock_2/scaled",))) is None
    assert shortened(model(**with_nodes(2, a_body), values={"yes": np.array(True)})) is None


@pytest.mark.parametrize(("count", "sizes"), [(1, {1}), (2, {2}), (3, {3}), (4, {4})])
def test_a_right_graph_passes_by_one_whole_run(tmp_path, count, sizes):
    found = checked(tmp_path, model(), count)
    assert all(row.passed for row in [*found.rows, *found.alone]) and {row.batch for row in found.rows} == sizes
    assert [row.tensor for row in found.rows] == [*(f"block_{block:02d}" for block in range(DEPTH)), "logits"]
    checks = [FINITE] if count == 1 else [FINITE, ALONE] if count == 2 else [FINITE, IDENTICAL, PERMUTED, ALONE]
    assert [row.check for row in found.alone] == checks
    assert found.left_out == ("block_01", "block_02", "block_03") and found.answers["logits"].shape == (count, WIDTH)


@pytest.mark.parametrize("block", range(DEPTH))
def test_a_wrong_weight_is_found_in_every_block(tmp_path, block):
    """Also in those that are left out of the checks without a reference."""
    name = f"encoderblock_{block}/kernel"
    kernel = onnx.numpy_helper.to_array(next(t for t in model().graph.initializer if t.name == name)).copy()
    kernel[1, 2] += 0.01
    found = checked(tmp_path, model(values={name: kernel}))
    missed = [row.tensor for row in found.rows if not row.passed]
    assert missed[0] == f"block_{block:02d}" and "logits" in missed and found.left_out


@pytest.mark.parametrize("block", range(1, DEPTH))
def test_a_block_that_mixes_rows_is_found_wherever_it_is(tmp_path, block):
    found = checked(tmp_path, model(**changed(block, axis=0)))
    assert f"block_{block:02d}" not in found.left_out
    assert {row.check for row in found.alone if not row.passed} == {ALONE}  # the largest of a batch has no order


def test_blocks_that_all_mix_rows_are_found(tmp_path):
    nodes = {block: block_nodes(block, f"block_{block - 1:02d}", axis=0) for block in range(1, DEPTH)}
    found = checked(tmp_path, model(nodes=nodes))
    assert found.left_out and {row.check for row in found.alone if not row.passed} == {ALONE}


def test_blocks_that_divide_by_what_is_zero_on_black_are_found(tmp_path):
    """With biases of zero, so that black stays black; it is in no row of the reference."""
    values = {f"encoderblock_{block}/bias": np.zeros(WIDTH, np.float32) for block in range(DEPTH)}
    found = checked(tmp_path, model(values=values | {"floor": np.float32(0)}))
    (row,) = [row for row in found.alone if row.check == FINITE]
    assert not row.passed and row.where == "black" and found.left_out


def test_extremes_are_those_of_a_run_of_their_own(tmp_path):
    names = ["x", "block_02", "encoderblock_3/scaled"]
    found = checked(tmp_path, model(), measured=names).extremes
    assert found == extremes(tmp_path / "model.onnx", names, [ROWS]) and list(found) == names
    low, high = found["block_02"]
    expected = forward(ROWS)["block_02"]
    assert (low, high) == (pytest.approx(expected.min(), abs=1e-5), pytest.approx(expected.max(), abs=1e-5))
    without = checked(tmp_path, model(outputs=("encoderblock_2/scaled",)), measured=names)
    assert without.left_out == () and without.extremes == {}  # no run has all rows
