"""Every way in which people write a Flax model converts, and gives what the user's own call gives."""

import importlib.machinery
import types

import numpy as np
import onnx
import pytest
from own_model import Own

from vit_convert.core.onnx_file import open_session, run_session

# Each: definitions, config.model, and how a person calls that model on images for inference.
KINDS = {
    "linen train keyword": (
        """
class M(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(5)(pooled(nn.Dropout(0.5)(nn.relu(x), deterministic=not train)))
""",
        "lambda: (M(), variables(M(), train=False))",
        "lambda x: M().apply(variables(M(), train=False), x, train=False)",
    ),
    "linen train is the default": (
        """
class M(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        return nn.Dense(5)(nn.Dropout(0.5, deterministic=not train)(pooled(x)))
""",
        "lambda: (M(), variables(M()))",
        "lambda x: M().apply(variables(M()), x, train=False)",
    ),
    "linen deterministic, merged in each layer": (
        """
class Block(nn.Module):
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic=None):
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        y = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5)(x, deterministic=deterministic)
        return x + nn.Dropout(0.5)(y, deterministic=deterministic)


class M(nn.Module):
    @nn.compact
    def __call__(self, x, is_training=None):
        x = nn.Dense(8)(x.reshape(x.shape[0], 16, -1))
        return nn.Dense(5)(Block()(x, None if is_training is None else not is_training).mean(1))
""",
        "lambda: (M(), variables(M(), is_training=False))",
        "lambda x: M().apply(variables(M(), is_training=False), x, is_training=False)",
    ),
    "linen that nothing tells whether it trains": (
        """
class Block(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=None):
        x = nn.BatchNorm()(x, use_running_average=deterministic)
        return nn.Dropout(0.5)(x, deterministic=deterministic)


class M(nn.Module):
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(pooled(Block()(nn.Conv(4, (3, 3))(x), self.deterministic)))
""",
        "lambda: (M(), variables(M(True)))",
        "lambda x: M(True).apply(variables(M(True)), x)",
    ),
    "linen bound to its variables": (
        """
class M(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(pooled(x))
""",
        "lambda: M().bind(variables(M()))",
        "lambda x: M().apply(variables(M()), x)",
    ),
    "linen frozen dictionary, boxed parameters": (
        """
class M(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = nn.with_partitioning(nn.initializers.ones, (None, "model"))
        return nn.Dense(5, kernel_init=kernel)(pooled(x))
""",
        "lambda: (M(), flax.core.freeze(variables(M())))",
        "lambda x: M().apply(variables(M()), x)",
    ),
    "linen in bfloat16": (
        """
class M(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        x = nn.gelu(nn.LayerNorm(**layer)(nn.Conv(8, (4, 4), strides=(4, 4), **layer)(x.astype(jnp.bfloat16))))
        def step(carry, _):
            return jnp.tanh(carry * jnp.bfloat16(0.5)), None
        x = step(step(x, None)[0], None)[0]
        return nn.Dense(5, **layer)(pooled(x)).astype(jnp.float32)
""",
        "lambda: (M(), variables(M()))",
        None,
    ),
    "nnx with dropout, batch statistics, a key, a list, a table of indices": (
        """
class M(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(12)])
        self.drop, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, 5, rngs=rngs)
        self.order, self.on = nnx.Variable(jnp.array([3, 1, 2, 0])), nnx.Variable(jnp.array(True))

    def __call__(self, x):
        x = pooled(self.norm(self.conv(x)))[:, self.order[...]]
        for layer in self.layers:
            x = jnp.where(self.on[...], x + self.drop(nnx.tanh(layer(x))), 0)
        return self.head(x)


def make():
    m = M(nnx.Rngs(0))
    m.eval()
    return m
""",
        "make",
        "lambda x: make()(x)",
    ),
    "nnx told by its argument": (
        """
class M(nnx.Module):
    def __init__(self, rngs):
        self.drop, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(3, 5, rngs=rngs)

    def __call__(self, x, *, deterministic: bool):
        return self.head(self.drop(pooled(x), deterministic=deterministic))
""",
        "lambda: M(nnx.Rngs(0))",
        "lambda x: M(nnx.Rngs(0))(x, deterministic=True)",
    ),
    "function with whole numbers, switches, keys and names among its parameters": (
        """
def f(p, x, training=True):
    x = x.reshape(x.shape[0], p["sizes"][0], p["sizes"][1], 3)
    bias = jnp.take(p["table"], p["index"], axis=0).sum()
    assert p["kind"] == "mean" and p["key"] is not None and not training
    return (pooled(x) @ p["w"] + bias) * (2.0 if p["twice"] else 1.0) + p["steps"].astype(jnp.float32)


def params():
    index = np.array([[0, 1], [2, 3]], np.int32)
    static = {"sizes": (8, 32), "kind": "mean", "twice": True, "key": jax.random.key(0), "nothing": None}
    return {"w": W, "table": np.arange(4, dtype=np.float16), "index": index, "steps": np.uint8(3), **static}
""",
        "lambda: (f, params())",
        "lambda x: f(params(), x, training=False)",
    ),
    "function whose parameters are called like other tensors, or alike": (
        """
def f(p, x):
    return pooled(x + p["images"]) @ p["logits"] @ p["a/b"] @ p["a"]["b"] @ p["constant_0"] + p["MatMul"]


def params():
    square = lambda k: np.eye(5, dtype=np.float32) * k
    return {"images": np.float32([1, 2, 3]), "logits": W, "a/b": square(2), "a": {"b": square(3)},
    "constant_0": square(5), "MatMul": W[0]}
""",
        "lambda: (f, params())",
        "lambda x: f(params(), x)",
    ),
    "function of one array": ("def f(p, x):\n    return pooled(x) @ p\n", "lambda: (f, W)", "lambda x: f(W, x)"),
    "method, partial, float64": (
        """
import functools


class Scorer:
    def score(self, p, x, scale):
        return pooled(x) @ p["w"] * scale
""",
        'lambda: (functools.partial(Scorer().score, scale=2.0), {"w": W.astype(np.float64)})',
        'lambda x: Scorer().score({"w": W}, x, 2.0)',
    ),
}


