"""A batch run: its options, its record, what a second command does, bundles equal to those of single conversions."""

import csv
import json
import pathlib
import re
import shutil
import sys

import pytest

from vit_convert.__main__ import main as convert
from vit_convert.batch.__main__ import main
from vit_convert.batch.outcome import Outcome
from vit_convert.batch.record import BatchRecord

QUICK = ("--config.precision=fp32", "--config.engine.backend=none", "--config.check.num_images=2")


def batch(*words: str, page: bool = False) -> int:
    return main(["vit_convert.batch", *map(str, words), *([] if page else ["--nopage"])])


def record(workdir: pathlib.Path) -> dict[str, Outcome]:
    found = BatchRecord.read(workdir / "batch.json")
    assert found is not None
    return {job.name: job for job in found.jobs}


def events(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "batch.events.jsonl").read_text().splitlines()]


def left_behind(workdir: pathlib.Path) -> list[pathlib.Path]:
    return list(workdir.rglob(".*"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, checkpoints: list[pathlib.Path]) -> pathlib.Path:
    """The workdir of a batch of three good checkpoints, one that is truncated and one that is missing."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "short.npz").write_bytes(checkpoints[0].read_bytes()[:2000])
    given = [*checkpoints, folder / "short.npz", folder / "gone.npz"]
    words = [f"--checkpoints={path}" for path in given]
    assert batch(*words, *QUICK, f"--workdir={folder / 'out'}", "--jobs=1", "--quiet", page=True) == 9
    (folder / "words.json").write_text(json.dumps(words))
    return folder / "out"


def again(done: pathlib.Path, *words: str) -> int:
    return batch(*json.loads((done.parent / "words.json").read_text()), *QUICK, f"--workdir={done}", *words)


def test_the_record_says_what_became_of_each(done):
    jobs = record(done)
    assert {name: (job.status, job.exit_code) for name, job in jobs.items()} == {
        **dict.fromkeys(["mu0", "mu1", "mu2"], ("done", 0)),
        **dict.fromkeys(["short", "gone"], ("failed", 3)),
    }
    mu0 = jobs["mu0"]
    assert (mu0.figures.family, mu0.figures.variant, mu0.figures.image_size, mu0.attempts) == (
        "vit",
        "mu/16",
        (32, 32),
        1,
    )
    assert mu0.seconds > 0 and mu0.peak_rss_mib > 50 and mu0.host
    assert [(check.precision, check.passed) for check in mu0.figures.checks] == [("fp32", True)]
    assert "short.npz" in jobs["short"].error and not jobs["short"].passing and jobs["short"].attempts == 1
    found = json.loads((done / "batch.json").read_text())
    assert found["counts"] == {"done": 3, "failed": 2} and BatchRecord.problems(found) == []
    assert not left_behind(done)


def test_the_table_has_a_row_a_job(done):
    rows = list(csv.DictReader((done / "batch.csv").open()))
    assert [row["name"] for row in rows] == ["mu0", "mu1", "mu2", "short", "gone"]
    assert (
        rows[0]["fp32_passed"] == "True"
        and float(rows[0]["fp32_cosine"]) > 0.999999
        and rows[0]["image_size"] == "32x32"
    )
    assert rows[3]["exit_code"] == "3" and "short.npz" in rows[3]["error"]


def test_the_page_shows_the_zoo(done):
    page = (done / "batch.html").read_text()
    assert "mu2" in page and "short.npz" in page and "<svg" in page


def test_events_are_lines(done):
    found = events(done)
    assert found[0]["event"] == "batch" and found[0]["jobs"] == 5
    assert sorted(line["job"] for line in found if line["event"] == "end") == ["gone", "mu0", "mu1", "mu2", "short"]
    assert len({line["worker"] for line in found if line["event"] == "start"}) == 1


@pytest.mark.slow
def test_bundles_are_byte_for_byte_those_of_single_conversions(done, checkpoints, pages, tmp_path):
    """But for what holds times, paths and process numbers."""
    differing = {"manifest.json", "events.jsonl", "report.json", "report.html"}
    for path in checkpoints[:2]:
        words = [
            f"--config.checkpoint={path}",
            f"--config.name={path.stem}",
            *QUICK,
            f"--workdir={tmp_path}",
            "--quiet",
        ]
        assert convert(["vit_convert", "--config=vit_mu16.py", "--config.variant=auto", *words]) == 0
        single, ours = tmp_path / path.stem, done / path.stem
        names = sorted(file.relative_to(single).as_posix() for file in single.rglob("*") if file.is_file())
        assert names == sorted(file.relative_to(ours).as_posix() for file in ours.rglob("*") if file.is_file())
        assert {"config.json", "model.onnx", "model.onnx.data", "reference.npz", "signature.json"} <= {*names}
        assert _errors_drawn(single) == _errors_drawn(ours) != []
        for name in {*names} - differing:
            assert (single / name).read_bytes() == (ours / name).read_bytes(), name


def _errors_drawn(bundle: pathlib.Path) -> list[str]:
    """What the figure of errors says of each block, which no time is in."""
    return re.findall(r"<title>(fp32, [^<]*)</title>", (bundle / "report.html").read_text())


def test_every_bundle_has_its_page_unless_it_is_left_out(done, checkpoints, pages, tmp_path):
    """Also one that was made without, by a command that finds nothing else to do."""
    assert [path.parent.name for path in sorted(done.glob("*/report.html"))] == ["gone", "mu0", "mu1", "mu2", "short"]
    shutil.copytree(done / "mu0", tmp_path / "mu0")
    words = (f"--checkpoints={checkpoints[0]}", *QUICK, f"--workdir={tmp_path}", "--quiet")
    page = tmp_path / "mu0" / "report.html"
    page.unlink()
    assert batch(*words) == 0 and not page.exists()
    assert batch(*words, page=True) == 0 and record(tmp_path)["mu0"].status == "fresh"
    assert _errors_drawn(tmp_path / "mu0") == _errors_drawn(done / "mu0")


def test_the_same_command_leaves_alone_what_is_finished(done, capsys):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*/*")}
    seconds = {name: job.seconds for name, job in record(done).items()}
    assert again(done) == 9
    jobs = record(done)
    assert [jobs[name].status for name in ("mu0", "mu1", "mu2", "short", "gone")] == ["fresh"] * 3 + ["failed"] * 2
    assert jobs["mu0"].seconds == seconds["mu0"]  # what it took when it was made
    assert {path: stamp for path, stamp in before.items() if path.parent.name.startswith("mu")}.items() <= {
        path: path.stat().st_mtime_ns for path in done.rglob("*/*")
    }.items()
    assert "3 fresh, 2 failed" in capsys.readouterr().out


def test_a_batch_without_what_the_page_needs_says_so_and_is_no_failure(done, checkpoints, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    words = (f"--checkpoints={checkpoints[0]}", *QUICK, f"--workdir={done}")
    (done / "batch.html").unlink()
    assert batch(*words, page=True) == 0
    assert "no batch.html: jinja2 is not installed" in capsys.readouterr().err and not (done / "batch.html").exists()
    assert again(done, "--quiet") == 9  # as it was


def test_only_failed_looks_at_no_others(done, checkpoints):
    kept = (done / "mu1" / "model.onnx").read_bytes()
    (done / "mu1" / "model.onnx").unlink()
    shutil.copy(checkpoints[0], done.parent / "gone.npz")
    assert again(done, "--only_failed", "--quiet") == 9
    jobs = record(done)
    assert (jobs["gone"].status, jobs["short"].status) == ("done", "failed")
    assert jobs["mu1"].finished and not (done / "mu1" / "model.onnx").exists()
    (done / "mu1" / "model.onnx").write_bytes(kept)


def test_only_failed_needs_a_record(tmp_path, checkpoints, capsys):
    assert batch(f"--checkpoints={checkpoints[0]}", f"--workdir={tmp_path}", "--only_failed") == 2
    assert "Run without it once" in capsys.readouterr().err


@pytest.mark.slow
def test_what_changed_is_converted_again(done, checkpoints):
    (done / "mu2" / "model.onnx").write_bytes(b"cut short")
    assert again(done, "--quiet") == 9
    assert record(done)["mu2"].status == "done" and len((done / "mu2" / "model.onnx").read_bytes()) > 1000


@pytest.mark.slow
def test_until_and_force(tmp_path, checkpoints):
    words = (f"--checkpoints={checkpoints[0]}", *QUICK, f"--workdir={tmp_path}", "--quiet", "--jobs=1")
    assert batch(*words, "--until=export") == 0
    assert (tmp_path / "mu0" / "model.onnx").exists() and not (tmp_path / "mu0" / "reference.npz").exists()
    assert batch(*words, "--until=export") == 0 and record(tmp_path)["mu0"].status == "fresh"
    assert batch(*words, "--until=export", "--force") == 0 and record(tmp_path)["mu0"].status == "done"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--until=exprt"], "Did you mean export"),
        (["--shard=5/4"], "expected i/n"),
        (["--shard=x"], "expected i/n"),
        (["--config.precison=fp16"], "Did you mean precision"),
        (["stray.npz"], "unexpected argument 'stray.npz'"),
        (["--jobs=-1"], "non-negative"),
        (["--checkpoints=none/*.npz"], "no checkpoint there"),
    ],
)
def test_mistakes_are_exit_2_before_any_work(tmp_path, checkpoints, capsys, words, said):
    assert batch(f"--checkpoints={checkpoints[0]}", f"--workdir={tmp_path / 'out'}", *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_dry_run_prints_and_does_nothing(tmp_path, checkpoints, capsys):
    words = [
        f"--checkpoints={checkpoints[0]},gs://bucket/far.npz",
        f"--workdir={tmp_path / 'out'}",
        "--dry_run",
        "--jobs=2",
    ]
    assert batch(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["mu0", "37,898"] and lines[2].split()[:2] == ["far", "90,000,000?"]
    assert lines[-1].startswith("2 jobs, about") and not (tmp_path / "out").exists()


def test_a_shard_takes_its_part_and_has_files_of_its_own(tmp_path, checkpoints):
    from vit_convert.batch.job import shard_of

    number = shard_of("mu0", 3)
    words = [f"--checkpoints={path}" for path in checkpoints]
    assert batch(*words, *QUICK, f"--workdir={tmp_path}", "--quiet", f"--shard={number}/3", "--until=checkpoint") == 0
    found = BatchRecord.read(tmp_path / f"batch.{number}-of-3.json")
    assert found is not None
    assert [job.name for job in found.jobs] == [name for name in ("mu0", "mu1", "mu2") if shard_of(name, 3) == number]
    assert not (tmp_path / "batch.json").exists()


def test_help_lists_flags_and_keys(capsys):
    assert batch("--help") == 0
    text = capsys.readouterr().out
    assert "--only_failed" in text and "config.precision" in text and "9 some conversions failed" in text


def test_one_batch_at_a_time_works_in_a_folder(tmp_path, checkpoints, capsys):
    from vit_convert.batch.folder import BatchFolder
    from vit_convert.core.lock import hold

    words = (f"--checkpoints={checkpoints[0]}", f"--workdir={tmp_path}", "--until=checkpoint")
    with hold(BatchFolder(str(tmp_path)), "the first"):
        assert batch(*words) == 2
    said = capsys.readouterr().err
    assert "the first" in said and not (tmp_path / "batch.json").exists()
