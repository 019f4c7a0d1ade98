"""What a measured process took, against what it is known to do; and a result file that goes on where it stopped."""

import json
import pathlib
import subprocess
import sys
import types

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


MEASURE = """
import dataclasses, json, sys
from process import run
print(json.dumps(dataclasses.asdict(run([sys.executable, "-c", sys.argv[1]]))))
"""


def measured(code):
    """From a process as small as the one that measures: the kernel counts what the parent holds at the fork as the
    child's."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, code], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    return types.SimpleNamespace(**json.loads(done.stdout))


# a write into every page makes it resident, and takes no more for a moment
HOLD = "x = bytearray(100 << 20); x[::4096] = bytes(25600)"
ALONE = f"import time; {HOLD}; time.sleep(0.5)"
# The parent takes its own memory once the child has said that it holds its, and lets it go afterwards.
BOTH = f"""
import subprocess, sys, time
child = "{HOLD}; print('held', flush=True); input()"
p = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
print(p.stdout.readline(), end="")
{HOLD}
time.sleep(0.5)
p.communicate("go on")
sys.exit(p.returncode + 3)
"""


def test_memory_of_children_counts():
    alone, pair = measured(ALONE), measured(BOTH)
    # an interpreter has 8 to 10 MiB
    assert 100 <= alone.peak_rss_mib <= 125 and pair.peak_rss_mib >= alone.peak_rss_mib + 100
    assert (alone.exit_code, pair.exit_code) == (0, 3) and pair.output == "held\n"
    assert alone.wall_seconds >= 0.5 and 0 < alone.cpu_seconds < alone.wall_seconds


def test_errors_go_to_a_file(tmp_path):
    from process import run

    assert run([sys.executable, "-c", "raise SystemExit('no')"], errors=tmp_path / "errors.txt").exit_code == 1
    assert (tmp_path / "errors.txt").read_text() == "no\n"


def test_results_are_continued(tmp_path, monkeypatch):
    from results import Results

    path = tmp_path / "deep" / "convert-2026-01-01.json"
    monkeypatch.setattr(sys, "argv", ["convert.py", "--variants=Ti/16"])
    Results(path, "what it is").add(variant="Ti/16", repeat=0, wall_seconds=1.0)
    monkeypatch.setattr(sys, "argv", ["convert.py", "--variants=B/32"])
    again = Results(path, "what it is")
    assert (
        again.has(variant="Ti/16", repeat=0)
        and not again.has(variant="Ti/16", repeat=1)
        and not again.has(variant="B/32")
    )
    again.add(variant="B/32", repeat=0, wall_seconds=2.0)
    record = json.loads(path.read_text())
    assert [run["variant"] for run in record["runs"]] == ["Ti/16", "B/32"]
    assert record["command"].count("convert.py") == 2 and "--variants=Ti/16; python" in record["command"]
    assert record["hardware"]["cores"] >= 1 and "numpy" in record["versions"]
    assert list(path.parent.iterdir()) == [path]
