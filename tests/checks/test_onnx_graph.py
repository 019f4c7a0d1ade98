"""A graph against its reference: every tensor, every batch size, the worst of them; on a graph of three nodes."""

import contextlib

import numpy as np
import onnx
import pytest

from vit_convert.checks.onnx_graph import batch_sizes, check_graph, graph_scores
from vit_convert.core.compare import Tolerance

TOLERANCE = Tolerance(atol=1e-5, rtol=1e-5, cosine=0.99999)
TOKENS = """g (float[n, 3, 4] images) => (float[n, 3, 4] y) <float two = {2}, int64[4] flat = {-1, 4, 1, 1},
    int64[1] zero = {0}> {
    tap = Mul (images, two) y = Neg (tap) beside = Reshape (tap, flat) first = Gather <axis = 1> (tap, zero) }"""


@pytest.fixture
def path(tmp_path):
    onnx.save(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 20]> {TOKENS}'), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def reference(count: int = 4) -> dict[str, np.ndarray]:
    """What NumPy makes of the images."""
    images = np.random.default_rng(0).standard_normal((count, 3, 4)).astype(np.float32)
    return {"images": images, "tap": 2 * images, "y": -2 * images}


def test_every_tensor_is_compared(path):
    rows = check_graph(path, reference(), [1, 3, 4], TOLERANCE, judged=["y"])
    exact = pytest.approx(1, abs=1e-12)
    assert [(row.tensor, row.max_abs, row.cosine, row.passed) for row in rows] == [
        ("tap", 0, exact, None),
        ("y", 0, exact, True),
    ]


@pytest.mark.parametrize("judged", [["y"], ["tap", "y"], []])
@pytest.mark.parametrize("wrong", [0, 2, 3])
def test_the_worst_batch_is_told(path, judged, wrong):
    """An error in one image shows from the batch on that holds it; it is that image's, not the mean's."""
    known = reference()
    known["tap"] = known["tap"].copy()
    known["tap"][wrong, 1, 2] += 0.5
    rows = {row.tensor: row for row in check_graph(path, known, [1, 3, 4], TOLERANCE, judged=judged)}
    assert list(rows) == ["tap", "y"]
    assert rows["tap"].passed is (False if "tap" in judged else None) and rows["y"].passed is (
        True if "y" in judged else None
    )
    assert rows["tap"].max_abs == pytest.approx(0.5, abs=1e-6)
    # relative to the largest value of the batch: where that is smallest the error is worst
    scales = {batch: np.abs(known["tap"][:batch]).max() for batch in (1, 3, 4) if batch > wrong}
    assert rows["tap"].batch == min(scales, key=scales.get)
    assert rows["tap"].max_rel == pytest.approx(0.5 / min(scales.values()), rel=1e-5)
    a, b = known["tap"][wrong].ravel().astype(np.float64), 2.0 * known["images"][wrong].ravel().astype(np.float64)
    assert rows["tap"].cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-7)


def test_a_batch_that_passes_does_not_make_up_for_one_that_fails(path):
    known = reference()
    known["y"] = known["y"].copy()
    known["y"][0] += 1
    for batches in ([1, 4], [4, 1]):
        (row,) = [row for row in check_graph(path, known, batches, TOLERANCE, judged=["y"]) if row.tensor == "y"]
        assert row.passed is False
    known["y"] = -2 * known["images"]
    known["y"][3] += 1
    (row,) = [row for row in check_graph(path, known, [4, 1], TOLERANCE, judged=["y"]) if row.tensor == "y"]
    assert row.passed is False and row.batch == 4


def test_tokens_beside_the_batch_and_the_pooled_token_alone(path):
    """Both are forms in which a graph may hold a tap: the same numbers, in order."""
    known = reference()
    known["beside"], known["first"] = known["tap"], known["tap"]
    rows = check_graph(path, known, [1, 4], TOLERANCE, judged=["beside", "first"])
    assert {row.tensor: row.passed for row in rows if row.passed is not None} == {"beside": True, "first": True}
    known["beside"] = np.roll(known["tap"], 1, axis=1)
    known["first"] = np.roll(known["tap"], 1, axis=1)
    rows = check_graph(path, known, [1, 4], TOLERANCE, judged=["beside", "first"])
    assert {row.tensor: row.passed for row in rows if row.passed is not None} == {"beside": False, "first": False}


def test_a_pooled_token_that_is_not_the_first(path):
    known = reference()
    for token in (1, known["tap"].shape[1] - 1):
        known["first"] = np.roll(known["tap"], token, axis=1)  # the graph's is now at that place
        for asked, passed in ((token, True), (0, False)):
            rows = check_graph(path, known, [1, 4], TOLERANCE, judged=["first"], pooled_token=asked)
            assert {row.tensor: row.passed for row in rows if row.passed is not None} == {"first": passed}


def test_each_row_may_have_a_pooled_token_of_its_own(path):
    known, places = reference(), np.array([2, 0, 1, 2])
    known["first"] = np.stack([np.roll(row, place, axis=0) for row, place in zip(known["tap"], places)])
    for asked, passed in ((places, True), (places[::-1], False), (2, False)):
        rows = check_graph(path, known, [1, 4], TOLERANCE, judged=["first"], pooled_token=asked)
        assert {row.tensor: row.passed for row in rows if row.passed is not None} == {"first": passed}


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 50)])
def test_a_tensor_of_another_size_is_compared_with_nothing(path, shape):
    known = reference() | {"tap": np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=r"reference has shape \(1, 1, .*candidate \(1, 3, 4\)"):
        check_graph(path, known, [1], TOLERANCE, judged=["y"])


@pytest.mark.parametrize(("images", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 3]), (4, [1, 3, 4]), (32, [1, 3, 32])])
def test_batch_sizes(images, expected):
    assert batch_sizes(images) == expected


class Bar:
    """A progress that notes what it is told."""

    def __init__(self):
        self.told = []

    @contextlib.contextmanager
    def bar(self, label, total):
        self.told.append((label, total))
        yield self.told.append


@pytest.mark.parametrize(("size", "batches"), [(2, [2, 2, 1]), (5, [5]), (8, [5]), (1, [1] * 5)])
def test_logits_of_all_images_in_order(path, size, batches):
    pixels = np.random.default_rng(1).integers(0, 256, (5, 3, 4), np.uint8)
    progress, seen = Bar(), []

    def prepare(batch):
        seen.append(len(batch))
        return batch.astype(np.float32) / 255

    got = graph_scores(path, pixels, prepare, "y", batch_size=size, label="scoring", progress=progress)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, -2 * (pixels / 255), rtol=1e-6)
    assert seen == batches and progress.told == [("scoring", 5), *batches]
