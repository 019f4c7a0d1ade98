"""SmoothQuant on graphs of a few nodes: the paper's factors in float64, and which readers of a LayerNorm it can be done
for."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vit_convert.core.onnx_file import open_session, run_session, save_onnx
from vit_convert.core.operators import ADD_NORM, NORM
from vit_convert.quantize.placement import Site
from vit_convert.quantize.smooth import find_norms, smooth

CHANNELS, TOKENS, OUT = 6, 4, 5
GRAPH = """<ir_version: 9, opset_import: ["" : 17]>
g (float[N, 4, 6] images) => ({outputs})
<float[6] scale, float[6] bias, float[6, 5] w, float[5, 6, 1, 1] c, float[6, 1, 1, 1] depth, float[4, 4] left,
 float[6] shift, int64[4] beside = {{-1, 6, 1, 1}}, int64[3] back = {{-1, 4, 6}}, int64[2] flat = {{-1, 24}},
 int64 first = {{0}}> {{
    norm = LayerNormalization <axis = -1, epsilon = 1e-6> (images, scale, bias)
    {nodes}
}}"""


def model(*nodes, outputs="float[N, 4, 5] y", weights=()):
    proto = onnx.parser.parse_model(GRAPH.format(nodes="\n    ".join(nodes), outputs=outputs))
    rng = np.random.default_rng(0)
    given = {
        "scale": rng.uniform(0.001, 0.01, CHANNELS),  # so that what the linears read stays far below 1
        "bias": rng.normal(0, 0.001, CHANNELS),
        "w": rng.normal(0, 0.3, (CHANNELS, OUT)),
        "c": rng.normal(0, 0.3, (OUT, CHANNELS, 1, 1)),
        "depth": rng.normal(0, 0.3, (CHANNELS, 1, 1, 1)),
        "left": rng.normal(0, 0.3, (TOKENS, TOKENS)),
        "shift": np.ones(CHANNELS),
        **dict(weights),
    }
    for name, value in given.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, np.float32), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto)), given


def site(tensor, node, weight):
    return Site("block_00", "fc", tensor, node, weight)


MATMUL = ("y = MatMul (norm, w)",), [site("norm", "y", "w")]
CONV = (
    ("r = Reshape (norm, beside)", "k = Conv (r, c)", "t = Squeeze (k)", "y = Identity (t)"),
    [site("r", "k", "c")],
)
BOTH = (
    (
        "first_half = MatMul (norm, w)",
        "r = Reshape (norm, beside)",
        "k = Conv (r, c)",
        "t = Flatten (k)",
        "y = Identity (t)",
    ),
    [site("norm", "first_half", "w"), site("r", "k", "c")],
)


def rows(name, weights):
    """The largest |w| of each input channel."""
    return np.abs(weights[name]).max(1) if name == "w" else np.abs(weights[name]).max((0, 2, 3))


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75])
@pytest.mark.parametrize(("form", "read"), [(MATMUL, ["w"]), (CONV, ["c"]), (BOTH, ["w", "c"])])
def test_factors_of_small_values_and_dead_channels(form, read, strength):
    nodes, sites = form
    _, weights = model(*nodes, outputs="y")
    dead = {name: np.array(weights[name]) for name in ("w", "c")}
    dead["w"][4], dead["c"][:, 4] = 0, 0
    graph, weights = model(*nodes, outputs="y", weights=dead)
    channels = np.array([0.02, 0.5, 0.003, 0.0, 0.7, 0.9], np.float32)
    found = smooth(graph, sites, {"norm": channels}, strength=strength)
    largest = np.max([rows(name, weights) for name in read], axis=0)
    live = np.array([True, True, True, False, False, True])  # one channel never has a value, one meets no weight
    expected = np.ones(CHANNELS)
    expected[live] = channels[live].astype(np.float64) ** strength / largest[live] ** (1 - strength)
    np.testing.assert_allclose(found.factors["norm"], expected, rtol=1e-5)
    assert found.declined == {}
    changed = {name: value.const_value.numpy() for name, value in found.model.graph.initializers.items()}
    assert all(value.const_value.name == name for name, value in found.model.graph.initializers.items())
    np.testing.assert_allclose(changed["scale"], weights["scale"] / expected, rtol=1e-5)
    np.testing.assert_allclose(changed["bias"], weights["bias"] / expected, rtol=1e-5)
    for name in ("w", "c"):
        factor = (expected[:, None] if name == "w" else expected[None, :, None, None]) if name in read else 1.0
        np.testing.assert_allclose(changed[name], weights[name] * factor, rtol=1e-5)


def test_the_graph_computes_what_it_did(tmp_path):
    nodes = ("a = MatMul (norm, w)", "r = Reshape (norm, beside)", "k = Conv (r, c)", "y = Flatten (k)")
    graph, _ = model(*nodes, outputs="float[N, 4, 5] a, float[M, 5] y")
    images = np.random.default_rng(1).normal(size=(3, TOKENS, CHANNELS)).astype(np.float32)
    channels = np.array([0.02, 0.5, 0.003, 0.01, 0.7, 0.9], np.float32)
    smoothed = smooth(graph, [site("norm", "a", "w"), site("r", "k", "c")], {"norm": channels}).model
    for name, each in (("before", graph), ("after", smoothed)):
        save_onnx(each, tmp_path / f"{name}.onnx")
    before, after = (run_session(open_session(tmp_path / f"{name}.onnx"), images) for name in ("before", "after"))
    for name in ("a", "y"):
        # six products of rounded factors
        assert np.abs(before[name] - after[name]).max() < 1e-6 * np.abs(before[name]).max() * 10


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (("y = MatMul (norm, w)",), ""),
        (("z = Gather <axis = 1> (norm, first)", "y = MatMul (z, w)"), ""),  # a choice of tokens
        (("r = Reshape (norm, beside)", "y = Conv (r, c)"), ""),
        (("r = Reshape (norm, beside)", "b = Reshape (r, back)", "y = MatMul (b, w)"), ""),  # beside the batch and back
        (("z = Relu (norm)", "y = MatMul (norm, w)"), "Relu one reads it too"),
        (("z = Gather <axis = 2> (norm, first)", "y = MatMul (norm, w)"), "Gather one reads it too"),  # a channel
        (("z = Reshape (norm, flat)", "y = MatMul (norm, w)"), "Reshape one reads it too"),
        (
            ("r = Reshape (norm, beside)", "z = Conv <group = 6> (r, depth)", "y = MatMul (norm, w)"),
            "Conv one reads it too",
        ),
        (("z = MatMul (left, norm)", "y = MatMul (norm, w)"), "MatMul one reads it too"),  # tokens are mixed by it
        (("r = Reshape (norm, beside)", "z = Sigmoid (r)", "y = MatMul (norm, w)"), "Sigmoid one reads it too"),
    ],
)
def test_who_else_reads_a_norm(nodes, said):
    graph, _ = model(*nodes, outputs="y")
    named = next(
        (node for node in graph.graph if said and node.op_type == said.split()[0] and node.outputs[0].name == "z"), None
    )
    if named is not None:
        named.name = "one"
    last = next(node for node in graph.graph if node.outputs[0].name == "y")
    sites = [site(last.inputs[0].name, "y", last.inputs[1].name)]
    norms, declined = find_norms(graph, sites)
    if said:
        assert norms == [] and declined == {"norm": said}
        return
    assert declined == {} and [norm.tensor for norm in norms] == ["norm"]
    assert [node.outputs[0].name for node in norms[0].readers] == ["y"]
    assert [(node.op_type, index) for node, index in norms[0].parameters] == [
        ("LayerNormalization", 1),
        ("LayerNormalization", 2),
    ]


def test_a_norm_that_is_an_output_is_left_alone():
    graph, _ = model("y = MatMul (norm, w)", outputs="float[N, 4, 5] y, float[N, 4, 6] norm")
    assert find_norms(graph, [site("norm", "y", "w")]) == ([], {"norm": "it is an output of the graph"})


@pytest.mark.parametrize(
    ("before", "found"),
    [
        (("v = ReduceMean <axes = [-1]> (images)", "d = Sqrt (v)", "z = Div (images, d)"), True),
        (("v = ReduceMean <axes = [-1]> (images)", "d = Sqrt (v)", "z = Sub (images, d)"), False),
        (("v = ReduceMean <axes = [-1]> (images)", "z = Div (images, v)"), False),
        (("z = Div (images, shift)",), False),  # by a constant
        (("z = Identity (images)",), False),
        ((), False),  # of the input itself
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_norm_that_is_spelt_out_divides_by_a_deviation(before, found, swapped):
    source = "z" if before else "images"
    product, total = ("scale, " + source, "bias, m") if swapped else (source + ", scale", "m, bias")
    nodes = (*before, f"m = Mul ({product})", f"own = Add ({total})", "y = MatMul (own, w)")
    graph, _ = model(*nodes, outputs="y")
    norms, declined = find_norms(graph, [site("own", "y", "w")])
    assert declined == {} and [norm.tensor for norm in norms] == ["own"] * found
    if found:
        places = [(node.op_type, node.inputs[index].name) for node, index in norms[0].parameters]
        assert places == [("Mul", "scale"), ("Add", "bias")]


@pytest.mark.parametrize(
    ("first", "second"), [("Pow", "Add"), ("Sub", "Add"), ("Mul", "Sub"), ("Mul", "Mul"), ("And", "Add")]
)
def test_a_norm_that_is_spelt_out_ends_in_a_product_and_a_sum(first, second):
    nodes = (
        "v = ReduceMean <axes = [-1]> (images)",
        "d = Sqrt (v)",
        "z = Div (images, d)",
        "m = Mul (z, scale)",
        "own = Add (m, bias)",
    )
    graph, _ = model(*nodes, "y = MatMul (own, w)", outputs="y")
    for node in graph.graph:
        node.op_type = {"m": first, "own": second}.get(node.outputs[0].name, node.op_type)
    assert find_norms(graph, [site("own", "y", "w")]) == ([], {})


def test_what_reads_no_norm_and_what_is_no_linear():
    graph, _ = model("relu = Relu (norm)", "y = MatMul (relu, w)")
    assert find_norms(graph, [site("relu", "y", "w")]) == ([], {})
    # an attention's site has no weight
    assert find_norms(graph, [Site("block_00", "softmax", "norm", "y")]) == ([], {})
    assert find_norms(graph, [site("images", "y", "w")]) == ([], {})


@pytest.mark.parametrize("residual", [False, True])
def test_a_norm_of_our_kernels_is_its_last_output(residual):
    """One adds the residual first, and gives the sum too, which is no norm; scale and bias are its last inputs."""
    x, y, w = (ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in ("x", "y", "w"))
    vectors = [
        ir.Value(name=name, const_value=ir.tensor(np.ones(CHANNELS, np.float32), name=name))
        for name in ("scale", "bias")
    ]
    w.const_value, w.shape = ir.tensor(np.ones((CHANNELS, OUT), np.float32), name="w"), ir.Shape((CHANNELS, OUT))
    kernel = ADD_NORM if residual else NORM
    norm = ir.node(
        kernel, [x, *([y] if residual else []), *vectors], num_outputs=1 + residual, domain="ours", name="norm"
    )
    for value, name in zip(norm.outputs, ("sum", "norm")[-1 - residual :]):
        value.name = name
    linears = [ir.node("MatMul", [value, w], name=f"of {value.name}") for value in norm.outputs]
    for linear in linears:
        linear.outputs[0].name = linear.name
    graph = ir.Graph(
        [x, y], [linear.outputs[0] for linear in linears], nodes=[norm, *linears], initializers=[w, *vectors]
    )
    norms, declined = find_norms(
        ir.Model(graph, ir_version=9), [site(value.name, f"of {value.name}", "w") for value in norm.outputs]
    )
    assert declined == {} and [found.tensor for found in norms] == ["norm"]
    assert [node.inputs[index].name for node, index in norms[0].parameters] == ["scale", "bias"]
