"""What is said and drawn of each layer's loss, from a record written here by hand."""

import copy
import json

import pytest

from vit_convert.core.errors import UsageError
from vit_convert.core.sensitivity_record import SensitivityRecord
from vit_convert.report import sensitivity
from vit_convert.report.sensitivity import COLUMNS, load_record, plot_ranking, print_ranking


def measured(names, error, max_rel, cosine, agreement, top1):
    return {
        "quantized": names,
        "error": error,
        "max_rel": max_rel,
        "cosine": cosine,
        "agreement": agreement,
        "top1": top1,
    }


UNITS = ["block_00/fc1", "block_00/fc2", "block_01/fc1", "a/b/fc2"]
RECORD = {
    "precision": "int8",
    "rest": "fp16",
    "scan_images": 24,
    "source": "evaluation images",
    "labelled": True,
    "units": {name: {"sites": [name], "num_weights": 1} for name in UNITS},
    # Every column puts the units in an order of its own.
    "measured": [
        measured([], 0.0, 0.0, 1.0, 100.0, 80.0),
        measured(["block_00/fc1"], 0.01, 0.4, 0.97, 97.0, 79.0),
        measured(["block_00/fc2"], 0.02, 0.3, 0.96, 99.0, 78.0),
        measured(["block_01/fc1"], 0.03, 0.2, 0.98, 98.0, 81.0),
        measured(["block_00/fc2", "block_00/fc1"], 0.05, 0.6, 0.95, 96.0, 77.5),
        measured(UNITS, 0.5, 0.9, 0.5, 50.0, 40.0),
    ],
}
ORDER = {
    "error": ["block_01/fc1", "block_00/fc2", "block_00/fc1"],
    "max_rel": ["block_00/fc1", "block_00/fc2", "block_01/fc1"],
    "cosine": ["block_00/fc2", "block_00/fc1", "block_01/fc1"],
    "agreement": ["block_00/fc1", "block_01/fc1", "block_00/fc2"],
    "top1": ["block_00/fc2", "block_00/fc1", "block_01/fc1"],
}


def ranking(record, by="error"):
    found = sensitivity.ranking(SensitivityRecord.from_dict(record), by)
    return {"units": [row.to_dict() for row in found.units], "blocks": [row.to_dict() for row in found.blocks]}


@pytest.mark.parametrize("by", ORDER)
def test_the_most_harmful_first(by):
    found = ranking(RECORD, by)
    assert [row["name"] for row in found["units"]] == ORDER[by]  # a/b/fc2 has not been measured yet
    # The one unit of block_01 is the whole block.
    assert {row["name"] for row in found["blocks"]} == {"block_00", "block_01"} and found["blocks"][0][
        "name"
    ] == "block_00"
    assert set(ORDER) == {*COLUMNS}


def test_rows_hold_what_was_measured_and_the_change_in_points():
    found = ranking(RECORD)
    assert found["units"][1] == {
        **{"name": "block_00/fc2", "error": 0.02, "max_rel": 0.3, "cosine": 0.96, "agreement": 99.0, "top1": 78.0},
        "top1_change": -2.0,
    }
    assert found["blocks"][0]["error"] == 0.05 and found["blocks"][0]["top1_change"] == -2.5


def unlabelled():
    record = {**copy.deepcopy(RECORD), "labelled": False}
    for row in record["measured"]:
        row["top1"] = None
    return record


def test_without_labels_or_the_figure_of_fp32_there_is_no_change():
    assert {row["top1_change"] for row in ranking(unlabelled())["units"]} == {None}
    without = {**RECORD, "measured": RECORD["measured"][1:]}
    assert {row["top1_change"] for row in ranking(without)["units"]} == {None}
    with pytest.raises(UsageError, match="--by=top1: the images had no labels") as caught:
        ranking(unlabelled(), "top1")
    assert "config.evaluation.data" in caught.value.fix


def test_no_such_column():
    with pytest.raises(
        UsageError, match=r"--by=cosinus: not one of error, max_rel, cosine, agreement, top1\. Did you mean cosine"
    ):
        ranking(RECORD, "cosinus")


def shown(record, capsys, monkeypatch, **options):
    monkeypatch.setenv("COLUMNS", "200")
    print_ranking(SensitivityRecord.from_dict(record), **options)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_tables(capsys, monkeypatch):
    lines = shown(RECORD, capsys, monkeypatch)
    assert lines[0] == "One at a time in int8, the rest in fp16; against fp32 on 24 evaluation images"
    assert lines[1] == "unit 1 - cosine worst cosine of scale same class top-1 points"
    assert lines[2:5] == [
        "block_01/fc1 0.03 0.980000 0.2 98.00 % 81.00 % +1.00",
        "block_00/fc2 0.02 0.960000 0.3 99.00 % 78.00 % -2.00",
        "block_00/fc1 0.01 0.970000 0.4 97.00 % 79.00 % -1.00",
    ]
    assert lines[5] == "block 1 - cosine worst cosine of scale same class top-1 points" and lines[6].startswith(
        "block_00 0.05"
    )
    assert shown(RECORD, capsys, monkeypatch, by="max_rel")[2].startswith("block_00/fc1")


