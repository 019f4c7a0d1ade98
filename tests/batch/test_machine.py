"""What is read of the machine, and of a checkpoint's header."""

import os
import subprocess
import sys

import pytest

from vit_convert.batch import machine
from vit_convert.batch.estimate import estimate, is_here
from vit_convert.batch.job import Job
from vit_convert.core.host import num_cores


def test_memory_and_cores_of_this_machine():
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / machine.GIB
    assert 0 <= machine.free_memory_gib() < total
    assert 1 < machine.rss_mib(os.getpid()) < total * 1024
    assert machine.rss_mib(2**22 + 1) == 0  # above every process number


def test_a_containers_limit_counts(monkeypatch):
    monkeypatch.setattr(machine, "_meminfo_bytes", lambda key: 10 * machine.GIB)
    monkeypatch.setattr(machine, "_cgroup_bytes", lambda: 2 * machine.GIB)
    assert machine.free_memory_gib() == pytest.approx(1.8)
    monkeypatch.setattr(machine, "_cgroup_bytes", lambda: None)
    assert machine.free_memory_gib() == pytest.approx(9.0)


def test_an_estimate_reads_the_header(checkpoints, tmp_path):
    found = estimate(Job("x", str(checkpoints[0])))
    assert found.known and found.num_params == 37_898 and 437 < found.memory_mib < 438
    quantized = estimate(Job("x", str(checkpoints[0]), ("--config.precision=fp16,int8",)))
    assert quantized.seconds > found.seconds and quantized.memory_mib > found.memory_mib
    assert quantized.kind != found.kind
    assert estimate(Job("x", checkpoints[0].name), [str(checkpoints[0].parent)]).known


@pytest.mark.parametrize("checkpoint", ["gone.npz", "gs://bucket/gone.npz", ""])
def test_what_is_not_here_is_taken_to_be_a_base_model(checkpoint):
    found = estimate(Job("x", checkpoint))
    assert not found.known and found.num_params == 90_000_000 and 800 < found.memory_mib < 900


def test_a_broken_file_is_estimated_by_its_size(tmp_path):
    path = tmp_path / "broken.npz"
    path.write_bytes(b"x" * 4000)
    assert estimate(Job("x", str(path))).num_params == 1000


def test_what_is_fetched_already_is_here(tmp_path):
    from vit_convert.checkpoint.fetch import local_name

    job = Job("x", "gs://bucket/a.npz")
    assert not is_here(job, [str(tmp_path)])
    (tmp_path / local_name(job.checkpoint)).touch()
    assert is_here(job, [str(tmp_path)])


def test_the_command_answers_at_once():
    """Without what takes seconds to import; workers import it."""
    code = (
        "import sys; from vit_convert.batch.__main__ import main\n"
        "code = main(['x', '--checkpoints=a.npz', '--dry_run'])\n"
        "print([name for name in ('jax', 'flax', 'onnx', 'onnxruntime', 'onnx_ir') if name in sys.modules])\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
