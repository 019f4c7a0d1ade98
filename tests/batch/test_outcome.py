"""What a batch takes out of a bundle's report, and its record on disk."""

import csv
import dataclasses
import json
import pathlib

import pytest

from vit_convert.batch.outcome import Checked, EngineOutcome, Figures, Outcome, figures_of, is_fresh, peak_of
from vit_convert.batch.record import BatchRecord, write_table

REPORT = {
    "checkpoint": {
        **{"family": "vit", "variant": "B/32", "num_params": 88, "image_size": [224, 384]},
        "warnings": ["its head is all zeros"],
    },
    "onnx": {"bytes": 352},
    "accuracy": {"jax": 81.5, "onnx": 81.5},
    "checks": {"fp32": {"passed": True, "cosine": 0.9999, "top1": 81.5}, "int8": {"passed": False, "cosine": 0.7}},
    "stages": [
        {"name": "checkpoint", "status": "fresh", "peak_rss_mib": 9000.0},
        {"name": "export", "status": "done", "peak_rss_mib": 500.0},
        {"name": "check", "status": "failed", "peak_rss_mib": 700.0},
    ],
}


def test_figures():
    checks = (Checked("fp32", True, 0.9999, 81.5), Checked("int8", False, 0.7))
    assert figures_of(REPORT) == Figures("vit", "B/32", 88, (224, 384), 352, 81.5, checks, ("its head is all zeros",))
    assert figures_of({}) == Figures()
    assert peak_of(REPORT) == 700.0 and not is_fresh(REPORT)
    assert is_fresh({"stages": REPORT["stages"][:1]}) and peak_of({"stages": REPORT["stages"][:1]}) == 0.0


def test_the_towers_of_a_pair():
    pair = {**REPORT, "towers": {"text": {"checks": {"fp32": {"passed": True, "cosine": 1.0}}}}}
    assert figures_of(pair).checks[-1] == Checked("text/fp32", True, 1.0)
    assert peak_of(pair) == 0.0  # its own stages are not what took memory


def test_a_record_is_read_as_it_was_written(tmp_path):
    jobs = [
        Outcome("a", "a.npz", "done", 0, 1.5, 600.0, "host", 1, figures=figures_of(REPORT)),
        Outcome("b", "b.npz", "failed", 3, error="b.npz: no zip", fix="Fetch it again."),
        Outcome("c"),
    ]
    record = BatchRecord.of("python -m …", "2026-11-27T00:00:00Z", "failed", jobs)
    assert record.counts == {"done": 1, "failed": 1, "pending": 1}
    record.write(tmp_path / "batch.json")
    assert BatchRecord.read(tmp_path / "batch.json") == record


def written(path, damage=lambda value: None):
    """A record's file, damaged."""
    BatchRecord.of("x", "y", "done", [Outcome("a", figures=figures_of(REPORT)).with_engines([EngineOutcome()])]).write(
        path
    )
    value = json.loads(path.read_text())
    damage(value)
    path.write_text(json.dumps(value))
    return value


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value.update(schema="vit_convert.batch/2"),
        lambda value: value.update(schema="vit_convert.batch/0"),
        lambda value: value.update(schema=1),
        lambda value: value.update(command=3),
        lambda value: value["jobs"][0].update(seconds="long"),
        lambda value: value["jobs"][0]["engines"][0].update(device=0),
        lambda value: value.update(jobs=[3]),
    ],
)
def test_what_is_no_record_is_none(tmp_path, damage):
    written(tmp_path / "batch.json", damage)
    assert BatchRecord.read(tmp_path / "batch.json") is None
    assert BatchRecord.read(tmp_path / "none.json") is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda value: value.pop("command"), "BatchRecord.command: missing"),
        (lambda value: value["jobs"][0].pop("figures"), "BatchRecord.jobs[0].figures: missing"),
        (lambda value: value["jobs"][0]["figures"]["checks"][0].update(x=1), "figures.checks[0].x: no such key"),
        (lambda value: value["jobs"][0]["engines"][0].update(seconds="1"), "engines[0].seconds: '1' is no"),
    ],
)
def test_the_schema_names_what_is_off(tmp_path, damage, said):
    assert BatchRecord.problems(written(tmp_path / "batch.json")) == []
    (problem,) = BatchRecord.problems(written(tmp_path / "batch.json", damage))
    assert said in problem


def test_the_page_has_every_key():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "batch.md").read_text().split("### batch.json")[1]
    for kind in (BatchRecord, Outcome, Figures, Checked, EngineOutcome):
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in page, (kind.__name__, field.name)


def test_the_table_has_a_column_for_each_precision_and_gpu(tmp_path):
    engines = (EngineOutcome("L4", status="done", recommended="fp16", images_per_second=7.5), EngineOutcome("T4"))
    jobs = [Outcome("a", "a.npz", "done", 0, figures=figures_of(REPORT), engines=engines), Outcome("b", error="x\ny")]
    write_table(tmp_path / "batch.csv", jobs)
    first, second = csv.DictReader((tmp_path / "batch.csv").open())
    assert (first["int8_cosine"], first["fp32_top1"], first["image_size"]) == ("0.7", "81.5", "224x384")
    assert (first["L4_images_per_second"], first["T4_status"], first["warnings"]) == (
        *("7.5", "failed", "its head is all zeros"),
    )
    assert (second["error"], second["L4_status"]) == ("x y", "")


def test_out_of_memory_may_pass_and_another_exception_may_not():
    from vit_convert.batch import run

    begun = run.Outcome("a", "a.npz")
    found = run._failed(begun, MemoryError("x"))
    assert (found.status, found.exit_code, found.error, found.passing) == ("failed", 130, "out of memory", True)
    found = run._failed(begun, ValueError("x"))
    assert (found.status, found.exit_code, found.passing) == ("failed", 1, False) and "This is a bug" in found.error


@pytest.mark.parametrize(
    ("status", "finished", "failed"),
    [("done", True, False), ("fresh", True, False), ("failed", False, True), ("timeout", False, True),
     ("pending", False, False)],
)  # fmt: skip
def test_what_is_finished_and_what_failed(status, finished, failed):
    assert (Outcome("a", status=status).finished, Outcome("a", status=status).failed) == (finished, failed)
    assert EngineOutcome(status=status).finished is finished


@pytest.mark.parametrize(
    ("own", "engines", "status"),
    [("fresh", ["fresh", "fresh"], "fresh"), ("fresh", ["fresh", "done"], "done"), ("done", ["fresh"], "done"),
     ("fresh", [], "fresh")],
)  # fmt: skip
def test_engines_that_are_there(own, engines, status):
    rows = [EngineOutcome(status=each) for each in engines]
    found = Outcome("a", status=own, exit_code=0).with_engines(rows)
    assert (found.status, found.engines, found.exit_code, found.error) == (status, tuple(rows), 0, "")


@pytest.mark.parametrize(("gpu", "words"), [("h100", "engines for h100: no driver"), ("", "engines: no driver")])
def test_the_first_engine_that_failed_is_the_jobs_failure(gpu, words):
    rows = [
        EngineOutcome(status="done"),
        EngineOutcome(gpu=gpu, status="timeout", exit_code=130, error="no driver", fix="Install it."),
        EngineOutcome(status="failed", exit_code=7, error="another"),
    ]
    found = Outcome("a", status="done", exit_code=0).with_engines(rows)
    assert (found.status, found.exit_code, found.error, found.fix) == ("timeout", 130, words, "Install it.")
    assert found.engines == tuple(rows) and found.failed