def test_tables_without_labels(capsys, monkeypatch):
    lines = shown(unlabelled(), capsys, monkeypatch)
    assert lines[0].endswith("on 24 evaluation images without labels")
    assert lines[2] == "block_01/fc1 0.03 0.980000 0.2 98.00 %"


def test_picture(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    assert plot_ranking(SensitivityRecord.from_dict(RECORD), tmp_path / "layers.png") == ""
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert (
        plot_ranking(SensitivityRecord.from_dict(RECORD), tmp_path / "layers.svg") == ""
        and b"<svg" in (tmp_path / "layers.svg").read_bytes()
    )
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["block_00", "block_01"]
    assert axes.get_yscale() == "log" and axes.get_title() == "One layer at a time in int8, 24 evaluation images"
    found = {
        bars.get_label(): [(bar.get_x() + bar.get_width() / 2, bar.get_width(), bar.get_height()) for bar in bars]
        for bars in axes.containers
    }
    width = 0.8 / 3  # of a block's place, shared by fc1, fc2 and the whole block around its middle
    for kind, middle, heights in (
        ("fc1", -width, (0.01, 0.03)),
        ("fc2", 0, (0.02, 0)),
        ("whole block", width, (0.05, 0.03)),
    ):
        expected = [pytest.approx((place + middle, width, height), abs=1e-9) for place, height in enumerate(heights)]
        assert found[kind] == expected, kind
    colours = {bars.get_label(): bars[0].get_facecolor()[:3] for bars in axes.containers}
    assert colours["whole block"] == (0.75,) * 3 and len({*colours.values()}) == 3
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["fc1", "fc2", "whole block"]
    assert figures[0].get_size_inches().tolist() == [6, 4]  # 0.22 in a bar, and no less than 6
    for figure in figures:
        close(figure)


def test_a_picture_needs_no_display(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    asked = []
    monkeypatch.setattr(matplotlib, "use", asked.append)
    assert plot_ranking(SensitivityRecord.from_dict(RECORD), tmp_path / "x.png") == "" and asked == ["Agg"]


def test_a_picture_of_many_blocks_is_as_wide_as_they_need(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    units = [f"block_{i:02d}/fc1" for i in range(30)]
    rows = [measured([name], 0.1, 0.1, 0.9, 90.0, None) for name in units]
    sizes, close = [], pyplot.close
    monkeypatch.setattr(
        pyplot, "close", lambda figure: (sizes.append(figure.get_size_inches().tolist()), close(figure))
    )
    described = {name: {"sites": [], "num_weights": 1} for name in units}
    record = SensitivityRecord.from_dict({**unlabelled(), "units": described, "measured": rows})
    assert plot_ranking(record, tmp_path / "x.png") == ""
    assert sizes == [[pytest.approx(0.22 * 30 * 2), 4]]


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_a_bundle_without_a_record(tmp_path, text):
    if text is not None:
        (tmp_path / "sensitivity.json").write_text(text)
    with pytest.raises(UsageError, match=r"sensitivity\.json: missing or damaged") as caught:
        load_record(tmp_path)
    assert caught.value.fix == "Convert with --config.sensitivity=True first."


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """The command line on a bundle that holds RECORD."""
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "sensitivity.json").write_text(json.dumps(RECORD))

    def run(*words):
        return sensitivity.main(["sensitivity", *words]), *capsys.readouterr()

    return run


def test_the_command(command, tmp_path):
    code, out, err = command("--by=top1", f"--plot={tmp_path / 'layers.png'}", str(tmp_path))
    assert (code, err) == (0, "") and out.index("block_00/fc2") < out.index("block_00/fc1") < out.index("block_01/fc1")
    assert (tmp_path / "layers.png").exists()
    code, out, err = command(str(tmp_path), "another")
    assert (code, out) == (
        2,
        "",
    ) and err == "error: 2 arguments, expected one: the bundle's folder\n  For example out/vit_b32.\n"
    code, out, err = command(str(tmp_path / "nothing"))
    assert code == 2 and "sensitivity.json: missing or damaged\n  Convert with" in err


def test_the_command_says_why_there_is_no_picture(command, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "plot_ranking", lambda record, path: f"{path} is not drawn")
    code, _, err = command("--plot=x.png", str(tmp_path))
    assert code == 2 and err == "error: --plot=x.png: x.png is not drawn\n  pip install matplotlib\n"
