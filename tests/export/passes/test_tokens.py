"""MLPs as convolutions over tokens [batch · tokens, width, 1, 1]: the form, where it ends, and that the numbers stay
JAX's."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import onnx_ir as ir
import pytest
from export_graphs import architecture, random_images, run
from exported_vit import assert_agrees, reference, tiny, written

from vit_convert.checks.onnx_graph import check_graph
from vit_convert.core.compare import Tolerance
from vit_convert.core.onnx_file import open_session, run_session
from vit_convert.export import weights
from vit_convert.export.exporter import export_model
from vit_convert.export.lower import onnx_from_apply
from vit_convert.export.targets import LOWERINGS, TARGETS, target_named
from vit_convert.families.user.model import user_model

MATRIX_PRODUCTS = ["matmul", "primitives"]  # the lowerings of trt8 without such convolutions


def convolutions(graph):
    """The 1 × 1 convolutions: those of the MLPs, and not the patch embedding."""
    return [node for node in graph if node.op_type == "Conv" and tuple(node.inputs[1].shape)[2:] == (1, 1)]


def blocks_of(graph):
    """The nodes of each encoder block, in order."""
    blocks = collections.defaultdict(list)
    for node in graph:
        if node.name.startswith("Transformer/encoderblock_"):
            blocks[node.name.split("/")[1]].append(node)
    return list(blocks.values())


# --- the form -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pool", "depth"), [("tok", 1), ("tok", 3), ("gap", 3), ("map", 2)])
def test_form_of_a_block(tmp_path, pool, depth):
    arch = architecture(pool=pool, depth=depth)
    report = written(arch, tmp_path / "model.onnx", target="trt8")
    graph = ir.load(tmp_path / "model.onnx").graph
    blocks = blocks_of(graph)
    assert len(blocks) == depth
    for number, nodes in enumerate(blocks):
        scope = f"Transformer/encoderblock_{number}"
        products = [
            node.inputs[1].name for node in nodes if node.op_type == "MatMul" and node.inputs[1].is_initializer()
        ]
        assert products == [
            f"{scope}/MultiHeadDotProductAttention_0/{part}/kernel" for part in ("query", "key", "value", "out")
        ]
        layers = convolutions(nodes)
        assert [node.inputs[1].name for node in layers] == [f"{scope}/MlpBlock_0/Dense_{i}/kernel" for i in (0, 1)]
        assert [tuple(node.inputs[1].shape) for node in layers] == [(64, 32, 1, 1), (32, 64, 1, 1)]
        assert [len(node.inputs) for node in layers] == [3, 3]  # the bias inside
        norms = [node for node in nodes if node.op_type == "LayerNormalization"]
        assert [node.attributes["axis"].as_int() for node in norms] == [1, 1]
        assert {tuple(value.shape) for node in norms for value in node.inputs[1:]} == {(32, 1, 1)}
        # Out of the flat layout for attention, one for each of query, key and value, one to merge the heads, and back
        # into the layout. The pruned block needs the residual stream in both layouts, for its norm and to take the
        # pooled token: one more.
        pruned = pool == "tok" and number == depth - 1
        assert sum(node.op_type == "Reshape" for node in nodes) == (7 if pruned else 6)
    mlps = depth + (pool == "map")
    assert len(convolutions(graph)) == 2 * mlps
    assert {rule.rule: rule.applied for rule in report.rules}["mlps_to_convolutions"] == mlps


@pytest.mark.parametrize("pool", ["tok", "gap"])
def test_the_residual_stream_keeps_the_layout(tmp_path, pool):
    """Between two blocks the stream passes no Reshape, and inside one only the output of the attention does before it
    is added."""
    arch = architecture(pool=pool)
    written(arch, tmp_path / "model.onnx", target="trt8")
    values = {value.name: value for node in ir.load(tmp_path / "model.onnx").graph for value in node.outputs}
    for number in range(1, arch.depth - (pool == "tok")):
        scope = f"Transformer/encoderblock_{number}"
        middle, mlp = values[f"block_{number:02d}"].producer().inputs
        assert mlp.name == f"{scope}/MlpBlock_0/Dense_1/Conv"
        before, attention = middle.producer().inputs
        assert before is values[f"block_{number - 1:02d}"]
        assert attention.producer().op_type == "Reshape"
        assert attention.producer().inputs[0].name == f"{scope}/MultiHeadDotProductAttention_0/out/Add"
        assert values[f"{scope}/LayerNorm_0/LayerNormalization"].producer().inputs[0] is before
        assert values[f"{scope}/LayerNorm_1/LayerNormalization"].producer().inputs[0] is middle


def test_nothing_but_the_activation_stands_between_the_convolutions(tmp_path):
    written(architecture(), tmp_path / "model.onnx", target="trt8")
    for nodes in blocks_of(ir.load(tmp_path / "model.onnx").graph):
        first, second = (nodes.index(node) for node in convolutions(nodes))
        assert [node.op_type for node in nodes[first:second]] == [
            "Conv",
            "Pow",
            "Mul",
            "Add",
            "Mul",
            "Tanh",
            "Add",
            "Mul",
            "Mul",
        ]


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", MATRIX_PRODUCTS)
@pytest.mark.parametrize("pool", ["tok", "gap", "map", "none"])
def test_other_lowerings_agree_and_have_no_convolutions(tmp_path, lowering, pool):
    arch = architecture(pool=pool)
    written(arch, tmp_path / "model.onnx", target="trt8", lowering=lowering)
    graph = ir.load(tmp_path / "model.onnx").graph
    assert not convolutions(graph)
    assert any(node.op_type == "LayerNormalization" for node in graph) is (lowering == "matmul")
    assert_agrees(arch, tmp_path / "model.onnx")


@pytest.mark.parametrize("pool", ["tok", "map"])
def test_lowerings_compute_the_same(tmp_path, pool):
    arch = architecture(pool=pool)
    results = {}
    for lowering in ("", *MATRIX_PRODUCTS):
        path = tmp_path / f"{lowering}.onnx"
        written(arch, path, target="trt8", lowering=lowering)
        results[lowering] = run_session(open_session(path), random_images(arch))["logits"]
    for lowering in MATRIX_PRODUCTS:
        # float32 rounding, 6e-8 each, of the same sums in another order and of GELU in another form, over three blocks
        np.testing.assert_allclose(results[lowering], results[""], rtol=0, atol=1e-5 * np.abs(results[""]).max())


def test_taps_are_outputs_with_the_batch_first(tmp_path):
    """What asks for taps gets every token, in the layout of every other target."""
    arch = architecture()
    written(arch, tmp_path / "model.onnx", target="trt8", taps=True)
    images = random_images(arch)
    shapes = {name: value.shape for name, value in run_session(open_session(tmp_path / "model.onnx"), images).items()}
    assert shapes == {
        "logits": (5, 7),
        **{f"block_{i:02d}": (5, 13, 32) for i in range(3)},
        "encoder_norm": (5, 13, 32),
    }
    known = {"images": images, **reference(arch)}
    rows = check_graph(
        tmp_path / "model.onnx", known, [1, 3, 5], Tolerance(atol=1e-5, rtol=1e-5, cosine=0.99999), judged=list(shapes)
    )
    assert [row.tensor for row in rows if row.passed] == [name for name in known if name != "images"]


@pytest.mark.parametrize("taps", [False, True])
def test_the_check_sees_a_wrong_tap(tmp_path, taps):
    """Inside the graph taps are flat, as outputs they are not: the check reads both."""
    arch = architecture()
    written(arch, tmp_path / "model.onnx", target="trt8", taps=taps)
    known = {"images": random_images(arch), **reference(arch)}
    known["block_01"] = np.roll(known["block_01"], 1, axis=1)  # tokens in another order: right only as a set
    rows = check_graph(
        tmp_path / "model.onnx",
        known,
        [3],
        Tolerance(atol=1e-5, rtol=1e-5, cosine=0.99999),
        judged=["block_00", "block_01"],
    )
    assert {row.tensor: row.passed for row in rows if row.passed is not None} == {"block_00": True, "block_01": False}


# --- a user's own MLPs ----------------------------------------------------------------------------------------------

TOKENS, WIDTH, HIDDEN = 6, 32, 48  # a module takes [batch, 6, 32], standing in for images
_gelu = jax.nn.gelu  # by this name jax2onnx does not recognise it, and erfc traces with its scalar as the first operand
SHAPES = {
    "scale": (WIDTH,),
    "bias": (WIDTH,),
    "fc1": (WIDTH, HIDDEN),
    "b1": (HIDDEN,),
    "fc2": (HIDDEN, WIDTH),
    "b2": (WIDTH,),
}


def params(**more):
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal(shape).astype(np.float32) / 5 for name, shape in {**SHAPES, **more}.items()}


def norm(p, x):
    deviation = x - x.mean(-1, keepdims=True)
    return deviation * jax.lax.rsqrt((deviation**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def mlp(p, x, activation=jax.nn.gelu):
    return activation(x @ p["fc1"] + p["b1"]) @ p["fc2"] + p["b2"]


def converted(forward, leaves, *, num_mlps):
    """Holds the trt8 graph of a module against JAX and against how many MLPs are expected to be convolutions."""
    model = user_model(forward, leaves, image_shape=(TOKENS, WIDTH))
    built = onnx_from_apply(
        model.apply,
        model.traced_shapes,
        model.signature.inputs,
        [model.output],
        model.traced_taps,
        TARGETS["trt8"],
        prune=False,
    )
    weights.bind(built.model, model.params)
    for batch in (1, 3):
        images = np.random.default_rng(batch).standard_normal((batch, TOKENS, WIDTH)).astype(np.float32)
        expected = model.run(images)["logits"]
        (got,) = run(built.model, {"images": images})
        assert got.shape == expected.shape
        # Two products of 32 and 48 terms round at 6e-8 of values of order 1; a weight turned wrongly is off by 1e-1.
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    assert len(convolutions(built.model.graph)) == 2 * num_mlps
    assert {count.rule: count.applied for count in built.rules}["mlps_to_convolutions"] == num_mlps
    return built.model.graph


ACTIVATIONS = {
    "gelu": (jax.nn.gelu, 1),
    "gelu_erf": (lambda x: jax.nn.gelu(x, approximate=False), 1),
    "gelu_erfc": (lambda x: _gelu(x, approximate=False), 1),
    "quick_gelu": (lambda x: x * jax.nn.sigmoid(1.702 * x), 1),
    "relu": (jax.nn.relu, 1),
    "maximum": (lambda x: jnp.maximum(x, 0.0), 1),
    "silu": (jax.nn.silu, 1),
    "scalar_first": (lambda x: 1.0 - jnp.tanh(x), 1),
    "leaky_relu": (jax.nn.leaky_relu, 0),  # Where is none of the operators that are known to work element by element
    "none": (lambda x: x, 0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("last", ["mean", "residual", "mlp"])
def test_activations(name, last):
    """Whatever the activation and whatever comes last: the graph's output keeps its name and its layout."""
    activation, num_mlps = ACTIVATIONS[name]

    def forward(p, x):
        y = mlp(p, norm(p, x), activation)
        return {"mean": lambda: (x + y).mean(1), "residual": lambda: x + y, "mlp": lambda: y}[last]()

    graph = converted(forward, params(), num_mlps=num_mlps)
    assert [value.name for value in graph.outputs] == ["logits"]