def definitions(own: Own) -> types.ModuleType:
    module = types.ModuleType("mine")
    importlib.machinery.SourceFileLoader("mine", str(own.config)).exec_module(module)
    return module


@pytest.mark.parametrize("kind", [kind for kind, (_, _, call) in KINDS.items() if call])
def test_kind(tmp_path, kind):
    source, model, call = KINDS[kind]
    own = Own(tmp_path)
    assert own.convert(source, model) == 0
    images = np.random.default_rng(3).uniform(-1, 1, (7, 16, 16, 3)).astype(np.float32)
    expected = np.asarray(eval(call, definitions(own).__dict__)(images))
    got = run_session(open_session(own.bundle / "model.onnx"), images)["logits"]
    assert np.abs(expected).max() > 0.01 and np.ptp(expected, axis=0).max() > 1e-4  # each image has a result of its own
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert float_types(own) == {onnx.TensorProto.FLOAT}


def float_types(own: Own) -> set[int]:
    proto = onnx.load(own.bundle / "model.onnx", load_external_data=False)
    found = {tensor.data_type for tensor in proto.graph.initializer} | {
        v.type.tensor_type.elem_type for v in proto.graph.value_info
    }
    kinds = onnx.TensorProto
    return found & {kinds.FLOAT, kinds.DOUBLE, kinds.FLOAT16, kinds.BFLOAT16}


def test_bfloat16_is_converted_in_float32(tmp_path):
    """The graph holds no bfloat16, and lies nearer to the module made with float32 than to itself by what bfloat16
    drops."""
    source, model, _ = KINDS["linen in bfloat16"]
    own = Own(tmp_path)
    assert own.convert(source, model) == 0
    assert float_types(own) == {onnx.TensorProto.FLOAT}
    images = np.random.default_rng(3).uniform(-1, 1, (7, 16, 16, 3)).astype(np.float32)
    mine = definitions(own)
    half = np.asarray(eval("lambda x: M().apply(variables(M()), x)", mine.__dict__)(images))
    wide_source = own.config.read_text().replace("layer = dict(dtype=jnp.bfloat16", "layer = dict(dtype=jnp.float32")
    own.config.write_text(wide_source.replace("x.astype(jnp.bfloat16)", "x").replace("jnp.bfloat16(0.5)", "0.5"))
    wide = np.asarray(eval("lambda x: M().apply(variables(M()), x)", definitions(own).__dict__)(images))
    got = run_session(open_session(own.bundle / "model.onnx"), images)["logits"]
    assert np.abs(half - wide).max() > 1e-3 * np.abs(wide).max()  # bfloat16 has 8 binary digits
    np.testing.assert_allclose(got, wide, rtol=0, atol=1e-5 * np.abs(wide).max())
    (warning,) = own.report()["checkpoint"]["warnings"]
    assert "computes in bfloat16; it is converted in float32" in warning


def test_loops_and_branches_in_float16_too(tmp_path):
    source = """
def f(p, x):
    x = (pooled(x) @ p["w"]).astype(jnp.float16)
    x, _ = jax.lax.scan(lambda c, k: (c * k, None), x, jnp.array([2, 3], jnp.float16))
    x = jax.lax.cond(True, lambda v: v * jnp.float16(0.5), lambda v: v, x)
    return jax.checkpoint(jax.jit(lambda v: jax.nn.relu(v) - v))(x)
"""
    from vit_convert.families.user.widen import in_float32, other_floats

    own = Own(tmp_path)
    own.convert(source, 'lambda: (f, {"w": W})', "--until=checkpoint")
    mine = definitions(own)
    images = np.random.default_rng(3).uniform(-1, 1, (7, 16, 16, 3)).astype(np.float32)
    assert other_floats(mine.f, {"w": mine.W}, images) == ["float16"]
    wide = in_float32(mine.f)
    assert other_floats(wide, {"w": mine.W}, images) == []
    x = images.mean((1, 2)) @ mine.W * 3
    np.testing.assert_allclose(wide({"w": mine.W}, images), np.maximum(x, 0) - x, atol=1e-6)


def test_training_mode_is_spoken_of(tmp_path):
    source = """
class M(nnx.Module):
    def __init__(self, rngs):
        self.stem, self.norm = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(pooled(nnx.relu(self.norm(self.stem(x)))))
"""
    own = Own(tmp_path)
    assert own.convert(source, "lambda: M(nnx.Rngs(0))") == 5  # an image's result depends on the others
    assert own.report()["checkpoint"]["warnings"] == [
        "model M: norm still train: call model.eval() before you return it"
    ]
