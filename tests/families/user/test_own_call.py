"""How an own model is called: found from what it is and from its signature, before anything runs."""

import functools
import re
from collections import namedtuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from vit_convert.core.errors import UsageError
from vit_convert.families.user.call import call_of, taken_apart, without_training

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32))
W = np.arange(6, dtype=np.float32).reshape(3, 2)


class Plain(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x @ self.param("w", lambda _: jnp.asarray(W))


class Told(linen.Module):
    """Says by its result which arguments it got."""

    @linen.compact
    def __call__(self, x, *, train, deterministic=None, other=3):
        return {
            "train": train,
            "deterministic": deterministic,
            "other": other,
            "y": x @ self.param("w", lambda _: jnp.asarray(W)),
        }


class Dense(nnx.Module):
    def __init__(self, drop=None):
        self.w = nnx.Param(jnp.asarray(W))
        self.drop = drop

    def __call__(self, x):
        return x @ self.w[...] if self.drop is None else self.drop(x @ self.w[...])


class Callable:
    def __call__(self, params, images):
        return images @ params["w"]


class Tree(Callable):
    pass


jax.tree_util.register_pytree_node(Tree, lambda tree: ((W,), None), lambda _, leaves: Tree())
VARIABLES = {"params": {"w": W}}
Pair = namedtuple("Pair", "init apply")


# --- what was returned ----------------------------------------------------------------------------------------------


def test_what_config_model_returned():
    module = Plain()
    assert taken_apart((module, VARIABLES)) == (module, VARIABLES)
    assert taken_apart(module) == (module, None)
    assert taken_apart([module, VARIABLES]) == ([module, VARIABLES], None)  # a list is no pair
    pair = Pair(1, 2)
    assert taken_apart(pair) == (pair, None)  # a named tuple is a value of its own
    for wrong in ((), (module,), (module, VARIABLES, 3)):
        with pytest.raises(UsageError, match=rf"returned a tuple of {len(wrong)}, expected \(module, variables\)"):
            taken_apart(wrong)


# --- each kind ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables", [VARIABLES, VARIABLES["params"], flax.core.freeze(VARIABLES), {**VARIABLES, "batch_stats": {}}]
)
def test_linen(variables):
    call = call_of(Plain(), variables)
    assert (call.name, call.spoken, call.outer, call.warnings) == ("Plain", "Plain.apply(variables, images)", 1, ())
    assert set(call.tree) - {"batch_stats"} == {"params"}
    np.testing.assert_array_equal(call.run(call.tree, X), X @ W)


def test_linen_with_statistics_alone_is_not_taken_for_parameters():
    assert set(call_of(Plain(), {"batch_stats": {"w": W}}).tree) == {"batch_stats"}


def test_linen_bound_to_its_variables():
    call = call_of(Plain().bind(VARIABLES), None)
    np.testing.assert_array_equal(call.run(call.tree, X), X @ W)
    call = call_of(Plain().bind({"params": {"w": 0 * W}}), VARIABLES)  # what is given beside it is what is meant
    np.testing.assert_array_equal(call.run(call.tree, X), X @ W)


def test_linen_parameters_come_out_of_their_boxes():
    boxed = {"params": {"w": linen.Partitioned(jnp.asarray(W), names=(None, "model"))}}
    assert isinstance(call_of(Plain(), boxed).tree["params"]["w"], jax.Array)


@pytest.mark.parametrize(
    ("variables", "said", "fix"),
    [
        (None, "model Plain: a Linen module needs its variables", r"Return \(module, variables\)"),
        ([W], "model Plain: its variables are a list, not a dictionary", r"Return \(module, variables\)\.$"),
        (
            namedtuple("State", "params")(W),
            "its variables are a State, not a dictionary",
            r"Of a train state, that is \{'params': state\.params",
        ),
    ],
)
def test_linen_without_variables(variables, said, fix):
    with pytest.raises(UsageError, match=said) as caught:
        call_of(Plain(), variables)
    assert re.search(fix, caught.value.fix)


def test_linen_that_cannot_be_called():
    class Nothing(linen.Module):
        pass

    with pytest.raises(UsageError, match="model Nothing: has no __call__"):
        call_of(Nothing(), VARIABLES)


