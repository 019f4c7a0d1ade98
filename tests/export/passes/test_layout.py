"""MLPs as convolutions, on graphs of a few nodes: what takes the flat layout and what does not, and the numbers against
NumPy."""

import numpy as np
import onnx_ir as ir
import pytest
from block_graphs import HIDDEN, MLP, NAMES, TOKENS, WIDTH, block, by_hand, images, norm, random_block
from export_graphs import computed, ops

from vit_convert.export.passes.cleanup import clean
from vit_convert.export.passes.mlp_as_convolution import as_tokens, mlps_to_convolutions

TOLERANCE = 1e-5  # of float32 sums of 128 products in another order; a weight turned wrongly is off by 1e-1


def flattened(model: ir.Model) -> int:
    """How many MLPs there are; what nobody reads any more goes away, as in an export."""
    count = mlps_to_convolutions(model)
    clean(model)
    return count


def agrees(model: ir.Model, expected: np.ndarray, x: np.ndarray, params: dict[str, np.ndarray] | None = None) -> None:
    got = computed(model, params or random_block(), x)[0]
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("count", [1, 3])
def test_a_block(count):
    model, x = block(), images(count)
    assert flattened(model) == 1
    agrees(model, by_hand(random_block(), x), x)
    operators = ops(model)
    assert operators.count("Conv") == 2 and operators.count("MatMul") == 6
    # the stream is made flat once and never back but for attention and the output
    flat = [
        value
        for node in model.graph
        for value in node.outputs
        if len(value.shape) == 4 and tuple(value.shape)[2:] == (1, 1)
    ]
    assert {node.op_type for value in flat if (node := value.producer())} == {
        "Reshape",
        "LayerNormalization",
        "Conv",
        "Relu",
        "Add",
    }
    assert all(value.shape[1] in (WIDTH, HIDDEN) and value.dtype == ir.DataType.FLOAT for value in flat)
    sources = [
        node.inputs[0]
        for node in model.graph
        if node.op_type == "Reshape" and tuple(node.outputs[0].shape)[2:] == (1, 1)
    ]
    assert len(sources) == len(set(sources))  # nothing is flattened twice


def test_the_form_of_an_mlp():
    model = block(attention=False)
    assert flattened(model) == 1
    assert ops(model) == ["Reshape", "LayerNormalization", "Conv", "Relu", "Conv", "Add", "Reshape"]
    convolutions = [node for node in model.graph if node.op_type == "Conv"]
    assert [tuple(node.inputs[1].shape) for node in convolutions] == [(HIDDEN, WIDTH, 1, 1), (WIDTH, HIDDEN, 1, 1)]
    assert [tuple(node.attributes["kernel_shape"].as_ints()) for node in convolutions] == [(1, 1), (1, 1)]
    assert [[value.name for value in node.inputs[1:]] for node in convolutions] == [
        [NAMES["fc1"], NAMES["b1"]],
        [NAMES["fc2"], NAMES["b2"]],
    ]
    agrees(model, by_hand(random_block(), images(), attention=False), images())


