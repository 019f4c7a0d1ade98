"""The table that ends a conversion: every number of the report stands in it, in words that people read."""

import copy

import pytest

from vit_convert.report.record import Report
from vit_convert.report.summary import print_summary

REPORT = {
    "name": "b16",
    "checkpoint": {"family": "vit", "variant": "B/16", "num_params": 86_567_656},
    "stages": [
        {"name": "export", "status": "done", "seconds": 12.34, "peak_rss_mib": 2048.0},
        {"name": "check", "status": "fresh", "seconds": 75.0, "peak_rss_mib": 512.0},
    ],
    "checks": {
        "fp32": {"passed": True, "max_abs": 1.26e-5, "max_rel": 3.21e-6, "cosine": 0.99999994, "top1": 81.25},
        "int8": {"passed": False, "max_abs": 0.456, "max_rel": 0.0789, "cosine": 0.98765432, "top1": 79.0},
    },
    "accuracy": {"jax": 81.5},
    "verdicts": {
        "fp16": {"text": "fp16 loses nothing", "accurate": True},
        "bf16": {"text": "bf16 was not judged", "accurate": None},
        "int8": {"text": "int8 loses 2.50 points", "accurate": False},
    },
    "calibration": {},
    "engine": {"path": "engines/rtx/fp16.plan"},
    "engines": [
        {"path": "engines/rtx/fp32.plan", "bytes": 400 << 20, "build_seconds": 2.0},
        {"path": "engines/rtx/fp16.plan", "bytes": 200 << 20, "build_seconds": 200.0},
    ],
}


@pytest.fixture
def show(tmp_path, capsys, monkeypatch):
    """What is printed of a report, as lines without the blanks between columns."""
    monkeypatch.setenv("COLUMNS", "220")
    root = tmp_path / "b16"

    def show(whole=True, files=("model.onnx", "model.onnx.data", "model.fp16.onnx"), **changes):
        for name in (
            "model.onnx",
            "model.onnx.data",
            "model.fp16.onnx",
            "model.fp16.onnx.data",
            "lowerings/a.onnx",
            "report.json",
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"x" * {"model.onnx": 1000, "model.onnx.data": 3 << 20}.get(name, 2048))
        report = {**copy.deepcopy(REPORT), **changes}
        print_summary(Report.from_dict(report), root, files=[root / name for name in files], whole=whole)
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return show


def test_the_whole_of_it(show, tmp_path):
    lines = show()
    assert lines[:2] == ["", "b16: vit B/16, 86,567,656 parameters"]
    assert lines[2:5] == ["stage status time peak memory", "export done 12 s 2.00 GiB", "check fresh 75 s 512.0 MiB"]
    assert lines[5:9] == [
        "graph checked against JAX max abs of scale cosine top-1",
        "JAX 81.50 %",
        "ONNX fp32 passed 1.3e-05 3.2e-06 0.9999999 81.25 %",
        "ONNX int8 FAILED 0.46 0.079 0.9876543 79.00 %",
    ]
    assert lines[9:12] == ["fp16 loses nothing", "bf16 was not judged", "int8 loses 2.50 points: not accurate enough"]
    assert lines[12] == f"file in {tmp_path / 'b16'} size"
    assert lines[13:15] == [
        "engines/rtx/fp32.plan 400.0 MiB built in 2.0 s",
        "engines/rtx/fp16.plan 200.0 MiB built in 3 min 20 s, recommended",
    ]
    assert lines[15:] == ["model.fp16.onnx 2.0 KiB", "model.onnx 3.0 MiB with its weights", "report.json 2.0 KiB"]


def test_graphs_of_the_bundle_go_before_its_lowerings_and_what_is_not_the_conversions_is_not_shown(show):
    lines = show(files=("lowerings/a.onnx", "sensitivity.png", "model.onnx", "calibration.json"))
    assert [line.split()[0] for line in lines[15:]] == ["model.onnx", "lowerings/a.onnx", "report.json"]
    assert lines[15] == "model.onnx 1000 B"  # the weights beside it are another conversion's


def test_half_a_conversion(show):
    """No check, no label, no engine."""
    rows = [{"name": "export", "status": "failed", "seconds": 0.5, "peak_rss_mib": 100.0}]
    lines = show(stages=rows, checks={}, accuracy={"jax": None}, engines=[], engine={}, whole=False, files=())
    assert len(lines) == 6 and lines[-1].startswith("report.json")
    assert "JAX" not in " ".join(lines) and "engine" not in " ".join(lines) and "fresh" not in " ".join(lines)


def test_without_labels_no_top1_is_shown(show):
    checks = {"fp32": {key: value for key, value in REPORT["checks"]["fp32"].items() if key != "top1"}}
    lines = show(checks=checks, accuracy={"jax": None}, verdicts={})
    assert lines[6] == "ONNX fp32 passed 1.3e-05 3.2e-06 0.9999999"
    assert show(checks=checks, accuracy={}, verdicts={}) == lines
    assert "JAX 0.00 %" in show(accuracy={"jax": 0.0})


@pytest.mark.parametrize(
    ("whole", "engines", "said"), [(True, [], True), (False, [], False), (True, REPORT["engines"], False)]
)
def test_how_an_engine_is_got_where_none_was_built(show, whole, engines, said):
    line = "No engine was built. On its host, with this folder there: python -m vit_convert.engine b16"
    assert (line in show(whole=whole, engines=engines)) == said


def test_nothing_changed_is_said_only_where_nothing_did(show):
    fresh = [{**row, "status": "fresh"} for row in REPORT["stages"]]
    assert show(stages=fresh)[-1] == "Nothing changed: every stage was fresh."
    assert "Nothing changed" not in show()[-1]


def test_what_int8_leaves_out_is_named_with_its_loss(show):
    left_out = [
        {"sites": ["block_00/fc2", "block_01/fc2"], "error": 0.01234, "max_error": 0.002},
        {"sites": ["neck"], "error": 0.5},
    ]
    line = (
        "not in int8, as it costs the product more than 0.002 at every threshold: block_00/fc2, block_01/fc2 "
        "0.012; neck 0.5"
    )
    assert line in show(calibration={"left_out": left_out})
    assert not any("not in int8" in text for text in show(calibration={"left_out": []}))


def test_what_int8_leaves_out_for_the_output_is_named_with_what_it_gains(show):
    share = {"products": [{"site": "block_11/fc1"}, {"site": "block_02/fc2"}], "cosine_before": 0.92, "cosine": 0.99134}
    line = "not in int8, as it costs the output most for its time: block_11/fc1, block_02/fc2; smallest cosine 0.9200 →"
    assert any(line in text for text in show(calibration={"output_share": share}))
    assert not any("not in int8" in text for text in show(calibration={"output_share": {**share, "products": []}}))
