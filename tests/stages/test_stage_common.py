"""What several stages ask: the dialect, the backend, how images and pixels enter the graph."""

import numpy as np
import pytest
from stage_context import PREPROCESS, change, make_context, normalized, pixels

from vit_convert.core.dialect import dialect_of
from vit_convert.core.errors import BuildError
from vit_convert.engine.backend import trt
from vit_convert.images.sources import open_images
from vit_convert.stages import common


@pytest.fixture
def context(tmp_path):
    return make_context(tmp_path / "b")


@pytest.fixture
def backends(monkeypatch):
    """The TensorRTs of this host, by the config's name: what has flags alone, both, types alone; missing ones are not
    installed."""
    found = {}

    class Backend:
        def __init__(self, strongly_typed, weakly_typed):
            self.strongly_typed = strongly_typed
            self.dialect = dialect_of(rtx=False, strongly_typed=strongly_typed, weakly_typed=weakly_typed)

    def load(name):
        loads.append(name)
        if name not in found:
            raise BuildError(f"{name}: not installed")
        return Backend(*found[name])

    loads = []
    monkeypatch.setattr(trt, "load_backend", load)
    common.backend_named.cache_clear()
    yield found, loads
    common.backend_named.cache_clear()


EIGHT, TEN, ELEVEN = (False, True), (True, True), (True, False)


@pytest.mark.parametrize("asked", ["trt8", "trt10", "trt11", "rtx"])
def test_the_target_that_is_asked_for_asks_no_backend(context, backends, asked):
    context.config.target, context.config.engine.backend = asked, "tensorrt"
    assert common.dialect_for(context).name == asked and backends[1] == []


def test_the_target_of_the_backend(context, backends):
    context.config.target = "".join("auto")  # as a word out of a config file is: none of Python's own copies
    for name in ("rtx", "none"):
        context.config.engine.backend = name
        assert common.dialect_for(context).name == "rtx" and backends[1] == []
    for name, kind, target in (("tensorrt", EIGHT, "trt8"), ("auto", TEN, "trt10")):
        backends[0][name] = kind
        context.config.engine.backend = name
        assert common.dialect_for(context).name == common.dialect_for(context).name == target
    assert backends[1] == ["tensorrt", "auto"]  # each is loaded once
    common.backend_named.cache_clear()
    backends[0]["auto"] = ELEVEN
    assert common.dialect_for(context).name == "trt11"


@pytest.mark.parametrize(
    ("backend", "target", "there", "builds"),
    [
        ("none", "auto", TEN, False),
        ("none", "trt8", EIGHT, False),
        ("auto", "auto", None, True),  # which is refused when it is to build
        ("auto", "trt8", EIGHT, True),
        ("auto", "trt8", TEN, False),  # its own host builds it
        ("auto", "trt8", None, False),
        ("auto", "trt10", TEN, True),
        ("tensorrt", "trt8", TEN, True),  # asked for by name
        ("rtx", "trt8", None, True),
    ],
)
def test_where_engines_are_built(context, backends, backend, target, there, builds):
    if there:
        backends[0][backend] = there
    # As words out of a config file are: none of Python's own copies.
    context.config.engine.backend, context.config.target = "".join(backend), "".join(target)
    assert common.builds_here(context) is builds


def test_config_values_are_what_json_can_spell(context):
    context.config.batch.profiles = (1, 64)
    assert common.plain(context.config.batch) == {"min": 1, "opt": 8, "max": 64, "profiles": [1, 64]}


def test_a_graph_and_its_weights(context):
    root = context.bundle.root
    assert common.graph_files(context, "fp32") == [root / "model.onnx", root / "model.onnx.data"]
    assert common.graph_files(context, "int8") == [root / "model.int8.onnx", root / "model.int8.onnx.data"]


def test_images_are_told_apart_by_what_they_are(tmp_path):
    assert common.source_identity("", labelled=True) == "noise"
    path = tmp_path / "a.npz"
    np.savez(path, images=pixels(3), labels=np.arange(3))
    first = common.source_identity(str(path), labelled=True)
    assert first == [str(path), open_images(str(path), labelled=True).fingerprint]
    np.savez(path, images=pixels(4), labels=np.arange(4))
    assert common.source_identity(str(path), labelled=True) != first


def test_images_are_decoded_to_the_models_size(context, tmp_path):
    """[height, width], of which the noise of the source has another."""
    change(context, "checkpoint", image_size=[6, 4])
    path = tmp_path / "a.npz"
    np.savez(path, images=pixels(5, 6, 4), labels=np.arange(5))
    found = common.decode(context, "evaluation", open_images(str(path), labelled=True), 3)
    assert found.images.shape == (3, 6, 4, 3)
    assert np.load(context.bundle.images("evaluation")).shape == (3, 6, 4, 3)
    chosen = np.load(context.bundle.labels("evaluation"))
    assert np.array_equal(np.load(context.bundle.images("evaluation")), pixels(5, 6, 4)[chosen])


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_what_a_graph_takes(context, layout, kind):
    context.config.layout, context.config.input = layout, kind
    images = pixels(2, 6, 4)
    got = common.prepare(context)(images)
    assert (
        got.dtype == kind
        and got.flags.c_contiguous
        and got.shape == ((2, 6, 4, 3) if layout == "NHWC" else (2, 3, 6, 4))
    )
    got = got if layout == "NHWC" else np.moveaxis(got, 1, 3)
    wanted = images if kind == "uint8" else normalized(images)
    assert np.abs(got - wanted).max() < 1e-6  # a product and a sum of values up to 4, in float32
    assert common.preprocess_of(context).std == tuple(PREPROCESS["std"])


def test_labelled_images(context):
    assert common.evaluation(context) is None
    np.save(context.bundle.images("evaluation"), pixels(3))
    np.save(context.bundle.labels("evaluation"), np.array([4, 0, 2]))
    assert common.evaluation(context) is None  # another conversion's
    change(context, "images", labelled=True)
    images, labels = common.evaluation(context)
    assert isinstance(images, np.memmap) and np.array_equal(images, pixels(3)) and labels.tolist() == [4, 0, 2]
    change(context, "images", labelled=False)
    assert common.evaluation(context) is None
