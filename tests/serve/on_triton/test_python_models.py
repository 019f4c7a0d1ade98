"""What runs within Triton: batches, refusals that name what is wrong, preprocessing bit for bit, the fallback."""

import io
import json

import numpy as np
import pytest
from fake_triton import MetricFamily, request

from vit_convert.core.bundle import read_json
from vit_convert.core.errors import BenchmarkError
from vit_convert.images.patches import image_patches
from vit_convert.images.preprocess import preprocess_for
from vit_convert.images.sources import open_images
from vit_convert.serve.triton.models import classifier, top
from vit_convert.serve.triton.models.batches import answer_together
from vit_convert.serve.triton.models.common import refusal
from vit_convert.serve.triton.models.onnx_standin import TritonPythonModel as OnnxStandin
from vit_convert.serve.triton.models.preprocess import Fit
from vit_convert.serve.triton.models.preprocess import TritonPythonModel as Preprocessing
from vit_convert.serve.triton.models_of import models_of
from vit_convert.serve.triton.offered import read_offered
from vit_convert.serve.triton.parts import Asked
from vit_convert.serve.triton.repository import write_models


def arguments(folder, inputs, outputs, largest=8, **parameters):
    """What Triton gives to `initialize`."""
    config = {
        "max_batch_size": largest,
        "input": [{"name": name} for name in inputs],
        "output": [{"name": name} for name in outputs],
        "parameters": {key: {"string_value": str(value)} for key, value in parameters.items()},
    }
    return {
        "model_config": json.dumps(config),
        "model_repository": str(folder),
        "model_version": "1",
        "model_name": folder.name,
    }


def test_each_request_gets_its_own_rows(utils):
    seen = []

    def double(inputs):
        seen.append(len(inputs["x"]))
        return {"y": 2 * inputs["x"]}

    values = [np.arange(size * 2, dtype=np.float32).reshape(size, 2) + 10 * size for size in (1, 3, 2, 4)]
    answers = answer_together([request(x=value) for value in values], ["x"], double, most=4)
    for value, answer in zip(values, answers):
        np.testing.assert_array_equal(answer["y"], 2 * value)
    assert seen == [4, 2, 4]  # never more at once than the model takes, and no request is split


def test_a_bad_request_is_refused_by_name_and_the_others_answered(utils):
    good, bad = np.zeros((2, 3), np.float32), np.zeros((3, 3), np.float32)
    bad[1, 2] = np.nan
    answers = answer_together(
        [request(x=good), request(x=bad), request(x=good)], ["x"], lambda inputs: {"y": inputs["x"]}, most=8
    )
    assert "x: NaN or infinity at place 1 of 3" in answers[1].problem.message()
    assert answers[0]["y"].shape == answers[2]["y"].shape == (2, 3)


def test_shapes_that_differ_are_not_mixed(utils):
    answers = answer_together(
        [request(x=np.zeros((1, side, 2), np.float32)) for side in (3, 5, 3)],
        ["x"],
        lambda inputs: {"y": inputs["x"].sum((1, 2))},
        most=8,
    )
    assert [answer["y"].shape for answer in answers] == [(1,)] * 3


def test_a_failure_is_answered_and_not_raised(utils):
    def fail(inputs):
        raise BenchmarkError("the graph is broken", fix="Mend it.")

    (answer,) = answer_together([request(x=np.zeros((1, 1), np.float32))], ["x"], fail, most=8)
    assert answer.problem.message() == "the graph is broken. Mend it."


def encoded(image, kind, **options):
    pillow, file = pytest.importorskip("PIL.Image"), io.BytesIO()
    pillow.fromarray(image).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("family", ["vit_jax", "big_vision", "clip", "imagenet"])
def test_preprocessing_is_that_of_the_conversion_bit_for_bit(tmp_path, family):
    """Against the way that evaluation images go: a folder of files, opened and fitted by the images room."""
    generator = np.random.default_rng(1)
    noise = [generator.integers(0, 256, (*size, 3), np.uint8) for size in ((50, 70), (90, 40), (32, 32))]
    files = [encoded(noise[0], "JPEG", quality=90), encoded(noise[1], "PNG"), encoded(noise[2], "WEBP", lossless=True)]
    for number, (data, suffix) in enumerate(zip(files, (".jpg", ".png", ".webp"))):
        (tmp_path / f"{number}{suffix}").write_bytes(data)
    record = preprocess_for(family, (32, 32))
    source = open_images(tmp_path, labelled=False)
    fitted = np.stack([source.read(i, lambda image: record.fit(image, 32, 32)) for i in range(3)])
    for layout, dtype in (("NHWC", "float32"), ("NCHW", "float32"), ("NHWC", "uint8")):
        given = {
            "preprocess": json.dumps(record.to_dict()),
            "height": "32",
            "width": "32",
            "dtype": dtype,
            "layout": layout,
        }
        found = Fit(given).encoded(np.array([[data] for data in files], object))
        expected = record.graph_input(fitted, dtype, channels_first=layout == "NCHW")
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
    found = Fit(given).pixels(noise[0][None])
    assert np.array_equal(found[0], record.fit(noise[0], 32, 32))


