"""Batches in processes of their own that are killed, interrupted or late; benchmarks/batch_accidents.py does more."""

import pathlib
import signal

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import batch_accidents

    return batch_accidents


@pytest.mark.slow
def test_after_kills_the_same_command_makes_all_right_and_nothing_twice(harness, tmp_path):
    right = harness.Right(tmp_path, 4)
    batch = harness.Batch(right.words, tmp_path / "killed")
    for whom, part in (
        ("worker", 0.7),
        ("parent", 0.8),
        ("everything", 0.6),
    ):  # as others' work allows: any moment is fine
        assert right.killed(batch, whom, part * right.seconds)["wrong"] == [], whom
    assert right.whole(batch) == []


@pytest.mark.slow
def test_an_interrupt_lets_workers_end_and_keeps_what_is_done(harness, tmp_path):
    right = harness.Right(tmp_path, 3, jobs=1)
    batch = harness.Batch(right.words, tmp_path / "interrupted")
    process = batch.start()

    def one_is_done():
        return (batch.workdir / "batch.json").exists() and batch.jobs()["mu0000"]["status"] == "done"

    assert harness.wait_for(one_is_done, 120)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in said
    assert not harness.workers_of(process.pid)
    statuses = {name: job["status"] for name, job in batch.jobs().items()}
    assert statuses["mu0000"] == "done" and statuses["mu0002"] == "pending"
    assert right.whole(batch) == []


@pytest.mark.slow
def test_late_jobs_are_ended_and_named(harness, tmp_path):
    words = [f"--checkpoints={harness.write_zoo(tmp_path / 'zoo', 1)[0]}", *harness.QUICK, "--timeout=0.3", "--quiet"]
    batch = harness.Batch(words, tmp_path / "late")
    code, said = batch.run()
    (job,) = batch.jobs().values()
    assert (code, job["status"], job["exit_code"]) == (9, "timeout", 130) and "not done after 0.3 s" in job["error"], (
        said
    )
    assert batch.left_behind() == []