@pytest.mark.parametrize("absent", ["b1", "b2"])
def test_an_mlp_without_bias_is_left_alone(absent):
    def forward(p, x):
        hidden = norm(p, x) @ p["fc1"]
        hidden = jax.nn.gelu(hidden + p["b1"] if "b1" in p else hidden) @ p["fc2"]
        return (x + (hidden + p["b2"] if "b2" in p else hidden)).mean(1)

    leaves = params()
    del leaves[absent]
    graph = converted(forward, leaves, num_mlps=0)
    assert [tuple(node.inputs[1].shape) for node in graph if node.op_type == "MatMul"] == [SHAPES["fc1"], SHAPES["fc2"]]


def test_a_gated_mlp_is_left_alone():
    """The norm has two readers, fc1 and the gate: neither is an MLP by itself."""

    def forward(p, x):
        y = norm(p, x)
        return (x + ((jax.nn.silu(y @ p["gate"]) * (y @ p["fc1"] + p["b1"])) @ p["fc2"] + p["b2"])).mean(1)

    converted(forward, params(gate=(WIDTH, HIDDEN)), num_mlps=0)


def test_a_hidden_layer_with_another_reader_is_left_alone():
    def forward(p, x):
        hidden = jax.nn.gelu(norm(p, x) @ p["fc1"] + p["b1"])
        return (x + (hidden @ p["fc2"] + p["b2"])).mean(1) + hidden.mean((1, 2))[:, None]

    converted(forward, params(), num_mlps=0)


