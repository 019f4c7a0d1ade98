"""What the page's figures show, by axes that remember what is drawn on them."""

import pytest
from recorded_axes import Axes, Line

from vit_convert.report import figures as module
from vit_convert.report.figures import MOST_DRAWN, figures

RESIDENT, COPIED = "none: images and results stay in GPU memory", "images in and results out, page-locked host memory"


@pytest.fixture
def painted(monkeypatch):
    """Paints the figures of reports: {title: what was called}."""
    monkeypatch.setattr(Line, "tips", [])

    def painted(*reports):
        found = {}

        def draw(paint, title, x, y, rows=0):
            found[title] = Axes()
            paint(found[title])
            return f"<svg>{title}</svg>"

        monkeypatch.setattr(module, "draw", draw)
        monkeypatch.setattr(module, "roofline_figure", lambda report, title: "")
        assert len(figures(list(reports))) == len(found)
        return found

    return painted


def row(batch, rate, p99, precision="fp16", streams=1, transfers=RESIDENT):
    return {"precision": precision, "batch": batch, "streams": streams, "transfers": transfers,
            "images_per_second": rate, "p99_ms": p99}  # fmt: skip


def test_latency_against_throughput(painted):
    rows = [row(8, 300.0, 4.0), row(1, 100.0, 2.0), row(1, 150.0, 3.0, streams=2), row(1, 90.0, 2.5, transfers=COPIED)]
    (axes,) = painted({"name": "a", "benchmark": rows}).values()
    lines = {options["label"]: (*arguments, options["linestyle"]) for arguments, options in axes.of("plot")
             if "label" in options}  # fmt: skip
    assert lines == {
        "fp16, 1 stream": ([100.0, 300.0], [2.0, 4.0], "-"),  # by batch
        "fp16, 2 streams": ([150.0], [3.0], "--"),
        "fp16, with transfers": ([90.0], [2.5], ":"),
    }
    numbers = {arguments[1]: arguments[0] for arguments, _ in axes.of("annotate")}
    assert numbers == {(100.0, 2.0): "1", (300.0, 4.0): "8", (150.0, 3.0): "1", (90.0, 2.5): "1"}
    assert "tip:fp16, 1 stream, batch 8: 300 images/s, P99 4.00 ms" in Line.tips
    assert axes.of("set_yscale") == [(("log",), {})]


def test_several_models_are_told_apart(painted):
    first, second = ({"name": name, "benchmark": [row(1, 100.0, 2.0)], "accuracy": {"jax": 80.0}} for name in "ab")
    found = painted(first, second)
    options = [options for _, options in found["Latency against throughput, by batch"].of("plot") if "label" in options]
    assert [(each["label"], each["marker"]) for each in options] == [
        ("a, fp16, 1 stream", "o"),
        ("b, fp16, 1 stream", "s"),
    ]
    places = [arguments[1] for arguments, _ in found["Top-1 on the labelled images"].of("plot")]
    assert places == [["a, jax"], ["b, jax"]]


def test_accuracy(painted):
    (axes,) = painted({"name": "a", "accuracy": {"jax": 84.5, "fp16": 84.25, "int8": None}}).values()
    assert [arguments[:2] for arguments, _ in axes.of("plot")] == [([84.5], ["jax"]), ([84.25], ["fp16"])]
    assert [arguments[:2] for arguments, _ in axes.of("annotate")] == [
        ("84.50", (84.5, "jax")),
        ("84.25", (84.25, "fp16")),
    ]
    assert Line.tips == ["tip:jax: 84.50 %", "tip:fp16: 84.25 %"] and axes.of("invert_yaxis")


def block(tensor, error):
    return {"tensor": tensor, "max_rel": error, "cosine": 0.5}


