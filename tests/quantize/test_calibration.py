"""What a calibration says of its thresholds, what it depends on, and how tensors are split into passes: by hand,
without a model."""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np
import pytest

from vit_convert.core.errors import CalibrationError
from vit_convert.quantize import activations
from vit_convert.quantize.calibrate import METHODS, Calibration, calibration_keys
from vit_convert.quantize.guard import Cost

COSTS = {
    "kept": Cost([1.0, 2.0], [0.1, 0.2]),  # entropy's own threshold is the best
    "a_little": Cost([1.0, 2.0, 4.0], [0.30, 0.25, 0.28]),
    "much": Cost([1.0, 2.0, 4.0], [0.90, 0.50, 0.01]),
}
FOUND = Calibration(
    {"kept": 1.0, "a_little": 2.0, "much": 4.0}, dict.fromkeys(COSTS, 4.0), "entropy", 8, {"graph": "g"}, COSTS
)


def test_widened_are_those_above_entropys_threshold_and_what_gained_most_comes_first():
    assert list(FOUND.widened()) == ["much", "a_little"] and FOUND.widened()["much"] == COSTS["much"]
    assert dataclasses.replace(FOUND, costs={}).widened() == {}


@pytest.mark.parametrize(
    ("tensors", "most", "left"),
    [
        (["kept", "a_little", "much"], 0.05, {"kept": 0.1, "a_little": 0.25}),  # by the best threshold of each
        (["kept", "a_little", "much"], 0.1, {"a_little": 0.25}),  # as much as is allowed is allowed
        (["much", "a_little"], 0.0, {"much": 0.01, "a_little": 0.25}),
        (["kept"], 0.05, {"kept": 0.1}),
        (["unmeasured", "kept"], 0.05, {"kept": 0.1}),
        ([], 0.0, {}),
    ],
)
def test_what_loses_too_much_at_every_threshold_is_left_out(tensors, most, left):
    found = FOUND.leave_out(tensors, most)
    assert found.left_out == left and dataclasses.replace(found, left_out={}) == FOUND


def test_a_file_and_what_is_none(tmp_path):
    path = tmp_path / "calibration.json"
    whole = FOUND.leave_out(["kept"], 0.05)
    whole.save(path)
    assert Calibration.load(path) == whole and isinstance(Calibration.load(str(path)).costs["much"], Cost)
    record = json.loads(path.read_text())
    assert record["thresholds"] == FOUND.thresholds and record["costs"]["much"] == {
        "candidates": [1.0, 2.0, 4.0],
        "errors": [0.9, 0.5, 0.01],
        **{"middles": [], "halves": [], "shifted": []},
    }
    for key in ("costs", "left_out"):  # an earlier version's
        path.write_text(json.dumps({name: value for name, value in record.items() if name != key}))
        assert getattr(Calibration.load(path), key) == {}
    costs = [{"a": {"errors": []}}, {"a": 3}, []]
    damaged = [{}, {**record, "more": 1}, *({**record, "costs": value} for value in costs)]
    for value in damaged:
        path.write_text(json.dumps(value))
        with pytest.raises(CalibrationError, match=r"calibration\.json: not a calibration") as caught:
            Calibration.load(path)
        assert "Remove it" in caught.value.fix
    with pytest.raises(CalibrationError):
        Calibration.load(tmp_path / "none.json")


def test_what_a_calibration_depends_on(monkeypatch):
    """The pixels in their order and shape, the normalization by the first image, the graph, the method."""
    monkeypatch.setattr("vit_convert.quantize.graph.hash_model", lambda path: f"hash of {path}")
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 4, 3), np.uint8)

    def half(batch):
        return batch.astype(np.float32) / 2

    expected = hashlib.sha256(b"(3, 2, 4, 3)" + images.tobytes() + half(images[:1]).tobytes()).hexdigest()
    found = calibration_keys("m.onnx", images, half, "mse")
    assert found == {"graph": "hash of m.onnx", "data": expected, "method": "mse"}
    for other in (images[::-1], images.reshape(3, 4, 2, 3), images[:2]):
        assert calibration_keys("m.onnx", other, half, "mse")["data"] != expected
    assert calibration_keys("m.onnx", images, lambda batch: half(batch) + 1, "mse")["data"] != expected


@pytest.mark.parametrize(
    ("elements", "parts"),
    [
        ({"a": 2, "b": 3, "c": 1}, [["a", "b"], ["c"]]),  # 5 values of 4 bytes fill 20
        ({"a": 2, "b": 4}, [["a"], ["b"]]),
        ({"a": 9, "b": 1, "c": 4}, [["a"], ["b", "c"]]),  # one that is too large by itself has a pass of its own
        ({"a": 1, "b": 9, "c": 1}, [["a"], ["b"], ["c"]]),
        ({"a": 5}, [["a"]]),
    ],
)
def test_tensors_are_split_in_order_so_that_one_images_values_fit(elements, parts):
    assert activations._chunks(elements, 20) == parts


@pytest.mark.parametrize(
    ("limit_values", "passes"),
    [
        (100, [("Histograms", ["a", "b"], 8)]),  # 8 images of 5 values, and no more than asked for
        (20, [("Histograms", ["a", "b"], 4)]),
        (10, [("Histograms", ["a", "b"], 2)]),
        (4, [("Histograms 1/2", ["a"], 1), ("Histograms 2/2", ["b"], 2)]),
        (1, [("Histograms 1/2", ["a"], 1), ("Histograms 2/2", ["b"], 1)]),  # one image at the least
    ],
)
def test_fewer_images_a_call_and_then_fewer_tensors(monkeypatch, limit_values, passes):
    opened, ran = [], []
    monkeypatch.setattr(activations, "OUTPUT_BYTES", 4 * limit_values)
    images = np.zeros((30, 2, 2, 3), np.uint8)
    run = activations.ActivationRun(pathlib.Path("m.onnx"), images, None, 8, "cpu", None)
    monkeypatch.setattr(run, "scan", lambda names, label, num_images: activations.Scan({}, {"a": 3, "b": 2}))
    monkeypatch.setattr(run, "_session", lambda names, *, reduce: opened.append((names, reduce)))
    monkeypatch.setattr(run, "_stream", lambda session, images, size, label: ran.append((size, label)) or iter(()))
    assert not [*run.activations(["a", "b"], "Histograms")]
    assert [(label, names, size) for (names, _), (size, label) in zip(opened, ran)] == passes
    assert all(not reduce for _, reduce in opened)


def test_methods_are_those_of_the_config():
    from vit_convert.core.config import METHODS as OFFERED

    assert {*METHODS} == {*OFFERED} and METHODS["entropy"] is METHODS["entropy_plain"]
