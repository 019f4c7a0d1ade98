"""Sizes by majority: one leaf that is wrong is outvoted, and a kind that is missing is replaced by the next that
tells."""

import numpy as np

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.vote import count_numbers, most_common, patch_side


def leaves(**shapes):
    return {name: Leaf(name, shape, np.dtype(np.float32), lambda: np.zeros(0)) for name, shape in shapes.items()}


def test_the_length_that_most_have():
    found = leaves(a_bias=(8,), b_bias=(7,), c_bias=(8,), kernel=(3, 9))
    assert most_common(found, ("bias$", 0)) == most_common(found, ("bias$", -1)) == 8
    assert most_common(found, ("kernel$", 0)) == 3
    assert most_common(found, ("kernel$", 1)) == most_common(found, ("kernel$", -1)) == 9
    assert most_common(found, ("^kernel", -2)) == 3
    assert most_common(found, ("^ias$", 0)) == 0


def test_a_kind_that_tells_nothing_is_followed_by_the_next():
    found = leaves(scale=(), kernel=(3, 9), other=(5,))
    assert most_common(found, ("bias$", 0), ("kernel$", 1), ("other$", 0)) == 9
    assert most_common(found, ("scale$", 0), ("other$", 0)) == 5  # a scalar has no axis
    assert most_common(found, ("other$", 1), ("kernel$", 0)) == 3
    assert most_common(found, ("other$", -2), ("kernel$", 0)) == 3
    assert most_common(found) == most_common({}, ("x", 0)) == 0


def test_numbers_are_counted_once():
    names = ["block_0/a", "block_0/b", "block_12/a", "block_x/a", "encoder/block_5/a", "block_3"]
    assert count_numbers(names, r"block_(\d+)/") == 2
    # of numbers, not of what is before them
    assert count_numbers(["image_1/a", "text_1/a", "text_2/a"], r"(?:image|text)_(\d+)/") == 2
    assert count_numbers([], r"block_(\d+)/") == 0


def test_the_patch_is_what_width_and_colours_leave_over():
    assert patch_side(leaves(k=(16, 16, 3, 768)), "k", 768) == 16
    assert patch_side(leaves(k=(768, 3, 14, 14)), "k", 768) == 14  # whatever the order
    assert patch_side(leaves(k=(3, 3, 3, 768)), "k", 768) == 3
    assert patch_side(leaves(k=(32, 32, 3, 32)), "k", 32) == 32
    assert patch_side(leaves(k=(3, 768)), "k", 768) == patch_side(leaves(), "k", 768) == 1
