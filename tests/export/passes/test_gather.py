"""Chains that move whole tokens become one Gather each; what does more than that stays."""

import numpy as np
import pytest
from export_graphs import graph, ops, random_feeds, run
from family_models import model, reference

from vit_convert.core.errors import ExportError
from vit_convert.core.onnx_file import open_session, run_session
from vit_convert.export.exporter import export_model
from vit_convert.export.passes.moves_as_gather import moves_to_gather
from vit_convert.export.targets import lowering_named

# Four by four tokens of two channels: rolled by one down and across, and taken apart into windows of two.
ROLLED = """
    grid = Reshape (x, to_grid)
    a = Slice (grid, one, far, rows) b = Slice (grid, zero, one, rows) down = Concat <axis = 1> (a, b)
    c = Slice (down, one, far, columns) d = Slice (down, zero, one, columns) rolled = Concat <axis = 2> (c, d)
    split = Reshape (rolled, to_split) turned = Transpose <perm = [0, 1, 3, 2, 4, 5]> (split) y = Reshape (turned,
    to_tokens)"""
CONSTANTS = """int64[4] to_grid = {-1, 4, 4, 2}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] far = {9},
    int64[1] rows = {1},
    int64[1] columns = {2}, int64[6] to_split = {-1, 2, 2, 2, 2, 2}, int64[3] to_tokens = {-1, 16, 2}"""


def moved(body, output="n, 16, 2", constants=CONSTANTS):
    """The operators behind the pass, whose results are those before it."""
    text = f"g (float[n, 16, 2] x) => (float[{output}] y) <{constants}> {{ {body} }}"
    given = graph(text)
    feeds = random_feeds(given)
    before = run(given, feeds)
    count = moves_to_gather(given)
    np.testing.assert_array_equal(run(given, feeds)[0], before[0])
    from vit_convert.export.passes.cleanup import clean

    clean(given)
    np.testing.assert_array_equal(run(given, feeds)[0], before[0])
    return count, ops(given)


def test_a_roll_into_windows():
    assert moved(ROLLED) == (1, ["Gather"])


def test_neighbours_side_by_side():
    """As a Swin's merging: out of windows, then four tokens of a square beside one another."""
    body = """windows = Reshape (x, to_split) back = Transpose <perm = [0, 1, 3, 2, 4, 5]> (windows)
    grid = Reshape (back, to_grid)
        pairs = Reshape (grid, to_pairs) turned = Transpose <perm = [0, 1, 3, 4, 2, 5]> (pairs) y = Reshape (turned,
        to_merged)"""
    constants = f"{CONSTANTS}, int64[6] to_pairs = {{-1, 2, 2, 2, 2, 2}}, int64[4] to_merged = {{-1, 2, 2, 8}}"
    assert moved(body, "n, 2, 2, 8", constants) == (1, ["Gather", "Reshape"])


def test_slices_with_steps_and_without_axes():
    """Even rows, then odd ones; and rows cut from the first axes on, as a Slice without axes does."""
    constants = f"{CONSTANTS}, int64[1] two = {{2}}, int64[2] low = {{0, 1}}, int64[2] high = {{1000, 9}}"
    body = """g = Reshape (x, to_grid) a = Slice (g, zero, far, rows, two) b = Slice (g, one, far, rows, two)
        c = Concat <axis = 1> (a, b) first = Slice (c, zero, one, rows) rest = Slice (c, low, high)
        d = Concat <axis = 1> (rest, first) y = Reshape (d, to_tokens)"""
    assert moved(body, constants=constants) == (1, ["Gather"])


def test_each_stop_has_its_own():
    """A value in between that something else reads is computed, and the next chain begins there."""
    body = f"""{ROLLED.replace("y = Reshape", "z = Reshape")} w = Relu (z)
        grid2 = Reshape (z, to_grid) a2 = Slice (grid2, one, far, rows)
        b2 = Slice (grid2, zero, one, rows) down2 = Concat <axis = 1> (a2, b2)
        turned2 = Transpose <perm = [0, 2, 1, 3]> (down2) back = Reshape (turned2, to_tokens) y = Add (back, w)"""
    count, found = moved(body)
    assert (count, found) == (2, ["Gather", "Relu", "Gather", "Add"])


@pytest.mark.parametrize(
    "body",
    [
        # One copy is no more than a Gather is.
        "s = Reshape (x, to_split) t = Transpose <perm = [0, 1, 3, 2, 4, 5]> (s) y = Reshape (t, to_tokens)",
        # Channels are moved too.
        """g = Reshape (x, to_grid) t = Transpose <perm = [0, 3, 1, 2]> (g) u = Transpose <perm = [0, 2, 1, 3]> (t)
           y = Reshape (u, to_tokens)""",
        # Images are mixed: of one image the order would look right.
        """t = Transpose <perm = [1, 0, 2]> (x) u = Concat <axis = 1> (t) y = Reshape (u, to_tokens)""",
        # Tokens are lost, and others are there twice.
        """g = Reshape (x, to_grid) a = Slice (g, one, far, rows) b = Slice (g, zero, one, rows)
        c = Concat <axis = 1> (a, b)
           d = Concat <axis = 1> (c, c) e = Slice (d, zero, four, rows) h = Concat <axis = 1> (e, d) y = Reshape (h,
           to_more)""",
    ],
)
def test_what_stays(body):
    constants = f"{CONSTANTS}, int64[1] four = {{4}}, int64[3] to_more = {{-1, 48, 2}}"
    text = f"g (float[n, 16, 2] x) => (float[n, {48 if 'to_more' in body else 16}, 2] y) <{constants}> {{ {body} }}"
    given = graph(text)
    before = ops(given)
    with pytest.raises(ExportError, match="moves no tokens"):
        moves_to_gather(given)
    assert ops(given) == before


def test_a_swin(tmp_path):
    """There and back in every shifted block, and the merging: 2 x (3 + 1) + 1, no Slice and no Concat left, every tap
    in its place."""
    report = export_model(model("swin"), tmp_path / "model.onnx", target=lowering_named("trt8", "gather"))
    assert list(report.taps) == list(model("swin").taps)
    assert {rule.rule: rule.applied for rule in report.rules}["moves_to_gather"] == 9
    from family_models import images

    got = run_session(open_session(tmp_path / "model.onnx", report.taps), images("swin"), ["logits", *report.taps])
    for name, values in got.items():
        expected = reference("swin")[name]
        assert np.abs(values.reshape(expected.shape) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_model_that_moves_none(tmp_path):
    with pytest.raises(ExportError, match="lowering gather: the model moves no tokens") as error:
        export_model(model("mixer"), tmp_path / "model.onnx", target=lowering_named("trt8", "gather"))
    assert error.value.fix == "Leave it out of `lowerings`."
