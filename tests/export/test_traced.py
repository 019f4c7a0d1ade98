"""What a user's own module traces to: every lowering ends in the operators that TensorRT fuses, and agrees with JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_graphs import ops, run
from flax import linen, nnx

from vit_convert.core.errors import ExportError
from vit_convert.export import weights
from vit_convert.export.lower import substitute
from vit_convert.export.targets import TARGETS, lowering_named, target_named
from vit_convert.export.trace import trace
from vit_convert.families.user.model import user_model

TOKENS, WIDTH, HEADS = 9, 32, 2  # a layer takes [batch, 9, 32], standing in for images
# One layer of 32 inputs: each product and sum rounds at 6e-8 of values of order 1; a rule that is wrong is off by 1e-2.
TOLERANCE = 1e-5


def inputs(batch=3):
    return np.random.default_rng(0).standard_normal((batch, TOKENS, WIDTH)).astype(np.float32) + 0.3


def exported(module, variables=None, target="rtx", lowering=""):
    """Traces and rewrites a layer on [batch, 9, 32] and holds it against JAX; returns the graph's operators and each
    rule's count."""
    model = user_model(module, variables, image_shape=(TOKENS, WIDTH))
    graph = trace(model.apply, model.traced_shapes, model.signature.inputs, ["logits"], TARGETS[target].opset)
    weights.describe(graph)
    counts = substitute(graph, lowering_named(target, lowering) if lowering else target_named(target))
    weights.bind(graph, model.params)
    expected = model.run(inputs())["logits"]
    (got,) = run(graph, {"images": inputs()})
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()
    return ops(graph), {count.rule: count for count in counts}


def linen_layer(layer):
    """A Linen layer with parameters that are not the initial ones and zeros."""
    variables = layer.init(jax.random.key(0), jnp.zeros((1, TOKENS, WIDTH)))
    leaves, tree = jax.tree_util.tree_flatten(variables)
    rng = np.random.default_rng(1)
    return layer, jax.tree_util.tree_unflatten(
        tree, [leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    )


def nnx_layer(layer):
    """The same for an NNX layer."""
    graph, state = nnx.split(layer)
    rng = np.random.default_rng(1)
    return nnx.merge(
        graph,
        jax.tree_util.tree_map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), state),
    ), None


# --- LayerNorm ------------------------------------------------------------------------------------------------------

TWO_PASS = ["ReduceMean", "Sub", "Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"]
FORMS = [("rtx", "", ["LayerNormalization"]), ("trt8", "", ["LayerNormalization"]), ("trt8", "primitives", TWO_PASS)]