def test_a_scale_on_the_branch_leaves_the_layout():
    """A LayerScale is a vector over the last axis of [batch, tokens, width]."""

    def forward(p, x):
        return (x + p["gamma"] * mlp(p, norm(p, x))).mean(1)

    converted(forward, params(gamma=(WIDTH,)), num_mlps=1)


def test_weights_of_another_reader_keep_their_name():
    """A tied kernel and a shared norm: the convolution's form gets a name of its own, and goes by the same
    parameter."""

    def forward(p, x):
        x = x + mlp(p, norm(p, x))
        return norm(p, x).mean(1) @ p["fc1"]

    leaves = params()
    graph = converted(forward, leaves, num_mlps=1)
    shapes = {name: tuple(value.shape) for name, value in graph.initializers.items() if name.split(".")[0] in leaves}
    assert shapes == {
        "scale": (32,),
        "scale.1": (32, 1, 1),
        "bias": (32,),
        "bias.1": (32, 1, 1),
        "fc1": (32, 48),
        "fc1.1": (48, 32, 1, 1),
        "b1": (48,),
        "fc2": (32, 48, 1, 1),
        "b2": (32,),
    }
    np.testing.assert_array_equal(graph.initializers["fc1.1"].const_value.numpy()[..., 0, 0], leaves["fc1"].T)
    np.testing.assert_array_equal(graph.initializers["fc1"].const_value.numpy(), leaves["fc1"])


# --- several image sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "num_convolutions"),
    [(target_named("trt8", dynamic=True), 0), (TARGETS["trt8"], 2)],
    ids=["dynamic", "fixed"],
)
def test_a_dynamic_graph_has_no_such_convolutions(tmp_path, target, num_convolutions):
    """The number of tokens is not known, save the pruned block's one: the target for such graphs has none, the fixed
    one does no harm."""
    arch = architecture()
    export_model(tiny(arch), tmp_path / "model.onnx", target=target, dynamic_patch=arch.patch_size)
    graph = ir.load(tmp_path / "model.onnx").graph
    assert len(convolutions(graph)) == num_convolutions
    # GELU as it is quickest after a matrix product
    assert any(node.op_type == "Exp" for node in graph) is (num_convolutions == 0)
    assert_agrees(arch, tmp_path / "model.onnx", with_taps=False)


def test_the_target_for_dynamic_graphs():
    assert target_named("trt8", dynamic=True) == LOWERINGS["trt8"]["matmul"]
    assert target_named("rtx", dynamic=True) is TARGETS["rtx"]
