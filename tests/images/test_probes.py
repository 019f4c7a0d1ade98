"""Noise, black and white as graphs take them."""

import numpy as np
import pytest

from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.images.preprocess import preprocess_for
from vit_convert.images.probes import probe_inputs


def probes(*inputs, size=(4, 6)):
    signature = Signature(inputs, (Output("y", "float32", ("batch", 3)),))
    return probe_inputs(signature, preprocess_for("vit_jax", (4, 4)).to_dict(), size)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_images(layout):
    shape = ("batch", "height", "width", 3) if layout == "NHWC" else ("batch", 3, "height", "width")
    found = probes(Tensor("images", "float32", shape, layout))["images"]
    assert found.shape == ((4, 4, 6, 3) if layout == "NHWC" else (4, 3, 4, 6)) and found.dtype == np.float32
    assert np.array_equal(found[0], found[3]) and found[0].std() > 0.1
    np.testing.assert_allclose(found[1], -1, atol=1e-6)  # mean = std = 0.5
    np.testing.assert_allclose(found[2], 1, atol=1e-6)


def test_pixels():
    found = probes(Tensor("images", "uint8", ("batch", 4, 6, 3), "NHWC"))["images"]
    assert found.dtype == np.uint8 and (found[1] == 0).all() and (found[2] == 255).all()


def test_tokens_and_others():
    tokens = Tensor("tokens", "int32", ("batch", 16), below=100)
    others = Tensor("bias", "float32", ("batch", 2, "length"))
    found = probes(tokens, others, size=())
    assert found["tokens"].dtype == np.int32 and (found["tokens"][1] == 0).all() and (found["tokens"][2] == 99).all()
    assert found["tokens"][0].min() >= 0 and found["tokens"][0].max() < 100 and found["tokens"][0].std() > 0
    assert found["bias"].shape == (4, 2, 1) and (found["bias"][1] == -1).all() and (found["bias"][2] == 1).all()


@pytest.mark.parametrize(("below", "largest"), [(0, 1), (2, 1), (3, 2), (5, 4)])
def test_whole_numbers_reach_the_last_id(below, largest):
    """A mask, of which no vocabulary is known, is 0 or 1."""
    found = probes(Tensor("mask", "int32", ("batch", 64), below=below), size=())["mask"]
    assert {*found[0].tolist()} == {*range(largest + 1)} and (found[2] == largest).all()