@pytest.mark.parametrize(("target", "lowering", "expected"), FORMS)
@pytest.mark.parametrize("use_fast_variance", [True, False])
@pytest.mark.parametrize(("use_scale", "use_bias"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_layer_norm(target, lowering, expected, use_fast_variance, use_scale, use_bias, library):
    options = {"use_fast_variance": use_fast_variance, "use_scale": use_scale, "use_bias": use_bias}
    makers = {
        "linen": lambda: linen_layer(linen.LayerNorm(**options)),
        "nnx": lambda: nnx_layer(nnx.LayerNorm(WIDTH, rngs=nnx.Rngs(0), **options)),
    }
    operators, _ = exported(*makers[library](), target, lowering)
    assert operators == expected


def centred(x):
    deviation = x - x.mean(-1, keepdims=True)
    return deviation, (deviation * deviation).mean(-1, keepdims=True)


def hand_sqrt(p, x):
    deviation, variance = centred(x)
    return deviation / jnp.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def hand_rsqrt(p, x):
    deviation, variance = centred(x)
    return deviation * jax.lax.rsqrt(variance + 1e-6) * p["scale"] + p["bias"]


def hand_var(p, x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def hand_first(p, x):
    deviation, variance = centred(x)
    return p["bias"] + p["scale"] * (jax.lax.rsqrt(variance + 1e-6) * deviation)


@pytest.mark.parametrize(("target", "lowering", "expected"), FORMS)
@pytest.mark.parametrize("norm", [hand_sqrt, hand_rsqrt, hand_var, hand_first, lambda p, x: jax.nn.standardize(x)])
def test_hand_written_norm(target, lowering, expected, norm):
    rng = np.random.default_rng(2)
    params = {name: rng.standard_normal((1, 1, WIDTH)).astype(np.float32) for name in ("scale", "bias")}
    operators, _ = exported(norm, params, target, lowering)
    assert operators == expected


def test_norm_over_tokens_is_reported():
    def norm(p, x):
        deviation = x - x.mean(1, keepdims=True)
        return deviation / jnp.sqrt((deviation * deviation).mean(1, keepdims=True) + 1e-6)

    operators, counts = exported(norm)
    assert "LayerNormalization" not in operators
    assert counts["TwoPassLayerNorm"].declined == {"the mean is over axes [1], not the last one of 3": 1}


# --- attention ------------------------------------------------------------------------------------------------------


def split_heads(p, x):
    q, k, v = jnp.split(x @ p["qkv"], 3, -1)
    return (t.reshape(*t.shape[:2], HEADS, WIDTH // HEADS) for t in (q, k, v))


def named(p, x):
    q, k, v = split_heads(p, x)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(WIDTH // HEADS).astype(np.float32)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape) @ p["out"]


def query_scaled(p, x):
    q, k, v = split_heads(p, x)
    weights_ = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", 0.25 * q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights_, v).reshape(x.shape) @ p["out"]


def heads_first(p, x):
    q, k, v = (t.transpose(0, 2, 1, 3) for t in split_heads(p, x))
    weights_ = jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", q, k) * 0.25)
    return jnp.einsum("bhqk,bhkd->bhqd", weights_, v).transpose(0, 2, 1, 3).reshape(x.shape) @ p["out"]


def matmuls(p, x):
    q, k, v = (t.transpose(0, 2, 1, 3) for t in split_heads(p, x))
    return (jax.nn.softmax(0.25 * (q @ k.swapaxes(-1, -2))) @ v).transpose(0, 2, 1, 3).reshape(x.shape) @ p["out"]


def projected(p, x):
    shape = (WIDTH, HEADS, WIDTH // HEADS)
    q, k, v = (jnp.einsum("bsd,dhk->bshk", x, kernel.reshape(shape)) for kernel in jnp.split(p["qkv"], 3, -1))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q / 4.0, k)), v)
    return jnp.einsum("bshk,hkd->bsd", mixed, p["out"].reshape(HEADS, WIDTH // HEADS, WIDTH))


def imported_softmax(p, x, softmax=jax.nn.softmax):
    """`from jax.nn import softmax`: jax2onnx, which replaces the attribute of jax.nn, does not see it."""
    q, k, v = split_heads(p, x)
    weights_ = softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.25)
    return jnp.einsum("bhqk,bkhd->bqhd", weights_, v).reshape(x.shape) @ p["out"]


def library(module):
    return lambda p, x: module.dot_product_attention(*split_heads(p, x)).reshape(x.shape) @ p["out"]


HAND_WRITTEN = {
    "named": named,
    "query_scaled": query_scaled,
    "heads_first": heads_first,
    "matmuls": matmuls,
    "projected": projected,
    "imported_softmax": imported_softmax,
    "jax.nn": library(jax.nn),
    "linen": library(linen),
    "nnx": library(nnx),
}


def assert_fusible(operators):
    """Scale, MatMul, Softmax and MatMul in a row; nothing of Einsum left."""
    assert "Einsum" not in operators
    arithmetic = [operator for operator in operators if operator not in ("Transpose", "Reshape", "Add", "Split")]
    softmax = arithmetic.index("Softmax")
    assert arithmetic[softmax - 2 : softmax + 2] == ["Mul", "MatMul", "Softmax", "MatMul"]
    assert operators.count("Mul") == 1


@pytest.mark.parametrize("target", ["trt8", "rtx"])
@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_attention(target, name):
    rng = np.random.default_rng(2)
    params = {
        part: rng.standard_normal((WIDTH, n * WIDTH)).astype(np.float32) / 6 for part, n in (("qkv", 3), ("out", 1))
    }
    operators, _ = exported(HAND_WRITTEN[name], params, target)
    assert_fusible(operators)
    assert operators.count("MatMul") == (6 if name == "projected" else 4)


@pytest.mark.parametrize("target", ["trt8", "rtx"])
@pytest.mark.parametrize(("library", "use_bias"), [("linen", True), ("linen", False), ("nnx", True)])
def test_attention_modules(target, use_bias, library):
    if library == "linen":
        layer = linen_layer(linen.MultiHeadDotProductAttention(HEADS, deterministic=True, use_bias=use_bias))
    else:
        layer = nnx_layer(nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0)))
    operators, _ = exported(*layer, target)
    assert_fusible(operators)
    assert operators.count("MatMul") == 6
    assert operators.count("Add") == (4 if use_bias else 0)
    assert operators.count("Reshape") == 4


def test_what_jax2onnx_cannot_trace_is_an_export_error():
    layer = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, use_bias=False, rngs=nnx.Rngs(0))
    with pytest.raises(ExportError, match=r"jax2onnx could not trace the model: TypeError: .*nnx\.linear_general"):
        exported(layer)


def test_einsum_that_no_rule_takes_is_reported():
    operators, counts = exported(lambda p, x: jnp.einsum("bsd,bsd->bs", x, x)[..., None] * x)
    assert "Einsum" in operators
    assert list(counts["EinsumToMatMul"].declined) == [
        "the equation bsd,bsd->bs has more or fewer axes than a batched matrix product"
    ]


def test_imported_dot_product_attention_is_right_and_reported():
    """`from jax.nn import dot_product_attention` traces to grouped five-axis products, which stay."""
    rng = np.random.default_rng(2)
    params = {
        part: rng.standard_normal((WIDTH, n * WIDTH)).astype(np.float32) / 6 for part, n in (("qkv", 3), ("out", 1))
    }
    imported = jax.nn.dot_product_attention
    operators, counts = exported(lambda p, x: imported(*split_heads(p, x)).reshape(x.shape) @ p["out"], params)
    assert operators.count("Einsum") == sum(counts["EinsumToMatMul"].declined.values()) == 2


# --- GELU and linear layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [jax.nn, linen, nnx])
@pytest.mark.parametrize("approximate", [True, False])
def test_gelu(module, approximate):
    imported = module.gelu  # as a module's `act: Callable = nn.gelu` has it, which jax2onnx does not recognise
    for gelu in (
        lambda p, x: module.gelu(x, approximate=approximate),
        lambda p, x: imported(x, approximate=approximate),
    ):
        assert exported(gelu)[0] == ["Gelu"]
        for lowering, inner, budget in (("", "Tanh", 8), ("matmul", "Exp", 7)):
            operators, _ = exported(gelu, target="trt8", lowering=lowering)
            assert operators.count(inner if approximate else "Erf") == 1
            assert len(operators) <= budget


@pytest.mark.parametrize(
    ("target", "lowering", "expected"),
    [
        ("trt8", "", ["Pow", "Mul", "Add", "Mul", "Tanh", "Add", "Mul", "Mul"]),
        ("trt8", "matmul", ["Mul", "Mul", "Add", "Mul", "Exp", "Add", "Div"]),
        ("rtx", "", ["Gelu"]),
    ],
)
def test_hand_written_gelu(target, lowering, expected):
    def gelu(p, x):
        return 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi).astype(np.float32) * (x + 0.044715 * x**3)))

    assert exported(gelu, target=target, lowering=lowering)[0] == expected


@pytest.mark.parametrize("target", ["trt8", "rtx"])
@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (linen_layer(linen.Dense(16)), ["MatMul", "Add"]),
        (linen_layer(linen.Dense(16, use_bias=False)), ["MatMul"]),
        (nnx_layer(nnx.Linear(WIDTH, 16, rngs=nnx.Rngs(0))), ["MatMul", "Add"]),
        (nnx_layer(nnx.Linear(WIDTH, 16, use_bias=False, rngs=nnx.Rngs(0))), ["MatMul"]),
        (
            (
                lambda p, x: x @ p["w"] + p["b"],
                {"w": np.ones((WIDTH, 5), np.float32), "b": np.ones((1, 1, 5), np.float32)},
            ),
            ["MatMul", "Add"],
        ),
        ((lambda p, x: jnp.einsum("...d,df->...f", x, p["w"]), {"w": np.eye(WIDTH, 5, dtype=np.float32)}), ["MatMul"]),
        (
            linen_layer(linen.Sequential([linen.Dense(8), linen.Dropout(0.5, deterministic=True), linen.Dense(4)])),
            ["MatMul", "Add"] * 2,
        ),
    ],
)
def test_linear_layers(target, layer, expected):
    assert exported(*layer, target)[0] == expected
