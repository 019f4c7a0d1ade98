"""An engine of images and tokens with two outputs on the simulated GPU, against onnxruntime on the same graph."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from simulated_gpu import write_plan

from vit_convert.core.errors import BenchmarkError, BuildError
from vit_convert.core.image_size import ImageRange
from vit_convert.core.signature import Tensor
from vit_convert.engine.measure.loops import Worker
from vit_convert.engine.runtime.engine import Engine
from vit_convert.engine.runtime.pipelined import PipelinedSession
from vit_convert.engine.runtime.profiles import batch_profiles
from vit_convert.engine.runtime.session import Session

LENGTH, WIDTH = 5, 3
RANGES = [((4, 2, 2, WIDTH),) * 3, ((2, 2, 2, WIDTH), (4, 4, 4, WIDTH), (6, 6, 6, WIDTH))]


def graph(path, tokens_shape=("batch", LENGTH)):
    """The mean of the images' pixels plus that of the tokens' rows of a table; and the tokens, doubled."""
    table = np.arange(10 * WIDTH, dtype=np.float32).reshape(10, WIDTH)
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["pixels"], axes=[1, 2], keepdims=0),
        helper.make_node("Gather", ["table", "tokens"], ["rows"]),
        helper.make_node("ReduceMean", ["rows"], ["text"], axes=[1], keepdims=0),
        helper.make_node("Add", ["pixels", "text"], ["both"]),
        helper.make_node("Cast", ["tokens"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["numbers", "numbers"], ["twice"]),
    ]
    inputs = [
        # not the first, and not the one that leads
        helper.make_tensor_value_info("tokens", TensorProto.INT32, tokens_shape),
        helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", "height", "width", WIDTH]),
    ]
    outputs = [
        helper.make_tensor_value_info("both", TensorProto.FLOAT, ["batch", WIDTH]),
        helper.make_tensor_value_info("twice", TensorProto.FLOAT, ["batch", LENGTH]),
    ]
    weights = [helper.make_tensor("table", TensorProto.FLOAT, table.shape, table.ravel().tolist())]
    made = helper.make_graph(nodes, "two", inputs, outputs, weights)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def feeds(batch, side=2, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "images": generator.normal(size=(batch, side, side, WIDTH)).astype(np.float32),
        "tokens": generator.integers(0, 10, (batch, LENGTH)).astype(np.int32),
    }


@pytest.fixture
def engine(gpu, tmp_path):
    path = graph(tmp_path / "model.onnx")
    return Engine(gpu[0], write_plan(tmp_path / "fp32.plan", path, RANGES), onnx_path=path)


def assert_gives(tmp_path, got, given):
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    expected = dict(zip(("both", "twice"), session.run(None, given)))
    assert list(got) == list(expected)
    for name, value in expected.items():
        # A padded batch may sum in another order: float32 rounding of values below 30.
        np.testing.assert_allclose(got[name], value, rtol=1e-6, atol=1e-5)


# 1 is padded to 2, 4 takes the fixed profile, 5 the range, 7 and 13 are split; a side of 4 is the range's alone.
@pytest.mark.parametrize(("batch", "side"), [(1, 2), (4, 2), (5, 2), (7, 2), (13, 2), (3, 4)])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_any_batch_and_size(engine, tmp_path, batch, side, cuda_graphs):
    with Session(engine, cuda_graphs=cuda_graphs) as session:
        for seed in (0, 1):  # the second run is a replay, of other values
            given = feeds(batch, side, seed)
            assert_gives(tmp_path, session.run(given), given)


def test_pipelined(engine, tmp_path):
    batches = [feeds(batch, seed=batch) for batch in (4, 5, 3, 4)]
    with PipelinedSession(engine) as session:
        for given, got in zip(batches, session.run(batches), strict=True):
            assert_gives(tmp_path, got, given)


def test_the_measuring_loop_feeds_every_input(engine):
    with Session(engine) as session:
        worker = Worker(session, (4, 2, 2, WIDTH), transfers=True)
        worker.enqueue()
        session.wait()
        assert set(worker._results["twice"].ravel()) == {0.0, 2.0}  # whole numbers that any vocabulary has


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda given: given["images"], "the engine takes tokens, images; given one array"),
        (lambda given: {"images": given["images"]}, "the engine takes tokens, images; given images"),
        (lambda given: {**given, "words": given["tokens"]}, "given images, tokens, words"),
        (
            lambda given: {**given, "tokens": given["tokens"].astype(np.int64)},
            r"tokens: given int64 \[4, 5\], the engine takes int32",
        ),
        (
            lambda given: {**given, "tokens": given["tokens"][:, :4]},
            r"tokens: given int32 \[4, 4\], the engine takes int32 \[-1, 5\]",
        ),
        (lambda given: {**given, "tokens": given["tokens"][:3]}, "tokens: batch 3, images has 4"),
        (lambda given: {**given, "images": given["images"][..., :2]}, r"images \[4, 2, 2, 2\]: the engine takes"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(engine, change, said):
    with Session(engine) as session, pytest.raises(BenchmarkError, match=said):
        session.run(change(feeds(4)))


def test_two_inputs_whose_sides_vary_are_refused(gpu, tmp_path):
    path = graph(tmp_path / "model.onnx", tokens_shape=("batch", "length"))
    with pytest.raises(BuildError, match=r"more than one input has sides that vary: tokens \[-1, -1\], images"):
        Engine(gpu[0], write_plan(tmp_path / "fp32.plan", path, RANGES), onnx_path=path)


def test_profiles_of_every_input():
    inputs = (
        Tensor("tokens", "int32", ("batch", 64)),
        Tensor("images", "float32", ("batch", 3, "height", "width"), "NCHW"),
    )
    sizes = ImageRange((16, 32), (32, 48), (64, 96))
    found = batch_profiles(inputs, sizes, {"min": 1, "opt": 8, "max": 64, "profiles": (2,)})
    assert [profile["tokens"] for profile in found] == [((2, 64),) * 3, ((1, 64), (8, 64), (64, 64))]
    assert found[1]["images"] == ((1, 3, 16, 32), (8, 3, 32, 48), (64, 3, 64, 96))
    with pytest.raises(BuildError, match=r"tokens .*: a side that nothing tells the size of"):
        batch_profiles(
            (Tensor("tokens", "int32", ("batch", "length")),), (2, 2), {"min": 1, "opt": 1, "max": 1, "profiles": ()}
        )


def test_each_input_has_memory_of_its_own(engine):
    with Session(engine) as session:
        assert set(session.input_buffers) == {"images", "tokens"}
        assert len({buffer.pointer for buffer in session.input_buffers.values()}) == 2
        assert session.input_buffer is session.input_buffers["images"]
