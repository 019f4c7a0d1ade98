"""What a caller gives to a model that onnxruntime runs: arrays of the right kind pass, everything else is told."""

import types

import numpy as np
import pytest

from vit_convert.core.errors import BenchmarkError
from vit_convert.serve.fitting import fitting_inputs


def taken(name, kind, *shape):
    return types.SimpleNamespace(name=name, type=f"tensor({kind})", shape=shape)


IMAGES = taken("images", "float", "batch", 4, 4, 3)
TOKENS = taken("tokens", "int32", "batch", "length")
PIXELS = np.zeros((2, 4, 4, 3), np.float32)


def test_what_fits():
    ids = [[1, 2, 3]]
    found = fitting_inputs({"tokens": ids, "images": PIXELS}, [IMAGES, TOKENS])
    assert list(found) == ["images", "tokens"] and found["images"] is PIXELS  # not copied
    assert found["tokens"].dtype == np.int32 and found["tokens"].tolist() == ids
    assert fitting_inputs(PIXELS.tolist(), [IMAGES])["images"].dtype == np.float32
    assert fitting_inputs(PIXELS[::-1], [IMAGES])["images"].strides[0] < 0  # onnxruntime reads any layout


def test_an_array_of_another_library():
    class Tensor:
        dtype = "float32"

        def __array__(self, dtype=None, copy=None):
            return PIXELS

    assert fitting_inputs(Tensor(), [IMAGES])["images"] is PIXELS


class OnAGpu:
    dtype = "float32"

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert a cuda tensor")


@pytest.mark.parametrize(
    ("wanted", "given", "said"),
    [
        (IMAGES, PIXELS.astype(np.uint8), "images: uint8 [2, 4, 4, 3], the model takes float32 [batch, 4, 4, 3]"),
        (IMAGES, PIXELS[0], "images: float32 [4, 4, 3], the model takes float32 [batch, 4, 4, 3]"),
        (IMAGES, PIXELS[:, :3], "images: float32 [2, 3, 4, 3], the model takes"),
        (IMAGES, PIXELS[:0], "images: float32 [0, 4, 4, 3], the model takes"),
        (IMAGES, PIXELS.transpose(0, 3, 1, 2), "images: float32 [2, 3, 4, 4], the model takes"),
        (IMAGES, OnAGpu(), "images: a OnAGpu, the model takes float32"),
        (IMAGES, None, "images: float32 [], the model takes float32"),
        (IMAGES, [[1], [2, 3]], "images: a list, the model takes float32"),
        (TOKENS, "a cat", "tokens: a str, the model takes int32 [batch, length]"),
        (TOKENS, ["a cat"], "tokens: a list, the model takes int32"),
        (TOKENS, np.ones((2, 3)), "tokens: float64 [2, 3], the model takes int32"),
        (TOKENS, np.ones((2, 3), np.int64), "tokens: int64 [2, 3], the model takes int32"),
        (taken("x", "bfloat16", 2), np.ones(3), "x: float64 [3], the model takes tensor(bfloat16) [2]"),
    ],
)
def test_what_does_not_fit(wanted, given, said):
    with pytest.raises(BenchmarkError) as error:
        fitting_inputs(given, [wanted])
    assert str(error.value).startswith(said)
    assert ("tokenizer" if wanted is TOKENS else "images") in error.value.fix


def test_inputs_are_known_by_name():
    with pytest.raises(BenchmarkError, match=r"^the model takes images, tokens; given images, words$"):
        fitting_inputs({"images": PIXELS, "words": [[1]]}, [IMAGES, TOKENS])
    with pytest.raises(BenchmarkError, match=r"^the model takes images, tokens; given images$"):
        fitting_inputs(PIXELS, [IMAGES, TOKENS])
    with pytest.raises(BenchmarkError, match=r"^the model takes images; given nothing$"):
        fitting_inputs({}, [IMAGES])
