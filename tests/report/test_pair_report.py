"""The report of a pair, made of its towers' reports and its own stages; and what is printed of it."""

import json

import pytest

from vit_convert.core.bundle import Bundle, write_json
from vit_convert.core.defaults import default_config
from vit_convert.core.manifest import StageRecord
from vit_convert.core.pair_results import PairResult, SimilarityResult
from vit_convert.core.pipeline import Context
from vit_convert.core.progress import Progress
from vit_convert.report.pair import print_pair_summary, write_pair_report
from vit_convert.report.record import PairReport, read

FACTS = {"logit_scale": 9.5, "logit_bias": -10.0, "similarity": "sigmoid", "text": {"length": 16}}


def rows(status="done", names=("pair", "similarity")):
    given = {"status": status, "seconds": 1.0, "peak_rss_mib": 2.0}
    return [StageRecord.from_dict({"name": name, **given}) for name in names]


ROWS = rows()


def check(passed=True, top1=99.5, zero_shot=None):
    return {"precision": "fp16", "image": "fp16", "text": "fp16", "passed": passed, "images": 4, "texts": 3,
            "max_cosine_error": 0.00125, "max_probability_error": 0.25, "top1": top1, "recall": 100.0,
            **({} if zero_shot is None else {"zero_shot": zero_shot})}  # fmt: skip


@pytest.fixture
def context(tmp_path):
    config = default_config()
    config.name = "siglip"
    bundle = Bundle(tmp_path / "siglip")
    bundle.require_writable()
    found = Context(config, bundle, Progress(bundle.events, quiet=True))
    for tower, params in (("image", 90), ("text", 110)):
        checkpoint = {"path": "a.npz", "sha256": "ab", "family": "siglip", "variant": "SigLIP-B/16",
                      "image_size": [224, 224] if tower == "image" else [], "num_params": params}  # fmt: skip
        checks = {"fp16": {"passed": tower == "image", "max_rel": 0.1, "cosine": 0.5, "max_abs": 7.0}}
        (bundle.root / tower).mkdir()
        write_json(bundle.root / tower / "report.json", {"status": "done", "checkpoint": checkpoint, "checks": checks})
    return found


def finish(context, zero_shot=True):
    context.results.put("pair", PairResult.from_dict(FACTS))
    found = {"source": "evaluation data", "checks": {"fp16": check(zero_shot=70.5 if zero_shot else None)}}
    if zero_shot:
        found["zero_shot"] = {"classes": 3, "templates": 2, "num_images": 40, "jax": 71.25}
    context.results.put("similarity", SimilarityResult.from_dict(found))


def test_everything_that_was_found(context):
    finish(context)
    report = write_pair_report(context, ROWS, ["vit_convert", "--config=a b.py"])
    assert report == read(context.bundle, PairReport) and PairReport.problems(report.to_dict()) == []
    assert (report.name, report.status, report.command) == ("siglip", "done", "vit_convert '--config=a b.py'")
    assert (report.pair.logit_scale, report.pair.similarity, report.similarity.source) == (
        9.5,
        "sigmoid",
        "evaluation data",
    )
    assert report.checkpoint.to_dict() == {
        "path": "a.npz", "sha256": "ab", "family": "siglip", "variant": "SigLIP-B/16", "image_size": [224, 224],
        "num_params": 200,
    }  # fmt: skip
    assert report.accuracy == {"jax": 71.25, "fp16": 70.5} and report.zero_shot.templates == 2
    short = {name: (row.bundle, row.report, row.status) for name, row in report.towers.items()}
    assert short == {name: (name, f"{name}/report.json", "done") for name in ("image", "text")}
    assert report.towers["image"].checks["fp16"].to_dict() == {"passed": True, "max_rel": 0.1, "cosine": 0.5}
    assert not report.towers["text"].checks["fp16"].passed and [row.name for row in report.stages] == [
        "pair",
        "similarity",
    ]


def test_without_classes_there_is_no_accuracy(context):
    finish(context, zero_shot=False)
    report = write_pair_report(context, ROWS, [])
    assert report.accuracy == {} and report.zero_shot is None and [*report.checks] == ["fp16"]


@pytest.mark.parametrize("missing", ["image", "text"])
def test_one_that_came_no_further(context, missing):
    write_json(context.bundle.root / missing / "report.json", {"status": "failed"})
    report = write_pair_report(context, rows("failed", ["pair"]), ["x"])
    assert (report.status, report.pair, report.checkpoint, report.similarity) == ("failed", None, None, None)
    assert (report.checks, report.accuracy, report.towers[missing].status) == ({}, {}, "failed")


@pytest.mark.parametrize(("status", "kept"), [("fresh", True), ("done", False)])
def test_what_a_gpu_host_found_of_the_same_graphs_stays(context, status, kept):
    finish(context)
    write_pair_report(context, ROWS, ["x"])
    before = json.loads(context.bundle.report.read_text())
    write_json(context.bundle.report, {**before, "engines": {"fp16": check(top1=98.0)}})
    report = write_pair_report(context, rows(status), ["x"])
    assert {name: row.top1 for name, row in report.engines.items()} == ({"fp16": 98.0} if kept else {})
    assert report.status == "done"


def printed(context, capsys, **changes):
    found = write_pair_report(context, ROWS, ["x"])
    record = {**found.to_dict(), **changes}
    capsys.readouterr()
    print_pair_summary(PairReport.from_dict(record), context.bundle)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_what_is_printed(context, capsys):
    finish(context)
    found = printed(context, capsys)
    assert found[:4] == [
        "siglip: a pair of towers, sigmoid",
        "pair against JAX cosine prob. same first in first 5 zero-shot",
        "JAX 71.25 %",
        "ONNX fp16 passed 0.0013 0.25 99.50 % 100.00 % 70.50 %",
    ]
    assert "No engine was built." in found[4] and found[4].endswith("python -m vit_convert.engine siglip")
    assert found[5].startswith(f"{context.bundle.root}: image/ and text/")
    (context.bundle.root / "text" / "engines").mkdir()
    missed = printed(context, capsys, checks={"int8": check(False)}, zero_shot=None)
    assert missed[2] == "ONNX int8 FAILED 0.0013 0.25 99.50 % 100.00 %" and "No engine" not in "".join(missed)


def test_what_is_printed_of_one_that_failed(context, capsys):
    found = printed(context, capsys)
    assert found[0] == "siglip: a pair of towers, not described yet" and "against JAX" not in "".join(found)
