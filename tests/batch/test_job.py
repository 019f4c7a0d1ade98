"""A job: the words of the same conversion by hand, its config, and the shard that it belongs to."""

import hashlib

import pytest

from vit_convert.batch import job as module
from vit_convert.batch.job import Job, shard_of
from vit_convert.core.errors import UsageError


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (Job("a"), ["--config.name=a"]),
        (Job("a", "x.npz"), ["--config.checkpoint=x.npz", "--config.name=a"]),
        (Job("a", config="c.py"), ["--config=c.py", "--config.name=a"]),
        (Job("a", config="c.py", argument="B/16"), ["--config=c.py:B/16", "--config.name=a"]),
        (Job("a", argument="B/16"), ["--config.name=a"]),  # there is no file to give it to
        (Job("a", "x.npz", ("--config.precision=fp32",), "c.py"),
         ["--config=c.py", "--config.precision=fp32", "--config.checkpoint=x.npz", "--config.name=a"]),
    ],
)  # fmt: skip
def test_the_words_of_one_conversion(job, words):
    assert job.words == words


def test_jobs_that_differ_in_name_and_checkpoint_share_a_config(monkeypatch):
    monkeypatch.setattr(module, "_made", {})
    first, second = Job("a", "x.npz", ("--config.batch.max=32",)), Job("b", "y.npz", ("--config.batch.max=32",))
    made = first.make_config()
    assert (made.name, made.checkpoint, made.batch.max) == ("a", "x.npz", 32)
    again = second.make_config()
    assert again is made and (again.name, again.checkpoint) == ("b", "y.npz")
    others = [Job("a", "x.npz"), Job("a", overrides=("--config.batch.max=32",)), Job("a", "x.npz", argument="B")]
    assert len({job.kind for job in (first, *others)}) == 4 and second.kind == first.kind
    assert others[0].make_config().batch.max == 64


def test_values_out_of_range_are_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(module, "_made", {})
    for _ in range(2):  # also the second time
        with pytest.raises(UsageError, match=r"config\.batch\.max"):
            Job("a", "x.npz", ("--config.batch.max=0",)).make_config()


def test_only_so_many_kinds_are_kept(monkeypatch):
    monkeypatch.setattr(module, "_made", {})
    for size in range(1, 70):
        assert Job("a", "x.npz", (f"--config.batch.max={size + 8}",)).make_config().batch.max == size + 8
    assert len(module._made) == 64
    kept = [kind[2][0] for kind in module._made]
    assert kept == [f"--config.batch.max={size + 8}" for size in range(6, 70)]  # the newest


def test_shards_are_by_the_name_alone():
    """By sha256, so that every machine and version agrees."""
    for name in ("vit_b32", "a", "ü"):
        number = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16)
        assert [shard_of(name, count) for count in (1, 2, 7)] == [1, number % 2 + 1, number % 7 + 1]
    assert {shard_of(f"job{i}", 4) for i in range(100)} == {1, 2, 3, 4}
