"""What an own model returns, taken apart by hand: names, the output that is judged, and why others are left out."""

import dataclasses
from collections import OrderedDict, namedtuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_convert.core.errors import ExportError, UsageError
from vit_convert.families.user.outputs import BARE, Choice, choose, named, without_copies

A, B, C = (jnp.full((2, i), float(i)) for i in (1, 2, 3))
Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Plain:
    logits: object
    hidden: object = None


@flax.struct.dataclass
class Struct:
    logits: jax.Array
    hidden: jax.Array


@jax.tree_util.register_pytree_node_class
class Node:
    def __init__(self, inner):
        self.inner = inner

    def tree_flatten(self):
        return (self.inner,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (A, {BARE: A}),
        ((A,), {BARE: A}),
        ([A], {BARE: A}),
        ((A, B), {"output_0": A, "output_1": B}),
        ([A, B, C], {"output_0": A, "output_1": B, "output_2": C}),
        ((A, {"b": B}), {BARE: A, "b": B}),
        ([A, OrderedDict(c=C, b=B)], {BARE: A, "c": C, "b": B}),
        (({"b": B}, A), {"output_0/b": B, "output_1": A}),  # taps come second
        ((A, {"b": B}, C), {"output_0": A, "output_1/b": B, "output_2": C}),
        ((None, {"b": B}), {"output_1/b": B}),  # None is no array before its taps
        (((A, B), {"c": C}), {"output_0/0": A, "output_0/1": B, "output_1/c": C}),
        ({"b": B, "a": A}, {"b": B, "a": A}),  # in the order of the result
        ({"b": None, "a": A}, {"a": A}),
        ({1: A, "x": {2: B}}, {"1": A, "x/2": B}),
        (Pair(A, B), {"left": A, "right": B}),
        (Plain(A), {"logits": A}),
        (Plain(A, Pair(B, [C])), {"logits": A, "hidden/left": B, "hidden/right/0": C}),
        (Struct(A, B), {"logits": A, "hidden": B}),
        (flax.core.freeze({"a": A, "b": {"c": C}}), {"a": A, "b/c": C}),
        ((Plain(A, B),), {"logits": A, "hidden": B}),  # alone in a tuple
        (np.zeros(2), {BARE: None}),
        (jax.ShapeDtypeStruct((2, 3), jnp.float32), {BARE: None}),
    ],
)
def test_names(result, expected):
    got = named(result)
    assert list(got) == list(expected)
    assert all(value is None or got[name] is value for name, value in expected.items())


def test_any_other_pytree_is_named_by_its_keys():
    assert len(named({"x": Node(A)})) == 1 and next(iter(named(Node({"b": B})).values())) is B
    assert all(name.startswith("x/") for name in named({"x": Node(A)}))


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"a": A, "b": "text"}, "the model's output 'b' is a str, not an array"),
        ({"a": {"n": 3}}, "the model's output 'a/n' is a int, not an array"),
        ((A, Plain), "the model's output 'output_1' is a type, not an array"),  # the class, not one of it
        ({"a": {"b": A}, "a/b": B}, "the model has two outputs named 'a/b'"),
        (None, "the model returns no array but a NoneType"),
        ({}, "the model returns no array but a dict"),
        ((None,), "the model returns no array but a tuple"),
        (Plain(None), "the model returns no array but a Plain"),
    ],
)
def test_what_is_no_result(result, said):
    with pytest.raises(UsageError, match="^" + said) as caught:
        named(result)
    assert caught.value.fix


# --- the choice -----------------------------------------------------------------------------------------------------


def shapes(**outputs):
    """Of batches of 1 and 3; "b" stands for the batch."""
    made = lambda shape, batch: tuple(batch if dim == "b" else dim for dim in shape)  # noqa: E731
    outputs = {
        name: value if isinstance(value, tuple) and isinstance(value[1], str) else (value, "float32")
        for name, value in outputs.items()
    }
    return {
        batch: {
            name.replace("bare", BARE): jax.ShapeDtypeStruct(made(shape, batch), dtype)
            for name, (shape, dtype) in outputs.items()
        }
        for batch in (1, 3)
    }


GOOD = ["b", 5]


