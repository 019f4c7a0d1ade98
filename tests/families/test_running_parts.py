"""Running parts of a model: which parameters each gets, and what comes out under which name, on a module of two
products."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_convert.families import run as parts

NUMBERS = np.random.default_rng(0)
# 4 x 4 pixels of 3 channels into 5 numbers, and those into 2 by a block.
PARAMS = {
    "outer/kernel": NUMBERS.standard_normal((48, 5)).astype(np.float32),
    "outer/bias": NUMBERS.standard_normal(5).astype(np.float32),
    "block_0/inner/kernel": NUMBERS.standard_normal((5, 2)).astype(np.float32),
    "block_0/inner/bias": NUMBERS.standard_normal(2).astype(np.float32),
}
IMAGES = NUMBERS.standard_normal((3, 4, 4, 3)).astype(np.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="inner")(x)


class Model(nn.Module):
    def setup(self):
        self.outer, self.block_0 = nn.Dense(5), Block()

    def __call__(self, images):
        return self.block_0(self.embed(images))

    def embed(self, images, scale=1.0):
        return self.outer(images.reshape(len(images), -1)) * scale


def embedded(images):
    return images.reshape(3, 48).astype(np.float64) @ PARAMS["outer/kernel"] + PARAMS["outer/bias"]


def right(images):
    return embedded(images) @ PARAMS["block_0/inner/kernel"] + PARAMS["block_0/inner/bias"]


def close(found, expected):
    """At 1e-5 of the scale: float32 sums of 48 products."""
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_outputs_and_taps_by_name():
    results, taps = {"logits": 1, "tokens": 2, "grid": 3}, {"block_00": 4, "block_01": 5}
    assert parts.with_first(results, taps) == (1, {"tokens": 2, "grid": 3, "block_00": 4, "block_01": 5})
    found = parts.by_name(parts.with_first(results, taps), [*results], ["block_01"])
    assert list(found.items()) == [("logits", 1), ("tokens", 2), ("grid", 3), ("block_01", 5)]
    assert parts.by_name((7, {}), ["features"], []) == {"features": 7}


def test_parts_of_a_model():
    model = parts.compiled(Model())
    close(model(parts.nested(PARAMS), IMAGES), right(IMAGES))
    embed = parts.compiled(Model(), "embed")
    outer = parts.outside(PARAMS, ["block_"])
    assert (
        [*outer] == ["params"]
        and [*outer["params"]] == ["outer"]
        and {*outer["params"]["outer"]}
        == {
            "kernel",
            "bias",
        }
    )
    close(embed(outer, IMAGES), embedded(IMAGES))
    close(parts.compiled(Model(), "embed", scale=3.0)(outer, IMAGES), 3 * embedded(IMAGES))
    assert parts.outside(PARAMS, ["outer/", "block_"])["params"] == {}
    inner = parts.under(PARAMS, "block_0/")
    assert [*inner] == ["inner"]
    block = parts.compiled(Block())({"params": inner}, embedded(IMAGES).astype(np.float32))
    close(block, right(IMAGES))


def test_parameters_of_a_whole_model_are_read_when_it_runs():
    read = []

    class Params(collections.UserDict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    def function(leaves, images):
        assert jax.config.jax_default_matmul_precision == "highest"
        return {"y": Model().apply(parts.nested(leaves), images), "leaf": leaves["outer/bias"]}

    run = parts.whole(function, Params(PARAMS))
    assert not read
    with jax.default_matmul_precision("default"):
        found = run(IMAGES)
    assert {*read} == {*PARAMS} and type(found["y"]) is np.ndarray
    close(found["y"], right(IMAGES))
    np.testing.assert_array_equal(found["leaf"], PARAMS["outer/bias"])


def test_shapes_of_a_module_are_those_of_its_parameters():
    assert parts.param_shapes(Model(), (4, 4)) == {name: array.shape for name, array in PARAMS.items()}
    assert parts.param_shapes(Model(), (2, 6))["outer/kernel"] == (36, 5)


def test_the_compiled_are_arrays_of_the_device():
    assert isinstance(parts.under(PARAMS, "outer/")["kernel"], jnp.ndarray)
