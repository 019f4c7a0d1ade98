"""What a file has to hold: the first difference in the model's order is named, and how many more there are."""

import pathlib

import numpy as np
import pytest

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.match import Expected, require_blocks, require_match
from vit_convert.core.errors import CheckpointError

SHAPES = {"a": (2, 3), "b": (4,), "c": (3, 2)}
WHOLE = "Save the model's parameters, whole and nothing else, under the names its project uses."
SET = "Set variant to the checkpoint's, or to auto."


def refused(shapes, *, found="", num_params=16):
    held = {
        name: Leaf(f"old/{name}", (*shape,), np.dtype(np.float32), lambda: np.zeros(0))
        for name, shape in shapes.items()
    }
    expected = Expected(pathlib.Path("f.npz"), "B/16", SHAPES, num_params, lambda name: f"params/{name}", found)
    try:
        require_match(held, expected)
    except CheckpointError as e:
        return str(e), e.fix
    return None


def test_what_matches():
    assert refused(SHAPES) is None
    assert refused(dict(reversed(SHAPES.items()))) is None


def test_one_difference():
    assert refused(SHAPES | {"b": (5,)}) == ("f.npz: old/b: checkpoint (5,), variant B/16 needs (4,).", WHOLE)
    assert refused({name: SHAPES[name] for name in "ac"}) == (
        "f.npz: params/b: missing, variant B/16 needs (4,).",
        WHOLE,
    )
    assert refused(SHAPES | {"d": (1,)}) == ("f.npz: old/d: belongs to no part of variant B/16.", WHOLE)


def test_several_are_counted_shapes_first_then_what_is_missing():
    assert (
        refused({"c": (9,), "d": (1,), "b": (9,)})[0]
        == "f.npz: old/b: checkpoint (9,), variant B/16 needs (4,). (and 3 more)"
    )
    assert refused({"c": (3, 2), "d": (1,)})[0] == "f.npz: params/a: missing, variant B/16 needs (2, 3). (and 2 more)"
    assert (
        refused(SHAPES | {"d": (1,), "e": (1,)})[0] == "f.npz: old/d: belongs to no part of variant B/16. (and 1 more)"
    )


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("params/layers_0/kernel", (2, 3), " Is it old/params/layers_0/kernel, which has that shape?"),
        ("params/layers_0/kernel", (3, 2), ""),  # another shape is another leaf
        ("params/mean", (2, 3), ""),
    ],
)
def test_a_leaf_under_nearly_its_name(name, shape, said):
    """Of the first that is missing; the nearest alone."""
    there = {name: shape, "c": (3, 2), "z": (2, 3)}
    held = {key: Leaf(f"old/{key}", side, np.dtype(np.float32), lambda: np.zeros(0)) for key, side in there.items()}
    expected = Expected(pathlib.Path("f.npz"), "B/16", SHAPES, 16, lambda key: f"old/params/layer_0/kernel{key}"[:-1])
    with pytest.raises(CheckpointError) as error:
        require_match(held, expected)
    assert str(error.value) == (
        f"f.npz: old/params/layer_0/kernel: missing, variant B/16 needs (2, 3).{said} (and 3 more)"
    )


def test_transposed_is_said_where_all_are():
    flipped = {"a": (3, 2), "c": (2, 3)}
    assert refused(SHAPES | flipped)[0].endswith("needs (2, 3). It looks transposed. (and 1 more)")
    assert "transposed" not in refused(SHAPES | flipped | {"b": (5,)})[0]
    assert "transposed" not in refused({"a": (2, 3)})[0]
    for other in ((1, 1), (1, 6), (2, 2), (3, 4), (9, 9)):  # smaller and larger than what is needed
        assert "transposed" not in refused(SHAPES | {"a": other})[0]


@pytest.mark.parametrize(
    ("found", "hint", "fix"),
    [("S/16", " Did you mean S/16?", SET), ("custom", "", SET), ("B/16", "", SET), ("", "", WHOLE)],
)
def test_another_variant_than_the_one_asked_for(found, hint, fix):
    assert refused(SHAPES | {"b": (5,)}, found=found) == (
        f"f.npz: old/b: checkpoint (5,), variant B/16 needs (4,).{hint}",
        fix,
    )
    assert ("transposed" in refused(SHAPES | {"a": (3, 2)}, found=found)[0]) == (found != "S/16")


def test_a_number_of_parameters_that_does_not_agree():
    """Counted in closed form beside the list of shapes, so that neither is wrong alone."""
    assert refused(SHAPES, num_params=17) == ("f.npz: checkpoint 16 parameters, variant B/16 has 17", "")


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0,), None),
        ((2, 0, 1), None),
        ((), "layer 0 missing, no block found"),
        ((1,), "layer 0 missing, blocks up to 1 found"),
        ((0, 2), "layer 1 missing, blocks up to 2 found"),
        ((0, 1, 4), "layer 2, 3 missing, blocks up to 4 found"),
        ((0, 999_999), "layer 1, 2 missing, blocks up to 999999 found"),  # and not a list of all
        ((3,), "layer 0, 1 missing, blocks up to 3 found"),
    ],
)
def test_blocks_that_are_missing(numbers, said):
    names = [f"layer_{i}/{leaf}" for i in numbers for leaf in "ab"] + ["head/a", "layer_x/a", "outer/layer_7/a"]
    if said is None:
        return require_blocks(names, r"layer_(\d+)/", "layer", "f.npz")
    with pytest.raises(CheckpointError) as error:
        require_blocks(names, r"layer_(\d+)/", "layer", "f.npz")
    assert str(error.value) == f"f.npz: {said}" and error.value.fix