def test_half_an_image_is_refused_by_its_place(utils, tmp_path):
    whole = encoded(np.random.default_rng(2).integers(0, 256, (40, 40, 3), np.uint8), "JPEG")
    record = json.dumps(preprocess_for("vit_jax", (32, 32)).to_dict())
    model = Preprocessing()
    model.initialize(
        arguments(
            tmp_path, ["image"], ["images"], preprocess=record, height=32, width=32, dtype="float32", layout="NHWC"
        )
    )
    half = request(image=np.array([[whole], [whole[: len(whole) // 2]]], object))
    good = request(image=np.array([[whole]], object))
    answers = model.execute([half, good, request(image=np.array([[b""]], object))])
    assert "image image[1] of 2: cannot be decoded" in answers[0].problem.message()
    assert "image image[0] of 1: cannot be decoded" in answers[2].problem.message()
    assert answers[1]["images"].shape == (1, 32, 32, 3)


def test_a_model_of_pixels_takes_them_as_they_are(utils, tmp_path):
    record = preprocess_for("vit_jax", (32, 32))
    model = Preprocessing()
    given = {"preprocess": json.dumps(record.to_dict()), "height": 32, "width": 32, "dtype": "uint8", "layout": "NCHW"}
    model.initialize(arguments(tmp_path, ["pixels"], ["images"], **given))
    pixels = np.random.default_rng(3).integers(0, 256, (2, 40, 50, 3), np.uint8)
    answers = model.execute([request(pixels=pixels), request(pixels=pixels[:, :0])])
    expected = np.stack([record.fit(image, 32, 32) for image in pixels])
    np.testing.assert_array_equal(answers[0]["images"], np.moveaxis(expected, 3, 1))
    assert "pixels [2, 0, 50, 3]: expected" in answers[1].problem.message()


def test_images_of_any_aspect_are_cut_into_patches(utils, tmp_path):
    """Several in one request, under the names that the config has for patches, places and mask, in any order."""
    images = [np.random.default_rng(i).integers(0, 256, (*size, 3)).astype(np.uint8)
              for i, size in enumerate([(40, 90), (90, 40), (8, 200)])]  # fmt: skip
    outputs = [
        {"name": "valid", "data_type": "TYPE_INT32", "dims": [20]},
        {"name": "where", "data_type": "TYPE_INT32", "dims": [20, 2]},
        {"name": "cut", "data_type": "TYPE_FP32", "dims": [20, 192]},
    ]
    config = {"input": [{"name": "image"}], "output": outputs}
    config |= {"parameters": {"patches": {"string_value": "20"}, "patch_size": {"string_value": "8"}}}
    model = Preprocessing()
    model.initialize({"model_config": json.dumps(config)})
    files = np.array([[encoded(image, "PNG")] for image in images], object)
    whole, half = model.execute([request(image=files), request(image=np.array([[files[0, 0][:30]]], object))])
    for i, image in enumerate(images):
        for name, value in zip(("cut", "where", "valid"), image_patches(image, 8, 20)):
            assert whole[name].dtype == value.dtype
            np.testing.assert_array_equal(whole[name][i], value)
    assert "image[0] of 1: cannot be decoded" in half.problem.message()


@pytest.mark.parametrize("shape", [(1, 0, 5, 3), (1, 5, 5, 4)])
def test_pixels_that_are_no_images(shape):
    record = json.dumps(preprocess_for("vit_jax", (32, 32)).to_dict())
    fit = Fit({"preprocess": record, "height": "32", "width": "32", "dtype": "float32", "layout": "NHWC"})
    with pytest.raises(BenchmarkError, match=r"pixels \[1, .*\]: expected \[batch, height, width, 3\]"):
        fit.pixels(np.zeros(shape, np.uint8))


def test_the_best_classes(utils, tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "labels.txt").write_text("cat\ndog\nkühe\n", encoding="utf-8")
    model = top.TritonPythonModel()
    model.initialize(arguments(tmp_path, ["logits"], [], top_k=2))
    scores = np.array([[1.0, 3.0, 2.0], [5.0, 5.0, -1.0]], np.float32)
    answers = model.execute([request(logits=scores), request(logits=np.full((1, 3), np.nan, np.float32))])
    assert answers[0]["class_ids"].tolist() == [[1, 2], [0, 1]]
    assert answers[0]["class_names"].tolist() == [[b"dog", "kühe".encode()], [b"cat", b"dog"]]
    assert answers[0]["scores"].tolist() == [[3.0, 2.0], [5.0, 5.0]]
    assert "logits: NaN" in answers[1].problem.message()


@pytest.fixture
def served(converted, tmp_path):
    """A repository of both kinds; returns it, the reference's images and JAX's logits."""
    offered = read_offered(converted)
    for runtime in ("python", "onnxruntime"):
        write_models(tmp_path / "models", models_of(offered, Asked(runtime, runtime=runtime))[:1])
    return tmp_path / "models", offered.samples["images"], offered.expected["logits"]


def test_both_networks_give_what_jax_gave(utils, served):
    models, images, logits = served
    for kind, name in ((classifier.TritonPythonModel, "python"), (OnnxStandin, "onnxruntime")):
        model = kind()
        model.initialize(arguments(models / name, ["images"], ["logits"]))
        (answer,) = model.execute([request(images=images)])
        np.testing.assert_allclose(answer["logits"], logits, atol=1e-5)  # float32 logits of order 1
        model.finalize()


def test_a_graph_without_the_outputs_of_the_config(utils, served):
    with pytest.raises(
        utils.TritonModelException, match=r"config.pbtxt names \['scores'\]; model.onnx has \['images', 'logits'\]"
    ):
        OnnxStandin().initialize(arguments(served[0] / "onnxruntime", ["images"], ["scores"]))


class Session:
    """A session whose engine fails at the run that is told, and comes back in the next session."""

    fails_at, made = 2, 0

    def __init__(self, bundle):
        Session.made += 1
        self.runs_on, self._runs = "tensorrt", 0
        assert read_json(f"{bundle}/manifest.json")

    def run(self, inputs):
        self._runs += 1
        if self._runs == self.fails_at:
            self.runs_on = "onnxruntime"
        return {"logits": inputs["images"].sum((1, 2))}

    def close(self):
        self.runs_on = "closed"


def test_an_engine_that_fails_is_told_and_comes_back(utils, served, monkeypatch):
    monkeypatch.setattr(classifier, "FallbackSession", Session)
    model = classifier.TritonPythonModel()
    model.initialize(arguments(served[0] / "python", ["images"], ["logits"], retry_seconds=0.001))

    def metric(name, **labels):
        return MetricFamily.values[(name, *sorted({"model": "python", "version": "1", **labels}.items()))]

    assert metric("vit_convert_runs_on", runs_on="tensorrt") == 1
    for failures in (0, 1):
        (answer,) = model.execute([request(images=served[1][:3])])
        assert answer["logits"].shape == (3, 3) and metric("vit_convert_engine_failures_total") == failures
    assert (
        metric("vit_convert_runs_on", runs_on="tensorrt"),
        metric("vit_convert_runs_on", runs_on="onnxruntime"),
    ) == (0, 1)
    model._waiting.join(10)  # a fresh session waits to be taken
    model.execute([request(images=served[1][:3])])
    assert (
        metric("vit_convert_runs_on", runs_on="tensorrt"),
        metric("vit_convert_runs_on", runs_on="onnxruntime"),
    ) == (1, 0)
    assert metric("vit_convert_images_total") == 9 and Session.made == 2
    model.finalize()


def test_what_stood_in_for_an_engine_is_given_back(utils, served, monkeypatch):
    """Else every failure leaves what its graph took, in the arena of the thread that answered it."""
    given = []
    monkeypatch.setattr(classifier, "FallbackSession", Session)
    monkeypatch.setattr(classifier, "give_memory_back", lambda **_: given.append(Session.made))
    model = classifier.TritonPythonModel()
    model.initialize(arguments(served[0] / "python", ["images"], ["logits"], retry_seconds=0.001))
    for _ in range(2):
        model.execute([request(images=served[1][:1])])
    model._waiting.join(10)
    assert given == []  # the stand-in is still at work
    made = Session.made
    model.execute([request(images=served[1][:1])])
    assert given == [made]
    model.finalize()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BenchmarkError("too large", fix="Send less."), "too large. Send less."),
        (BenchmarkError("too large"), "too large"),
        (ValueError("no number"), "no number"),
    ],
)
def test_what_a_client_is_told(utils, error, said):
    assert refusal(error).problem.message() == said
