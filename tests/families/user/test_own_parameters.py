"""An own model as the exporter wants it: its parameters by name, its results, what is said of it; on functions of a few
operators."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from vit_convert.core.errors import ExportError, UsageError
from vit_convert.families.user.model import user_model

SIZE = (2, 2, 3)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (4, *SIZE)).astype(np.float32)
W = np.arange(15, dtype=np.float32).reshape(3, 5) / 10 - 0.7


def pooled(x):
    return x.mean((1, 2))


def product(p, x):
    return pooled(x) @ p["w"]


def model_of(function=product, params=None, **options):
    return user_model(function, {"w": W} if params is None else params, image_shape=SIZE, **options)


def test_a_function_of_one_matrix():
    model = model_of()
    assert (model.output, model.taps, model.traced_taps, model.repeats, model.stacks) == ("logits", [], [], False, ())
    assert (model.name, model.warnings, model.traced_shapes) == ("product", (), {"w": (3, 5)})
    expected = IMAGES.astype(np.float64).mean((1, 2)) @ W
    got = model.run(IMAGES)
    assert list(got) == ["logits"] and type(got["logits"]) is np.ndarray
    np.testing.assert_allclose(got["logits"], expected, rtol=1e-5, atol=1e-6)
    applied = model.apply({"w": 2 * W}, jnp.asarray(IMAGES))  # by the parameters that it is given
    np.testing.assert_allclose(applied["logits"], 2 * expected, rtol=1e-5, atol=1e-6)


def test_its_signature():
    """Images have a layout, what has other axes has none; logits are judged by their class too, anything else by its
    values."""
    signature = model_of().signature
    assert signature.to_dict() == {
        "inputs": [{"name": "images", "dtype": "float32", "shape": ["batch", 2, 2, 3], "layout": "NHWC", "below": 0}],
        "outputs": [
            {"name": "logits", "dtype": "float32", "shape": ["batch", 5], "layout": "", "below": 0, "judge": "top1"}
        ],
    }
    model = user_model(lambda p, x: {"b": x, "tokens": x @ p["w"]}, {"w": W}, image_shape=(4, 3), output="tokens")
    assert model.signature.to_dict() == {
        "inputs": [{"name": "images", "dtype": "float32", "shape": ["batch", 4, 3], "layout": "", "below": 0}],
        "outputs": [
            {
                "name": "tokens",
                "dtype": "float32",
                "shape": ["batch", 4, 5],
                "layout": "",
                "below": 0,
                "judge": "cosine",
            }
        ],
    }


def test_several_results_are_taps_of_the_judged_one():
    model = model_of(lambda p, x: {"b": pooled(x), "scores": pooled(x) @ p["w"], "a": pooled(x) * 2}, output="scores")
    assert (model.output, model.taps, model.traced_taps) == ("scores", ["a", "b"], ["a", "b"])
    assert set(model.run(IMAGES)) == {"scores", "a", "b"}
    np.testing.assert_allclose(model.run(IMAGES)["a"], 2 * IMAGES.mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_weights_are_floats_and_nothing_else_is():
    """They become float32; whole numbers, switches, keys, names and what is no array stay in the function."""
    params = {
        **{"w": W.astype(np.float64), "half": np.float16(2), "brain": jnp.asarray([1, 2, 3], jnp.bfloat16)},
        **{
            "index": np.array([1, 0, 2]),
            "on": np.array(True),
            "key": jax.random.key(0),
            "kind": "mean",
            "scale": 3.0,
            "none": None,
        },
    }

    def function(p, x):
        assert p["kind"] == "mean" and p["none"] is None and p["key"] is not None and isinstance(p["scale"], float)
        return (pooled(x) * p["brain"])[:, p["index"]] @ p["w"] * p["half"] * p["scale"] * jnp.where(p["on"], 1.0, 0.0)

    model = model_of(function, params)
    assert {name: value.dtype for name, value in model.params.items()} == dict.fromkeys(
        ["brain", "half", "w"], np.float32
    )
    expected = (IMAGES.mean((1, 2)) * np.float32([1, 2, 3]))[:, [1, 0, 2]] @ W * 6
    np.testing.assert_allclose(model.run(IMAGES)["logits"], expected, rtol=1e-5, atol=1e-5)


class Nested(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(5, name="head")(linen.Dense(4, name="stem")(pooled(x)))


class NestedNnx(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=nnx.Rngs(0)) for _ in range(11)])
        self.head = nnx.Linear(3, 5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        x = pooled(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_names_are_those_of_the_tree():
    variables = Nested().init(jax.random.key(0), jnp.zeros((1, *SIZE)))
    for given in (variables, variables["params"]):
        model = user_model(Nested(), given, image_shape=SIZE)
        assert set(model.params) == {f"{layer}/{part}" for layer in ("stem", "head") for part in ("kernel", "bias")}
    model = user_model(NestedNnx(), image_shape=SIZE)
    expected = {f"layers/{i}" for i in range(11)} | {"head"}
    assert set(model.params) == {f"{layer}/{part}" for layer in expected for part in ("kernel", "bias")}
    np.testing.assert_allclose(model.run(IMAGES)["logits"], NestedNnx()(IMAGES), rtol=1e-5, atol=1e-6)
    model = model_of(
        lambda p, x: pooled(x) @ p["a"][0] @ p["a"][1]["b"], {"a": [W, {"b": np.eye(5, dtype=np.float32)}]}
    )
    assert set(model.params) == {"a/0", "a/1/b"}


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({"images": W}, ["params/images"]),  # the graph's input
        ({"logits": W}, ["params/logits"]),  # its output
        ({"scores": W}, ["scores"]),
        ({"constant_0": W}, ["params/constant_0"]),  # what the export calls constants
        ({"constant_12": W}, ["params/constant_12"]),
        ({"constant_a": W}, ["constant_a"]),
        ({"my_constant_0": W}, ["my_constant_0"]),
        ({"constant_0/kernel": W}, ["constant_0/kernel"]),
        (W, ["params/"]),  # the only one, which has no name
        (nnx.Param(W), ["value"]),  # nor has this, but a field
        ({"a": nnx.Param(W)}, ["a"]),  # a variable's name is the one before
        ({"a/b": W, "a": {"b": W}}, ["a/b", "a/b.1"]),
        ({"a/b": W, "a": {"b": W}, "a/b.1": W}, ["a/b", "a/b.1", "a/b.1.1"]),
        ({"images": W, "params/images": W}, ["params/images", "params/images.1"]),
    ],
)
def test_no_two_tensors_have_one_name(params, names):
    def function(p, x):
        return sum(pooled(x) @ leaf for leaf in jax.tree_util.tree_leaves(p))  # whatever holds them

    model = model_of(function, params)
    assert sorted(model.params) == sorted(names)
    count = len(names)
    np.testing.assert_allclose(model.run(IMAGES)["logits"], count * (IMAGES.mean((1, 2)) @ W), rtol=1e-5, atol=1e-5)


def test_the_names_that_are_taken_are_the_models_own():
    assert set(model_of(lambda p, x: {"scores": pooled(x) @ p["scores"]}, {"scores": W}, output="scores").params) == {
        "params/scores"
    }
    with pytest.raises(UsageError, match="the model's output 'w' is called like another tensor"):
        model_of(lambda p, x: {"w": pooled(x) @ p["w"]})
    with pytest.raises(UsageError, match="the model's output 'images' is called like another tensor"):
        model_of(lambda p, x: {"images": pooled(x) @ p["w"]})


def test_a_description_is_no_parameter():
    with pytest.raises(UsageError, match=r"model product: parameter w is a description of \(3, 5\), it has no values"):
        model_of(params={"w": jax.ShapeDtypeStruct((3, 5), np.float32)})


# --- what is asked of it --------------------------------------------------------------------------------------------


def test_the_number_of_classes():
    assert model_of(num_classes=5).output == model_of(num_classes=0).output == "logits"
    with pytest.raises(
        UsageError,
        match=re.escape("config.num_classes=10: the output scores of model <lambda> has shape (1, 5) for one image"),
    ):
        model_of(lambda p, x: {"tap": pooled(x), "scores": product(p, x)}, num_classes=10, output="scores")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda p, x: pooled(x)[:1] @ p["w"], "the output logits has shape (1, 5) for a batch of 3"),
        (lambda p, x: (pooled(x) @ p["w"])[0], "the output logits has shape (5,) for a batch of 1"),
        (lambda p, x: x.sum(), "the output logits is a single number"),
    ],
)
def test_one_result_for_each_image(function, said):
    with pytest.raises(ExportError, match=re.escape(said)):
        model_of(function)


def test_other_types_are_said_and_widened():
    def half(p, x):
        return (pooled(x).astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float16)

    model = model_of(half)
    assert model.warnings == (
        "model half: computes in bfloat16, float16; it is converted in float32, and config.precision says what follows",
    )
    got = model.run(IMAGES)["logits"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, IMAGES.mean((1, 2)) @ W, rtol=1e-5, atol=1e-6)  # bfloat16 would be 4e-3 off


def test_what_is_left_out_is_said():
    model = model_of(
        lambda p, x: {"logits": product(p, x), "again": product(p, x).sum(), "best": product(p, x).argmax(-1)}
    )
    assert model.warnings == (
        "output again is left out: it is a single number",
        "output best is left out: it is int32, not floating-point",
    )
    assert model.taps == [] and list(model.run(IMAGES)) == ["logits"]

    def twice(p, x):
        y = product(p, x)
        return {"logits": y, "same": y, "tap": pooled(x)}

    model = model_of(twice)
    assert model.taps == ["tap"] and model.warnings == ("output same is left out: it is logits again",)


def test_what_tells_one_model_from_another():
    same, other = model_of(), model_of(lambda p, x: pooled(x) @ p["w"])
    assert same.identity == other.identity and same.name != other.name
    different = [
        model_of(params={"w": W + np.float32(1e-6)}),
        model_of(lambda p, x: product(p, x) * 2),
        model_of(lambda p, x: product(p, x), {"w": W, "unused": np.array(3)}),
        model_of(output="features", function=lambda p, x: {"features": product(p, x)}),
    ]
    assert len({same.identity, *(model.identity for model in different[:3])}) == 4


# --- what goes wrong in it ------------------------------------------------------------------------------------------


class Dropping(linen.Module):
    """Its layer was told nothing, and says so by raising."""

    deterministic: bool | None = None

    @linen.compact
    def __call__(self, x):
        return linen.Dense(5, name="head")(linen.Dropout(0.5, deterministic=self.deterministic)(pooled(x)))


HEAD = {"params": {"head": {"kernel": W, "bias": np.zeros(5, np.float32)}}}


def test_layers_that_were_told_nothing_are_told_that_nothing_trains():
    model = user_model(Dropping(), HEAD, image_shape=SIZE)
    np.testing.assert_allclose(model.run(IMAGES)["logits"], IMAGES.mean((1, 2)) @ W, rtol=1e-5, atol=1e-6)


def test_layers_that_train_are_spoken_of():
    with pytest.raises(ExportError, match=r"config\.model: Dropping\.apply\(variables, images\): .*PRNG") as caught:
        user_model(Dropping(False), HEAD, image_shape=SIZE)
    assert caught.value.fix.startswith(
        "It still trains: make its layers with deterministic=True, or call .eval() on an NNX model. It was "
    )
    assert (
        "It was called as Dropping.apply(variables, images), with float32 images [batch, height, width, 3]."
        in caught.value.fix
    )


def test_what_it_said_at_first_is_what_is_wrong():
    calls = []

    def function(p, x):
        calls.append(1)
        raise KeyError("first" if len(calls) == 1 else "second")

    with pytest.raises(ExportError, match=r"function\(params, images\): KeyError: 'first'") as caught:
        model_of(function)
    assert "It still trains" not in caught.value.fix and caught.value.fix.startswith(
        "It was called as function(params, images)"
    )


def test_our_own_messages_are_not_wrapped():
    with pytest.raises(UsageError) as caught:
        model_of(lambda p, x: {"a": pooled(x), "b": "text"})
    assert str(caught.value) == "the model's output 'b' is a str, not an array"


def test_errors_of_a_run_are_the_models():
    def function(p, x):
        if x.shape[0] == 4:
            raise ValueError("not four")
        return product(p, x)

    model = model_of(function)
    with pytest.raises(ExportError, match=r"config\.model: function\(params, images\): ValueError: not four"):
        model.run(IMAGES)
