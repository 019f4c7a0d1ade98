"""Signatures as files keep them, and the names of stacks of blocks."""

import json

import pytest

from vit_convert.core.errors import UsageError
from vit_convert.core.layer_names import block_of, layer_names, within_block
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.core.stack import Stack

TWO = Signature(
    (Tensor("images", "uint8", ("batch", "height", "width", 3), "NHWC"), Tensor("tokens", "int32", ("batch", 64))),
    (
        Output("embedding", "float32", ("batch", 512), judge="embedding"),
        Output("logits", "float32", ("batch", 10), judge="top1"),
    ),
)


def test_a_signature_survives_a_file():
    record = json.loads(json.dumps(TWO.to_dict()))
    assert record["inputs"][1] == {"name": "tokens", "dtype": "int32", "shape": ["batch", 64], "layout": "", "below": 0}
    about = {"dtype": "float32", "shape": ["batch", 512], "layout": "", "below": 0, "judge": "embedding"}
    assert record["outputs"][0] == {"name": "embedding", **about}
    assert Signature.from_dict(record) == TWO


def test_what_is_looked_for_in_it():
    assert TWO.image == TWO.inputs[0] and TWO.classes == TWO.outputs[1] and TWO.judged == ("embedding", "logits")
    text = Signature(TWO.inputs[1:], TWO.outputs[:1])
    assert text.image is None and text.classes is None


FULL = Signature(
    (Tensor("images", "float32", ("batch", 24, 32, 3), "NHWC"), Tensor("tokens", "int32", ("batch", 64), below=99)),
    (Output("maps", "float32", ("batch", 12, 7, 512)), Output("logits", "float32", ("batch", 10), judge="top1")),
)


@pytest.mark.parametrize(
    ("layout", "uint8", "dynamic", "shape"),
    [
        ("NHWC", False, False, ("batch", 24, 32, 3)),
        ("NCHW", False, False, ("batch", 3, 24, 32)),
        ("NCHW", True, False, ("batch", 3, 24, 32)),
        ("NHWC", True, True, ("batch", "height", "width", 3)),
        ("NCHW", False, True, ("batch", 3, "height", "width")),
    ],
)
def test_what_a_graph_takes_and_gives(layout, uint8, dynamic, shape):
    """Of images of another layout, as pixels, or of any size: then the number of tokens is not known."""
    found = FULL.of_graph(layout, uint8=uint8, dynamic=dynamic)
    assert found.inputs == (Tensor("images", "uint8" if uint8 else "float32", shape, layout), FULL.inputs[1])
    between = ("tokens", "tokens") if dynamic else (12, 7)
    assert found.outputs == (Output("maps", "float32", ("batch", *between, 512)), FULL.outputs[1])
    scalar = Signature(FULL.inputs, (Output("score", "float32", ("batch",)),))
    assert scalar.of_graph(layout, dynamic=dynamic).outputs == scalar.outputs


def test_what_an_input_is_by_default():
    tensor, output = Tensor("x", "float32", ("batch",)), Output("y", "float32", ("batch",))
    assert (tensor.layout, tensor.below, tensor.is_image) == ("", 0, False) and FULL.inputs[0].is_image
    assert (output.layout, output.below) == ("", 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record.pop("outputs"),
        lambda record: record["inputs"].clear(),
        lambda record: record["outputs"][0].update(judge="taste"),
        lambda record: record["inputs"][0].update(shape=[]),
        lambda record: record["inputs"][0].update(shape=[1.5]),
        lambda record: record["inputs"][0].update(colour="red"),
        lambda record: record.update(outputs=3),
    ],
)
def test_a_damaged_signature_is_said(damage):
    record = json.loads(json.dumps(TWO.to_dict()))
    damage(record)
    with pytest.raises(UsageError, match="not a signature"):
        Signature.from_dict(record)


@pytest.mark.parametrize(
    ("name", "block", "rest"),
    [
        ("Transformer/encoderblock_3/MlpBlock_0/Dense_0/kernel", "block_03", "MlpBlock_0/Dense_0/kernel"),
        ("stage_2/block_5/attn/query/kernel", "stage_2/block_05", "attn/query/kernel"),
        ("img/stage_1/block_12/conv1/kernel", "stage_1/block_12", "conv1/kernel"),
        ("stage_2/downsample/reduction/kernel", None, "stage_2/downsample/reduction/kernel"),
        ("stage_2/block_5x/kernel", None, "stage_2/block_5x/kernel"),
    ],
)
def test_blocks_of_several_stacks_have_names_of_their_own(name, block, rest):
    assert block_of(name) == block
    assert within_block(name) == rest
    if block:
        assert {block, name} <= layer_names(name)


def test_a_stack_names_its_blocks():
    stack = Stack("stage_2/block_{}/", 18, "stage_2/block_{:02d}", period=2)
    assert (stack.prefix(11), stack.tap(11), stack.traced) == ("stage_2/block_11/", "stage_2/block_11", 4)
    assert stack.cut().depth == 4 and stack.cut().cut() == stack.cut()
    assert Stack("Transformer/encoderblock_{}/", 1).traced == 1
    plain = Stack("Transformer/encoderblock_{}/", 12)
    assert (plain.taps, plain.start, plain.period, plain.nodes, plain.traced) == ("block_{:02d}", "", 1, 1.0, 2)


@pytest.mark.parametrize(
    ("scope", "depth", "taps", "period"),
    [
        ("img/block_{}/", 3, "img/block_{:02d}", 1),  # two towers of such scopes would have one name
        ("Transformer/encoderblock_{}/", 3, "layer_{}", 1),
        ("stage_2/block_{}/", 5, "stage_2/block_{:02d}", 2),
    ],
)
def test_a_stack_whose_names_disagree_is_refused(scope, depth, taps, period):
    with pytest.raises(ValueError, match=f"stack '{scope}': ") as error:
        Stack(scope, depth, taps, period=period)
    says = {
        "img/block_{}/": "its parameters' names say block_03, its taps img/block_03; use 'stage_<name>",
        "Transformer/encoderblock_{}/": "its parameters' names say block_03, its taps layer_3; use 'stage_<name>",
        "stage_2/block_{}/": "5 blocks in periods of 2",
    }
    assert says[scope] in str(error.value)