def test_linen_is_told_that_it_does_not_train():
    call = call_of(Told(), VARIABLES)
    assert call.spoken == "Told.apply(variables, images, train=False, deterministic=True)"
    result = call.run(call.tree, X)
    assert (result["train"], result["deterministic"], result["other"]) == (False, True, 3)


def test_nnx():
    call = call_of(Dense(), None)
    assert (call.name, call.spoken, call.outer, call.warnings) == ("Dense", "Dense(images)", 0, ())
    np.testing.assert_array_equal(call.run(call.tree, X), X @ W)
    doubled = jax.tree_util.tree_map(lambda leaf: 2 * leaf, call.tree)
    np.testing.assert_array_equal(call.run(doubled, X), 2 * X @ W)  # by the parameters that it is given
    with pytest.raises(UsageError, match="model Dense: an NNX module holds its parameters, and variables came with it"):
        call_of(Dense(), VARIABLES)


class Switched(nnx.Module):
    """Trains unless it is told otherwise, as Dropout and BatchNorm do."""

    def __init__(self, **fields):
        for name, value in fields.items():
            setattr(self, name, value)

    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    ("part", "trains"),
    [
        (Switched(use_running_average=False), True),
        (Switched(use_running_average=True), False),
        (Switched(use_running_average=None), False),
        (Switched(deterministic=False, rate=0.5), True),
        (Switched(deterministic=False, dropout_rate=0.1), True),
        (Switched(deterministic=False, rate=0.0), False),  # drops nothing
        (Switched(deterministic=False), False),
        (Switched(deterministic=True, rate=0.5), False),
    ],
)
def test_nnx_that_still_trains_is_spoken_of(part, trains):
    expected = ("model Dense: drop still train: call model.eval() before you return it",) if trains else ()
    assert call_of(Dense(part), None).warnings == expected
    if trains:  # the module itself has no name within itself
        assert call_of(part, None).warnings == (
            "model Switched: Switched still train: call model.eval() before you return it",
        )


def test_nnx_that_is_told_by_its_argument_needs_no_warning():
    class Argument(Dense):
        def __call__(self, x, *, deterministic):
            return x @ self.w[...] * (1 if deterministic else jnp.nan)

    call = call_of(Argument(Switched(use_running_average=False)), None)
    assert call.spoken == "Argument(images, deterministic=True)" and call.warnings == ()
    np.testing.assert_array_equal(call.run(call.tree, X), X @ W)


def named(params, images, training=True):
    return (images @ params["w"], training)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda p, x: x @ p["w"], "<lambda>"),
        (Callable(), "Callable"),
        (functools.partial(Callable.__call__, None), "partial"),
    ],
)
def test_functions(function, name):
    call = call_of(function, {"w": W})
    assert (call.name, call.spoken, call.outer) == (name, f"{name}(params, images)", 0)
    np.testing.assert_array_equal(call.run(call.tree, X), X @ W)


def test_functions_are_told_too():
    call = call_of(named, {"w": W})
    assert call.spoken == "named(params, images, training=False)"
    assert call.run(call.tree, X)[1] is False
    assert call_of(lambda p, x: x, None).tree == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Plain, "returned the class Plain, not an instance of it"),
        (3, "returned 3: neither a Linen module, an NNX module nor a function"),
        ("vit", "returned 'vit': neither"),
        (None, "returned None: neither"),
        ({"w": W}, "returned a dict: neither"),
        ("x" * 100, f"returned '{'x' * 79}…: neither"),
        ("x" * 77, f"returned '{'x' * 77}': neither"),
        (Tree(), "model Tree: an object that is both its parameters and its function, as Equinox has"),
    ],
)
def test_what_is_no_model(given, said):
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        call_of(given, None)
    assert caught.value.fix


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [False, True])
def test_arguments_that_say_that_nothing_trains(value):
    words = {False: "train training is_training is_train train_mode enable_dropout"}
    words[True] = "deterministic inference eval_mode is_eval use_running_average"
    for name in words[value].split():
        function = eval(f"lambda params, images, *, {name}: {name}")
        assert call_of(function, {}).run({}, X) is value