def test_outputs_keep_their_name_and_their_layout():
    """Also one that is not the last: what a user's module calls a tap."""
    hidden = f"float[n, {TOKENS}, {HIDDEN}] a"
    model = block(attention=False, outputs=f"float[n, {TOKENS}, {WIDTH}] y, {hidden}")
    assert flattened(model) == 1
    assert [(value.name, tuple(value.shape)[1:]) for value in model.graph.outputs] == [
        ("y", (TOKENS, WIDTH)),
        ("a", (TOKENS, HIDDEN)),
    ]
    y, a = computed(model, random_block(), images())
    p = {word: random_block()[name] for word, name in NAMES.items()}
    expected = np.maximum(norm(images(), p["gamma"], p["beta"]) @ p["fc1"] + p["b1"], 0)
    np.testing.assert_allclose(a, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    np.testing.assert_allclose(y, expected @ p["fc2"] + p["b2"] + images(), rtol=0, atol=TOLERANCE * 10)


def test_epsilon_of_a_norm_that_says_none():
    """ONNX's is 1e-5: beside a variance of 1e-6 it is most of what is divided by."""
    model, x = block(attention=False, edit=(", epsilon = 0.1", "")), images() * np.float32(1e-3)
    assert flattened(model) == 1
    p = {word: random_block()[name].astype(np.float64) for word, name in NAMES.items()}
    y = np.maximum(norm(x, p["gamma"], p["beta"], 1e-5) @ p["fc1"] + p["b1"], 0)
    agrees(model, x + y @ p["fc2"] + p["b2"], x)


@pytest.mark.parametrize("which", ["b1", "b2"])
def test_a_bias_that_is_added_by_hand(which):
    """[1, 1, N] instead of [N]: a convolution wants a vector."""
    columns = MLP[which][0]
    model = block(attention=False, edit=(f"float[{columns}] {which}", f"float[1, 1, {columns}] {which}"))
    assert flattened(model) == 1
    params = random_block()
    params[NAMES[which]] = params[NAMES[which]].reshape(1, 1, columns)
    convolutions = [node for node in model.graph if node.op_type == "Conv"]
    assert [list(node.inputs[2].shape) for node in convolutions] == [[HIDDEN], [WIDTH]]
    agrees(model, by_hand(params, images(), attention=False), images(), params)


@pytest.mark.parametrize(
    "edit",
    [
        (f"float[{HIDDEN}] b1", f"float[{TOKENS}, {HIDDEN}] b1"),  # another bias for each token
        (f"float[{HIDDEN}] b1", "float[1] b1"),  # one for all channels
        (f"float[{HIDDEN}] b1", f"float[{TOKENS}, 1] b1"),
        ("s1 = Add (p1, b1)", "s1 = Mul (p1, b1)"),
        ("s1 = Add (p1, b1)", "s1 = Add (p1, p1)"),
        # the product is read twice
        ("s1 = Add (p1, b1) a = Relu (s1)", "q1 = Add (p1, b1) s1 = Relu (p1) a = Add (s1, q1)"),
        ("a = Relu (s1)", "s = Relu (s1) a = Mul (s, b1)"),  # a scale for each channel
        ("a = Relu (s1) p2 = MatMul (a, fc2)", "p2 = MatMul (s1, fc2)"),  # nothing between
        ("a = Relu (s1)", "a = Softmax <axis = -1> (s1)"),
        ("s2 = Add (p2, b2)", "s2 = Relu (p2)"),
        ("p1 = MatMul (n, fc1)", "nn = Relu (n) p1 = MatMul (nn, fc1)"),  # something behind the norm
        ("y = Add (s2, z)", "t = Add (s2, z) y = Add (t, n)"),  # the norm is read twice
        (
            "n = LayerNormalization <axis = -1, epsilon = 0.1> (z, gamma, beta)",
            "gz = Mul (z, gamma) n = Add (gz, beta)",
        ),
        (f"float[n, {TOKENS}, {WIDTH}] z", f"float[n, m, {WIDTH}] z"),  # a number of tokens that is not known
    ],
)
def test_what_is_left_alone(edit):
    model = block(attention=False, edit=edit)
    before = ops(model)
    assert flattened(model) == 0 and ops(model) == before


@pytest.mark.parametrize(
    "activation",
    [
        "a = Mul (s1, half)",
        "h = Sigmoid (s1) a = Mul (s1, h)",
        "t = Mul (half, s1) u = Tanh (t) v = Add (u, half) a = Mul (v, s1)",
        "c = Cast <to = 1> (s1) a = Sqrt (c)",
    ],
)
def test_activations_of_several_nodes_take_the_layout(activation):
    model = block(attention=False, edit=("a = Relu (s1)", activation))
    assert flattened(model) == 1
    between = ops(model)[ops(model).index("Conv") + 1 :]
    assert "Reshape" not in between[: between.index("Conv")]


def test_a_gate_over_all_channels_is_no_elementwise_operator():
    """A scalar that is computed has no value to be known by: the layout ends there."""
    model = block(
        attention=False, edit=("y = Add (s2, z)", "g = ReduceMean <axes = [1, 2], keepdims = 1> (s2) y = Add (s2, g)")
    )
    assert flattened(model) == 1
    p = {word: random_block()[name].astype(np.float64) for word, name in NAMES.items()}
    branch = np.maximum(norm(images(), p["gamma"], p["beta"]) @ p["fc1"] + p["b1"], 0) @ p["fc2"] + p["b2"]
    agrees(model, branch + branch.mean((1, 2), keepdims=True), images())


def test_a_norm_that_no_dense_layer_reads_keeps_its_layout():
    model = block(
        attention=False, edit=("y = Add (s2, z)", "u = Add (s2, z) y = LayerNormalization <axis = -1> (u, gamma, beta)")
    )
    assert flattened(model) == 1
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert [len(node.outputs[0].shape) for node in norms] == [4, 3]


def test_a_flat_value_as_tokens():
    model = block(attention=False)
    flattened(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    flat = values["s2"]
    assert tuple(flat.shape)[1:] == (WIDTH, 1, 1)
    model.graph.outputs.append(as_tokens(model.graph, flat))
    assert model.graph.outputs[-1].name == "s2" and flat.name == "s2/flat"
    assert [str(dim) for dim in model.graph.outputs[-1].shape] == ["batch", str(TOKENS), str(WIDTH)]
    y, s2 = computed(model, random_block(), images())
    np.testing.assert_allclose(y, s2 + images(), rtol=0, atol=1e-6)
    assert as_tokens(model.graph, model.graph.inputs[0]) is model.graph.inputs[0]
    assert as_tokens(model.graph, values["y"]) is values["y"]
