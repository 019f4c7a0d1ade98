"""The smallest and largest x of tensors and channels, of both forms of the reductions, against NumPy on values that the
test computes."""

import numpy as np
import onnx
import pytest

from vit_convert.quantize import activation_max
from vit_convert.quantize.activation_max import extremes, largest

# `turned` has channels that are not last, `wide` beside axes of one; `images` is what the graph takes.
GRAPH = """<ir_version: 8, opset_import: ["" : {opset}]>
g (float[N, 4, 6] images) => (float[N, 4, 6] logits) <float[6] scale, float shift, int64[4] four = {{-1, 6, 1, 1}}> {{
    scaled = Mul (images, scale)
    wide = Reshape (scaled, four)
    neg = Neg (images)
    logits = Sub (neg, shift)
}}"""
SCALE = np.array([1, -2, 3, 0.5, 4, -0.25], np.float32)


@pytest.fixture(params=[17, 18, 20])
def graph(tmp_path, request):
    """ReduceMax takes its axes as an attribute before opset 18 and as an input since."""
    model = onnx.parser.parse_model(GRAPH.format(opset=request.param))
    for name, value in (("scale", SCALE), ("shift", np.float32(2.5))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


BATCHES = [
    np.random.default_rng(i).normal(i, 1 + i, (size, 4, 6)).astype(np.float32) for i, size in enumerate((2, 3, 1))
]
IMAGES = np.concatenate(BATCHES)


def test_whole_tensors_over_all_batches(graph):
    found = extremes(graph, ["scaled", "logits"], iter(BATCHES))
    assert list(found) == ["scaled", "logits"]
    for name, values in (("scaled", IMAGES * SCALE), ("logits", -IMAGES - np.float32(2.5))):
        low, high = found[name]
        # the same float32 products
        assert low.shape == high.shape == () and (low, high) == (values.min(), values.max())
    magnitudes = largest(graph, ["scaled", "logits"], BATCHES)
    assert (
        magnitudes["scaled"] == np.abs(IMAGES * SCALE).max()
        and magnitudes["logits"] == np.abs(-IMAGES - np.float32(2.5)).max()
    )


def test_where_the_largest_is_negative_and_where_it_comes_first(graph):
    """One batch's extremes must not take another's place."""
    batches = [np.full((1, 4, 6), value, np.float32) for value in (-7, 3, 5, -1)]
    assert largest(graph, ["scaled"], batches)["scaled"] == 28
    low, high = extremes(graph, ["logits"], batches)["logits"]
    assert (low, high) == (-7.5, 4.5)


def test_channels_are_the_last_axis_longer_than_one(graph):
    found = extremes(graph, ["scaled", "wide"], BATCHES, per_channel=True)
    values = IMAGES * SCALE
    for low, high, columns in (
        (*found["scaled"], values.reshape(-1, 6)),
        (*found["wide"], values.reshape(-1, 6)),  # [N · 4, 6, 1, 1] has the same six
    ):
        assert np.array_equal(low, columns.min(0)) and np.array_equal(high, columns.max(0)) and low.dtype == np.float32
    assert np.array_equal(largest(graph, ["scaled"], BATCHES, per_channel=True)["scaled"], np.abs(values).max((0, 1)))


def test_the_file_is_left_as_it_is(graph):
    before = graph.read_bytes()
    largest(graph, ["scaled"], BATCHES, per_channel=True)
    assert graph.read_bytes() == before and [path.name for path in graph.parent.iterdir()] == ["model.onnx"]


def test_weights_stay_in_their_file(graph, monkeypatch):
    """A large model's are not read into memory beside what onnxruntime holds of them."""
    model = onnx.load(graph)
    external = graph.with_name("external.onnx")
    onnx.save(
        model,
        external,
        save_as_external_data=True,
        location="external.onnx.data",
        size_threshold=0,
        convert_attribute=False,
    )
    opened, real = [], activation_max.open_proto
    monkeypatch.setattr(activation_max, "open_proto", lambda proto, folder: opened.append(proto) or real(proto, folder))
    assert largest(external, ["scaled"], BATCHES) == largest(graph, ["scaled"], BATCHES)
    assert {
        weight.name for weight in opened[0].graph.initializer if weight.data_location == onnx.TensorProto.EXTERNAL
    } >= {
        "scale",
        "shift",
    }


def test_nothing_is_found_of_no_images(graph):
    assert extremes(graph, ["scaled"], []) == {}