def test_blocks_stand_where_their_names_do(painted):
    fp16 = [block(f"block_{i:02d}", 0.001 * (i + 1)) for i in range(30)]
    int8 = [block("block_02", 0.5), block("block_00", 0.0)]
    (axes,) = painted({"checks": {"fp16": {"blocks": fp16}, "int8": {"blocks": int8}, "bf16": {}}}).values()
    lines = {options["label"]: arguments[:2] for arguments, options in axes.of("semilogy")}
    assert lines["fp16"] == (list(range(30)), pytest.approx([0.001 * (i + 1) for i in range(30)]))
    assert lines["int8"] == ([2, 0], [0.5, 1e-9])  # a logarithm has no place for 0
    (((places, names), _),) = axes.of("set_xticks")
    assert places == list(range(0, 30, 2)) and names == [f"{i:02d}" for i in range(0, 30, 2)]
    assert "tip:int8, block_00: 0 of scale, cosine 0.500000" in Line.tips


def widened(tensor, before, after):
    return {"tensor": tensor, "entropy": 3.125, "threshold": 5.75, "error_entropy": before, "error": after}


def test_thresholds_the_costliest_first(painted):
    rows = [widened("a/b", 0.01, 0.001), widened("block_00/mlp/fc1/Gelu", 0.25, 0.002)]
    (axes,) = painted({"calibration": {"widened": rows}}).values()
    (((places, names), _),) = axes.of("set_yticks")
    assert list(places) == [0, 1] and names == ["mlp/fc1/Gelu", "a/b"]  # the last parts of a long name
    spots = [(*arguments[:2], options.get("label")) for arguments, options in axes.of("plot") if "label" in options]
    assert spots == [(0.25, 0, "entropy's"), (0.002, 0, "as taken"), (0.01, 1, ""), (0.001, 1, "")]
    assert axes.of("invert_yaxis") and axes.of("set_xscale") == [(("log",), {})]  # the first at the top
    assert Line.tips[0] == "tip:block_00/mlp/fc1/Gelu: entropy's threshold 3.12 loses 25.00%"
    assert Line.tips[1] == "tip:block_00/mlp/fc1/Gelu: threshold 5.75 loses 0.20%"


def test_only_the_costliest_thresholds_have_room(painted):
    rows = [widened(f"t{i}", 0.001 * (i + 1), 0.0005) for i in range(20)]
    (axes,) = painted({"name": "a", "calibration": {"widened": rows}}).values()
    (((_, names), _),) = axes.of("set_yticks")
    assert names == [f"t{i}" for i in range(19, 3, -1)]  # sixteen of twenty


def test_a_title_names_the_model_where_there_are_several(painted):
    one = {"stages": [{"name": "export", "status": "done", "seconds": 2.5, "peak_rss_mib": 1.0}]}
    assert [*painted({"name": "a", **one})] == ["Stages, with peak memory"]
    assert [*painted({"name": "a", **one}, {"name": "b", **one})] == [
        f"Stages, with peak memory: {name}" for name in "ab"
    ]


@pytest.mark.parametrize(
    ("name", "shown"), [("a", "a"), ("a/b/c", "a/b/c"), ("a/b/c/d", "b/c/d"), ("x/a/b/c/d", "b/c/d")]
)
def test_names_are_cut_from_the_left(name, shown):
    assert module._short(name) == shown


def test_stages_that_took_time(painted):
    rows = [{"name": name, "status": "done", "seconds": seconds, "peak_rss_mib": 1536.0}
            for name, seconds in (("export", 2.5), ("check", 0.0), ("build", 75.0))]  # fmt: skip
    (axes,) = painted({"stages": rows}).values()
    assert [arguments for arguments, _ in axes.of("barh")] == [(["export"], [2.5]), (["build"], [75.0])]
    assert [arguments for arguments, _ in axes.of("text")] == [
        (2.5, "export", " 1,536 MiB"),
        (75.0, "build", " 1,536 MiB"),
    ]
    assert axes.of("invert_yaxis")  # the first stage at the top
    assert Line.tips[1] == "tip:build: 75.0 s, done, peak memory 1,536 MiB"


def test_nothing_to_draw_and_too_much(painted):
    assert painted({}) == painted({"name": "a", "stages": [], "accuracy": {}, "benchmark": []}) == {}
    one = {"name": "a", "accuracy": {"jax": 1.0}}
    assert painted(*[one] * MOST_DRAWN) and painted(*[one] * (MOST_DRAWN + 1)) == {}
