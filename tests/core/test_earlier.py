"""The signature of a bundle, and of those that were made before there was one in it."""

import json

import pytest

from vit_convert.core.bundle import Bundle
from vit_convert.core.earlier import read_signature
from vit_convert.core.errors import UsageError
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.core.stage_results import Checkpoint

RANGE = {"smallest": [32, 32], "optimal": [48, 32], "largest": [64, 96]}


def checkpoint(**more):
    return Checkpoint.from_dict({"image_size": [48, 32], "output": "logits", **more})


@pytest.mark.parametrize(
    ("config", "more", "dtype", "shape", "layout"),
    [
        ({}, {}, "float32", ("batch", 48, 32, 3), "NHWC"),
        ({"layout": "NHWC", "input": "float32"}, {}, "float32", ("batch", 48, 32, 3), "NHWC"),
        ({"layout": "NCHW"}, {}, "float32", ("batch", 3, 48, 32), "NCHW"),
        ({"input": "uint8"}, {}, "uint8", ("batch", 48, 32, 3), "NHWC"),
        ({}, {"image_range": RANGE}, "float32", ("batch", "height", "width", 3), "NHWC"),
    ],
)
def test_a_bundle_without_one(tmp_path, config, more, dtype, shape, layout):
    found = read_signature(Bundle(tmp_path), checkpoint(**more), config)
    (images,) = found.inputs
    assert (images.name, images.dtype, tuple(images.shape), images.layout) == ("images", dtype, shape, layout)


@pytest.mark.parametrize(("output", "judge"), [("logits", "top1"), ("features", "cosine")])
def test_how_its_output_was_judged(tmp_path, output, judge):
    (found,) = read_signature(Bundle(tmp_path), checkpoint(output=output), {}).outputs
    assert (found.name, found.dtype, found.judge, found.shape[0]) == (output, "float32", judge, "batch")


def test_the_one_in_the_bundle_counts(tmp_path):
    texts = Tensor("tokens", "int32", ("batch", 7), below=9)
    mine = Signature((texts,), (Output("embedding", "float32", ("batch", 4), judge="embedding"),))
    bundle = Bundle(tmp_path)
    bundle.signature.write_text(json.dumps(mine.to_dict()))
    assert read_signature(bundle, checkpoint(), {}) == mine


@pytest.mark.parametrize("content", ["", "[", "null", "{}", '{"inputs": 3, "outputs": []}'])
def test_a_damaged_one_is_refused_by_its_name(tmp_path, content):
    bundle = Bundle(tmp_path)
    bundle.signature.write_text(content)
    with pytest.raises(UsageError, match=r"signature\.json") as caught:
        read_signature(bundle, checkpoint(), {})
    assert "Copy the whole bundle" in caught.value.fix
