"""A real Ray cluster of two nodes on this machine; a worker, a node and the driver are killed."""

import os
import pathlib
import signal
import subprocess

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed")
ROOT = pathlib.Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
HEAD, SECOND = "127.0.0.2", "127.0.0.3"  # Ray turns 127.0.0.1 into the address of the network card
GIB = 1 << 30

pytestmark = pytest.mark.slow


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import batch_accidents

    return batch_accidents


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of one core each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: beside other tests nothing would be left for them
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", str(ROOT)))
    size = {"num_cpus": 1, "memory": 2 * GIB, "object_store_memory": 10**8}
    head = {**size, "include_dashboard": False, "node_ip_address": HEAD}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.second = made.add_node(**size, node_ip_address=SECOND)
    yield made
    made.shutdown()


def converting() -> list[int]:
    """Ray's processes that have a conversion."""
    done = subprocess.run(["pgrep", "-f", "ray::convert_task"], capture_output=True, text=True, check=False)
    return [int(line) for line in done.stdout.split()]


def test_every_job_ends_once_whatever_is_killed(harness, cluster, tmp_path):
    right = harness.Right(tmp_path, 4)
    words = [*right.words, "--runner=ray", f"--ray_address={cluster.address}"]
    words.remove("--jobs=2")
    batch = harness.Batch(words, tmp_path / "ray")

    driver = batch.start()
    assert harness.wait_for(lambda: len(converting()) == 2, 60), driver.poll()
    driver.send_signal(signal.SIGINT)  # Ctrl-C: all that runs ends, and the same command goes on
    said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130 and harness.wait_for(lambda: not converting(), 60), said

    driver = batch.start()
    assert harness.wait_for(lambda: len(converting()) == 2, 60), driver.poll()
    os.kill(converting()[0], signal.SIGKILL)
    assert harness.wait_for(lambda: bool(batch.finished()), 120)
    driver.send_signal(signal.SIGKILL)  # the driver, in the middle
    driver.communicate()
    assert harness.wait_for(lambda: not converting(), 60)  # its tasks end with it
    before = batch.finished()

    driver = batch.start()
    assert harness.wait_for(lambda: len(converting()) >= 1, 60)
    cluster.remove_node(cluster.second, allow_graceful=False)
    said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, said
    jobs, now = batch.jobs(), batch.finished()
    assert {job["status"] for job in jobs.values()} <= {"done", "fresh"} and list(jobs) == right.names
    assert before and {name: now[name] for name in before} == before  # nothing twice that was finished
    assert right.wrong_files(batch) == []  # equal to those of the local runner, byte for byte
    ends = [line for line in (batch.workdir / "batch.events.jsonl").read_text().splitlines() if '"end"' in line]
    assert len(ends) <= len(right.names)
    assert batch.left_behind() == []


ENGINES = """
for word; do [ -d "$word" ] && bundle=$word; done
echo "$CUDA_VISIBLE_DEVICES $(basename "$bundle")" >>"$(dirname "$0")/log"
while [ -e "$(dirname "$0")/hold" ]; do sleep 0.1; done
mkdir -p "$bundle/engines/x" && echo plan >"$bundle/engines/x/fp16.plan"
"""


def waiting(python: pathlib.Path) -> list[int]:
    """Processes of engine tasks."""
    done = subprocess.run(["pgrep", "-f", str(python)], capture_output=True, text=True, check=False)
    found = [int(line) for line in done.stdout.split()]
    return [pid for pid in found if b"vit_convert.batch" not in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_engines_are_tasks_of_one_gpu_of_a_type_and_lost_nodes_are_replaced(harness, cluster, tmp_path):
    size = {"num_cpus": 1, "num_gpus": 1, "memory": GIB, "object_store_memory": 10**8}
    lost = cluster.add_node(**size, resources={"accelerator_type:A": 1}, node_ip_address="127.0.0.4")
    cluster.add_node(**size, resources={"accelerator_type:B": 1}, node_ip_address="127.0.0.5")
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{ENGINES}")
    python.chmod(0o755)
    paths = harness.write_zoo(tmp_path / "zoo", 2)
    words = [f"--checkpoints={path}" for path in paths] + [*harness.QUICK, "--quiet", f"--trt_python={python}"]
    words += ["--engines=build,verify,benchmark", "--runner=ray", f"--ray_address={cluster.address}"]
    batch = harness.Batch(words, tmp_path / "out")
    (tmp_path / "hold").touch()
    driver = batch.start()
    log = tmp_path / "log"

    def began(count):
        return log.exists() and len(log.read_text().splitlines()) == count

    assert harness.wait_for(lambda: began(2), 120), driver.poll()
    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130 and harness.wait_for(lambda: not waiting(python), 60), said
    driver = batch.start()
    assert harness.wait_for(lambda: began(4), 120), driver.poll()
    cluster.remove_node(lost, allow_graceful=False)  # one task waits on each GPU: the first type loses its node
    cluster.add_node(**size, resources={"accelerator_type:A": 1}, node_ip_address="127.0.0.6")
    (tmp_path / "hold").unlink()
    said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, said
    rows = {name: job["engines"] for name, job in batch.jobs().items()}
    assert {name: sorted(row["gpu"] for row in engines) for name, engines in rows.items()} == {
        path.stem: ["A", "B"] for path in paths
    }
    assert {row["device"] for engines in rows.values() for row in engines} == {"0"}  # as Ray named it to the task
    assert sum(row["attempts"] == 2 for engines in rows.values() for row in engines) == 1
    assert began(7) and batch.left_behind() == []


def test_what_is_not_there_is_said(harness, tmp_path):
    batch = harness.Batch(
        [f"--checkpoints={tmp_path}/a.npz", "--runner=ray", "--ray_address=127.0.0.9:6399"], tmp_path / "o"
    )
    code, said = batch.run()
    assert code == 2 and "no cluster there" in said
