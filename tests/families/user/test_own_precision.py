"""A function computed in float32 whatever types it is written in, and what tells one function and its parameters from
another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_convert.families.user.identity import fingerprint
from vit_convert.families.user.widen import in_float32, other_floats

X = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
SHAPE = jax.ShapeDtypeStruct((2, 3), np.float32)

# --- types ----------------------------------------------------------------------------------------------------------


def scanned(x):
    return jax.lax.scan(
        lambda carry, k: (carry * k.astype(jnp.bfloat16), carry), x.astype(jnp.bfloat16), jnp.arange(1.0, 4.0)
    )[0]


def branched(x):
    half = x.astype(jnp.float16)
    return jax.lax.cond(x.sum() > 1e9, lambda v: v, lambda v: v / jnp.float16(3), half)


FUNCTIONS = {
    "cast": (
        lambda x: x.astype(jnp.bfloat16) * jnp.bfloat16(1 / 3),
        lambda x: x * np.float32(jnp.bfloat16(1 / 3)),
        ["bfloat16"],
    ),
    # JAX has widened it already
    "constant": (lambda x: x * np.float16(0.1), lambda x: x * np.float32(np.float16(0.1)), []),
    "scan": (scanned, lambda x: x * 6, ["bfloat16"]),
    "cond": (branched, lambda x: x / 3, ["float16"]),
    "while": (
        lambda x: jax.lax.fori_loop(0, 3, lambda i, v: v + jnp.float16(0.1), x.astype(jnp.float16)),
        lambda x: x + 3 * np.float32(np.float16(0.1)),
        ["float16"],
    ),
    "jit": (lambda x: jax.jit(lambda v: v.astype(jnp.float16) / 3)(x), lambda x: x / 3, ["float16"]),
    "within jit alone": (
        lambda x: jax.jit(lambda v: (v.astype(jnp.float16) / 3).astype(jnp.float32))(x),
        lambda x: x / 3,
        ["float16"],
    ),
    "within a branch alone": (
        lambda x: jax.lax.cond(x.sum() > 1e9, lambda v: v, lambda v: (v.astype(jnp.float16) / 3).astype(v.dtype), x),
        lambda x: x / 3,
        ["float16"],
    ),
    "remat": (lambda x: jax.checkpoint(lambda v: v.astype(jnp.float16) / 3)(x), lambda x: x / 3, ["float16"]),
    "custom derivative": (
        lambda x: jax.nn.relu(x.astype(jnp.float16) / 3),
        lambda x: np.maximum(x / 3, 0),
        ["float16"],
    ),
    "reduce_precision": (lambda x: jax.lax.reduce_precision(x.astype(jnp.float16), 5, 2), lambda x: x, ["float16"]),
    "several": (lambda x: x.astype(jnp.float16).astype(jnp.bfloat16) / 3, lambda x: x / 3, ["bfloat16", "float16"]),
    "whole numbers": (
        lambda x: (x.astype(jnp.float16) / 3, (x > 0).astype(jnp.int32)),
        lambda x: (x / 3, x > 0),
        ["float16"],
    ),
    "dot": (
        lambda x: jnp.dot(x.astype(jnp.bfloat16), jnp.ones((3, 2), jnp.bfloat16), preferred_element_type=jnp.bfloat16),
        lambda x: x.sum(-1, keepdims=True) * np.ones(2),
        ["bfloat16"],
    ),
    "float32": (lambda x: jnp.tanh(x) * 2, lambda x: np.tanh(x) * 2, []),
    "nothing of floats": (lambda x: (x > 0).sum(), lambda x: (x > 0).sum(), []),
    "keys": (
        lambda x: x + jax.random.key_data(jax.random.key(3)).sum().astype(jnp.float16),
        lambda x: x + 3,
        ["float16"],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_computed_in_float32(name):
    """As NumPy does it in float32: a third of it in float16 is 5e-4 off, in bfloat16 4e-3."""
    function, expected, types = FUNCTIONS[name]
    assert other_floats(function, SHAPE) == types
    widened = in_float32(function)
    assert other_floats(widened, SHAPE) == []
    got = jax.tree_util.tree_leaves(widened(X))
    for value, wanted in zip(got, jax.tree_util.tree_leaves(expected(X)), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-6)
        assert value.dtype in (np.float32, np.int32)


def test_results_and_arguments_keep_their_structure():
    def function(params, x):
        return {"b": (params["w"] * x.astype(jnp.float16), None), "a": [x]}

    result = in_float32(function)({"w": np.float16([1, 2, 3])}, X)
    assert jax.tree_util.tree_structure(result) == jax.tree_util.tree_structure({"b": (0, None), "a": [0]})
    np.testing.assert_allclose(result["b"][0], X * np.float32([1, 2, 3]), rtol=1e-6)


def test_types_of_arguments_count():
    assert other_floats(lambda x: 1.0, jax.ShapeDtypeStruct((2,), jnp.float16)) == ["float16"]
    assert other_floats(lambda key: 1.0, jax.random.key(0)) == []  # a type that NumPy does not know
    assert other_floats(lambda x: x, jax.ShapeDtypeStruct((2,), jnp.int32)) == []


# --- identity -------------------------------------------------------------------------------------------------------


def identity(function=lambda p, x: x @ p["w"], leaves=None, shape=SHAPE):
    params = {"w": np.arange(6, dtype=np.float32).reshape(3, 2)} if leaves is None else leaves
    shapes = {"w": jax.ShapeDtypeStruct((3, 2), np.float32)}
    return fingerprint(function, (shapes, shape), params.items())


def test_the_same_model_is_the_same():
    def again(p, x):
        return x @ p["w"]

    assert identity() == identity() == identity(again)
    assert len(identity()) == 64 and int(identity(), 16) >= 0


TABLE = np.arange(6000, dtype=np.float32).reshape(3, 2000)  # more than the text of a jaxpr shows
OTHER = -TABLE
W = np.arange(6, dtype=np.float32).reshape(3, 2)


def changed(array, index=(2, 1777)):
    other = array.copy()
    other[index] += 1
    return other


def using(table):
    """Functions that hold an array, directly or within what they call."""

    def inner(v):
        return v @ jnp.asarray(table)

    return {
        "directly": lambda p, x: inner(x),
        "in jit": lambda p, x: jax.jit(inner)(x),
        "in jit in jit": lambda p, x: jax.jit(lambda v: jax.jit(inner)(v) * 2)(x),
        "in a scan": lambda p, x: jax.lax.scan(lambda c, _: (c, inner(c).sum()), x, None, 2)[1],
        "in jit in a scan": lambda p, x: jax.lax.scan(lambda c, _: (c, jax.jit(inner)(c).sum()), x, None, 2)[1],
        "in a branch": lambda p, x: jax.lax.cond(x[0, 0] > 0, inner, lambda v: v @ jnp.asarray(OTHER), x),
        "in jit in a branch": lambda p, x: jax.lax.cond(
            x[0, 0] > 0, jax.jit(inner), lambda v: v @ jnp.asarray(OTHER), x
        ),
        "in a checkpoint": lambda p, x: jax.checkpoint(inner)(x),
        "in jit in a checkpoint": lambda p, x: jax.checkpoint(jax.jit(inner))(x),
    }


@pytest.mark.parametrize("inline", [False, True])  # constants beside the program, or within it, as JAX may have them
@pytest.mark.parametrize("how", using(TABLE))
def test_arrays_that_a_function_holds_count(how, inline):
    before = jax.config.jax_use_simplified_jaxpr_constants
    jax.config.update("jax_use_simplified_jaxpr_constants", inline)
    try:
        first, again, other = (identity(using(table)[how]) for table in (TABLE, TABLE.copy(), changed(TABLE)))
    finally:
        jax.config.update("jax_use_simplified_jaxpr_constants", before)
    assert first == again != other


@pytest.mark.parametrize(
    "leaves",
    [
        {"w": changed(W, (0, 0))},
        {"v": W},
        {"w": W.astype(np.float64)},
        {"w": W.reshape(2, 3)},
        {"w": W, "b": W},
        {"w": W.T.copy().T + 0.0 * 1j},
        {"w": -0.0 * W},
        {"w": 1.0},
        {"w": 1},
        {"w": "mean"},
        {"w": "max"},
        {"w": None},
        {"w": jax.random.key(0)},
        {"w": jax.random.key(1)},
        {},
    ],
    ids=str,
)
def test_parameters_that_differ_count(leaves):
    """Each differs from the first, and from every other one."""
    assert identity(leaves=leaves) != identity()
    assert identity(leaves=leaves) == identity(leaves=dict(leaves))


def test_no_two_parameters_are_taken_for_each_other():
    leaves = [
        1,
        1.0,
        "1",
        None,
        np.int32(1),
        np.float16(1),
        [1],
        0.0,
        -0.0,
        1j,
        jax.random.key(0),
        jax.random.key(1),
        W,
        W.T,
        W.ravel(),
    ]
    assert len({identity(leaves={"w": leaf}) for leaf in leaves}) == len(leaves)
    assert (
        identity(leaves={"w": W})
        == identity(leaves={"w": np.asfortranarray(W)})
        == identity(leaves={"w": jnp.asarray(W)})
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda p, x: x @ p["w"] + 1,
        lambda p, x: x @ p["w"] * 2,
        lambda p, x: p["w"].T @ x.T,
        lambda p, x: (x @ p["w"],) * 2,
    ],
)
def test_functions_that_differ_count(function):
    assert identity(function) != identity()


def test_shapes_count():
    assert identity() != identity(shape=jax.ShapeDtypeStruct((3, 3), np.float32))


def test_addresses_of_functions_do_not_count():
    """What stands for a function in the text of a jaxpr, or in a leaf, has another address in each process."""

    def differentiated():
        @jax.custom_jvp
        def f(x):
            return x * 2

        f.defjvp(lambda primals, tangents: (f(*primals), tangents[0]))
        return lambda p, x: f(x)

    assert identity(differentiated()) == identity(differentiated())

    class Leaf:
        pass

    assert identity(leaves={"w": Leaf()}) == identity(leaves={"w": Leaf()})
    assert identity(leaves={"w": functools.partial(max)}) == identity(leaves={"w": functools.partial(max)})