@pytest.mark.parametrize(
    ("outputs", "asked", "names"),
    [
        ({"bare": GOOD}, "logits", {BARE: "logits"}),
        ({"bare": GOOD}, "features", {BARE: "features"}),
        ({"bare": GOOD, "tap": GOOD}, "features", {BARE: "features", "tap": "tap"}),
        ({"tap": GOOD, "bare": GOOD}, "features", {BARE: "features", "tap": "tap"}),  # the judged one first
        ({"a": GOOD, "logits": GOOD, "z": GOOD}, "logits", {"logits": "logits", "a": "a", "z": "z"}),
        ({"a": GOOD, "b": GOOD}, "b", {"b": "b", "a": "a"}),
        ({"scores": GOOD}, "logits", {"scores": "scores"}),  # the default is no wish
    ],
)
def test_which_output_is_judged(outputs, asked, names):
    choice = choose(shapes(**outputs), asked)
    assert list(choice.names.items()) == list(names.items()) and choice.left_out == {}
    assert choice.judged == next(iter(names.values()))


@pytest.mark.parametrize(
    ("outputs", "asked", "said", "fix"),
    [
        ({"a": GOOD, "b": GOOD}, "logits", "config.outputs='logits': the model returns a, b", 'config.outputs = "a"'),
        (
            {"scores": GOOD},
            "features",
            "config.outputs='features': the model returns scores",
            'config.outputs = "scores"',
        ),
    ],
)
def test_several_and_none_as_asked(outputs, asked, said, fix):
    with pytest.raises(UsageError, match=said) as caught:
        choose(shapes(**outputs), asked)
    assert fix in caught.value.fix


WRONG = {
    "is a single number": [],
    "is int32, not floating-point": (["b", 5], "int32"),
    "has shape (4, 5) for a batch of 1": [4, 5],
    "has shape (3, 3) for a batch of 3": ["b", "b"],
    "has shape (1, 0) for a batch of 1": ["b", 0],
    "has shape (5, 1) for a batch of 1": [5, "b"],
    "has shape (1, 5) for a batch of 3": [1, 5],
}


@pytest.mark.parametrize("why", WRONG)
def test_what_cannot_be_compared_image_by_image(why):
    value = WRONG[why]
    choice = choose(shapes(other=value, logits=GOOD, more=GOOD), "logits")
    assert choice == Choice({"logits": "logits", "more": "more"}, {"other": why})
    with pytest.raises(ExportError, match=r"^config\.model: the output logits ") as caught:
        choose(shapes(logits=value), "logits")
    assert str(caught.value) == f"config.model: the output logits {why}" and "[batch, …]" in caught.value.fix
    with pytest.raises(ExportError) as caught:
        choose(shapes(bare=value), "features")
    assert str(caught.value) == f"config.model: the output features {why}"


def test_any_floating_type_and_any_rank_can_be_compared():
    choice = choose(shapes(a=(["b"], "float16"), b=(["b", 2, 3, 4], "bfloat16"), logits=(GOOD, "float64")), "logits")
    assert list(choice.names) == ["logits", "a", "b"]


@pytest.mark.parametrize(
    ("outputs", "asked", "taken", "name"),
    [
        ({"images": GOOD}, "images", ["images", "w"], "images"),
        ({"logits": GOOD, "w": GOOD}, "logits", ["images", "w"], "w"),
        ({"bare": GOOD}, "w", ["images", "w"], "w"),
        ({"bare": GOOD, "logits": GOOD}, "logits", [], "logits"),  # what came alone is called as asked
    ],
)
def test_names_that_are_taken(outputs, asked, taken, name):
    with pytest.raises(UsageError, match=f"the model's output '{name}' is called like another tensor"):
        choose(shapes(**outputs), asked, taken)


def test_a_name_that_is_taken_does_not_matter_for_what_is_left_out():
    assert choose(shapes(logits=GOOD, w=[]), "logits", ["w"]).left_out == {"w": "is a single number"}


def test_one_array_under_several_names():
    """The judged one keeps its name, the others are it again; equal arrays that are two stay two."""
    one, two = object(), object()
    choice = Choice({"logits": "scores", "a": "a", "b": "b", "c": "c"}, {"d": "is a single number"})
    found = without_copies(choice, [one, two, two, one], ["a", "b", "c", "logits"])
    assert found.names == {"logits": "scores", "b": "b"}
    assert found.left_out == {"d": "is a single number", "a": "is scores again", "c": "is b again"}
    assert without_copies(choice, [object() for _ in range(4)], ["a", "b", "c", "logits"]) == choice