@pytest.mark.parametrize(
    ("function", "spelt"),
    [
        (lambda params, images, train: train, ", train=False"),
        (lambda params, images, size=3: size, ""),
        (lambda params, images, *rest: rest, ""),
        (lambda params, images, **rest: rest, ""),
        (lambda *both: both, ""),
        (lambda params, *rest, train: train, ", train=False"),
        (lambda train, images: images, ""),  # the first two are the parameters and the images, whatever they are called
        (max, ""),  # written in C: nothing is known of its arguments
    ],
)
def test_arguments(function, spelt):
    assert call_of(function, {}).spoken.endswith(f"(params, images{spelt})")


def positional_only(params, images, train=None, /):
    return train


def test_an_argument_that_has_no_name_is_not_given():
    assert call_of(positional_only, {}).spoken == "positional_only(params, images)"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda: 0, "model <lambda>(): takes 0 arguments, it is called with (params, images)"),
        (lambda x: 0, "model <lambda>(x): takes 1 arguments, it is called with (params, images)"),
        (lambda x, *, params: 0, "takes 1 arguments"),
        (lambda p, x, mask: 0, "model <lambda>(p, x, mask): needs mask as well, it is called with (params, images)"),
        (lambda p, x, *, a, train, b: 0, "needs a, b as well"),
        (lambda p, x, mask, size=3: 0, "needs mask as well"),
    ],
)
def test_arguments_that_do_not_fit(function, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        call_of(function, {})


def test_a_module_gets_images_alone():
    class Two(linen.Module):
        def __call__(self, images, mask):
            return images

    with pytest.raises(
        UsageError, match=r"model Two\(images, mask\): needs mask as well, it is called with \(images\)"
    ):
        call_of(Two(), VARIABLES)


# --- layers that were told nothing ----------------------------------------------------------------------------------


class Untold(linen.Module):
    """A block that passes on what it was told, which is nothing, and a layer of each kind that asks."""

    fixed: bool | None = None

    @linen.compact
    def __call__(self, x, deterministic=None):
        x = linen.Dropout(0.5)(x, deterministic=deterministic)
        x = linen.BatchNorm(use_running_average=self.fixed)(x)
        return x, linen.merge_param("deterministic", None, True if deterministic is None else deterministic)


def test_layers_that_nothing_told():
    variables = {"batch_stats": {"BatchNorm_0": {"mean": np.float32([1, 2, 3]), "var": np.float32([4, 4, 4])}}}
    variables["params"] = {"BatchNorm_0": {"scale": np.ones(3, np.float32), "bias": np.zeros(3, np.float32)}}
    call = call_of(Untold(), variables)
    with pytest.raises(Exception, match="deterministic"):  # it refuses to guess
        linen.Dropout(0.5).apply({}, X)
    result, _ = without_training(lambda tree, images: Untold().apply(tree, images))(call.tree, X)
    np.testing.assert_allclose(result, (X - np.float32([1, 2, 3])) / 2, rtol=1e-4)


def test_what_a_layer_was_told_stays():
    """By its field or by its argument: it may train on purpose."""
    dropped = without_training(
        lambda tree, images: linen.Dropout(0.5, deterministic=False).apply(
            tree, images, rngs={"dropout": jax.random.key(0)}
        )
    )
    assert (np.asarray(dropped({}, jnp.ones((40, 3)))) == 0).any()
    dropped = without_training(
        lambda tree, images: linen.Dropout(0.5).apply(
            tree, images, deterministic=False, rngs={"dropout": jax.random.key(0)}
        )
    )
    assert (np.asarray(dropped({}, jnp.ones((40, 3)))) == 0).any()
    kept = without_training(lambda tree, images: linen.Dropout(0.5).apply(tree, images))
    np.testing.assert_array_equal(kept({}, X), X)


def test_arguments_that_do_not_suit_a_layer_are_its_own_error():
    class Outer(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dropout(0.5)(x, True, None, 3, 4)

    with pytest.raises(TypeError, match=r"__call__\(\) takes from 2 to 4 positional arguments but 6 were given"):
        without_training(lambda tree, images: Outer().apply(tree, images))({}, X)


def test_other_arguments_reach_their_layers():
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, factor, *rest, shift=0.0, deterministic=None, **named):
            assert deterministic is True and rest == (5,) and named == {"other": 7}
            return x * factor + shift

    class Outer(linen.Module):
        @linen.compact
        def __call__(self, x):
            return Layer()(x, 3.0, 5, shift=2.0, other=7)

    result = without_training(lambda tree, images: Outer().apply(tree, images))({}, X)
    np.testing.assert_allclose(result, X * 3 + 2)
