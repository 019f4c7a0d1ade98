"""What a model says of itself, whatever its family."""

import pytest

from vit_convert.core.model import Model
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.core.stack import Stack


def model(stacks=(), traced_taps=()):
    outputs = tuple(Output(name, "float32", ("batch", 4)) for name in ("first", "second"))
    signature = Signature((Tensor("x", "float32", ("batch", 4)),), outputs)
    return Model(signature, {}, (), lambda *_: {}, {}, traced_taps, lambda *_: {}, tuple(stacks))


def stack(depth, name=""):
    return Stack(f"{name}block_{{}}/", depth, f"{name}block_{{:02d}}")


def test_the_first_output_stands_for_it():
    assert model().output == "first"


@pytest.mark.parametrize(
    ("depths", "traced", "repeats"),
    [
        ((), (), False),
        ((2,), ("block_00", "block_01"), False),
        ((3,), ("block_00", "block_01"), True),
        ((3,), ("block_00", "block_01", "block_02"), False),
    ],
)
def test_blocks_that_are_not_traced_are_repeated(depths, traced, repeats):
    assert model(map(stack, depths), traced).repeats is repeats


def test_one_stack_of_several_is_enough():
    short, long = stack(1, "stage_1/"), stack(3, "stage_2/")
    traced = ["stage_1/block_00", "stage_2/block_00", "stage_2/block_01"]
    assert model([short, long], traced).repeats and model([long, short], traced).repeats
    assert not model([short, long], [*traced, "stage_2/block_02"]).repeats
