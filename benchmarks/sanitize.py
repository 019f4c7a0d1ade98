"""Runs the tests of our kernels under compute-sanitizer, with each of its tools, and keeps what it says.

    python benchmarks/sanitize.py --output=benchmarks/results/h200-sanitizer.json

Needs what tests/gpu/test_kernels_on_gpu.py and test_group_norm_on_gpu.py do and CUDA's compute-sanitizer, which looks
at our kernels alone but for initcheck.
"""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import app, flags
from results import ROOT, Results, first_paragraph

_OUTPUT = flags.DEFINE_string("output", None, "The JSON file.", required=True)
_TOOLS = flags.DEFINE_list("tools", ["memcheck", "racecheck", "synccheck", "initcheck"], "Tools of compute-sanitizer.")
_TESTS = flags.DEFINE_string(
    "tests",
    "1-17-3 or 1-65-3 or 2-577-2 or 3-50-12 or rise or (test_norm and (32 or 288 or 2048) and (7 or 9)) "
    "or (tile_by_tile and (2-65-3 or 1-577-2)) or (within_windows and (49-4-3-3 or 33-1-1-3 or 144-4-1-3)) "
    "or (hybrid and (1-64-56 or 1-512-28 or 3-2048-7)) or (other_shapes and (2-49-64 or 1-257-1280)) or planes",
    "As pytest's -k.",
)
_FEW = (
    "(test_attention_over and (1-17-3 or 2-50-12)) or (test_norm and to_int8 and (288 or 32) and 7 and fp16) "
    "or (hybrid and (1-64-56 or 1-512-28))"
)
_SECONDS = flags.DEFINE_float("seconds", 150.0, "Time limit for one tool.")
_TOOL = "compute-sanitizer"
_KERNELS = "kernel_substring=vit"  # the namespace of ours, in their mangled names


def main(argv: Sequence[str]) -> None:
    """Runs the tools, one after the other."""
    del argv
    results = Results(_OUTPUT.value, first_paragraph(__doc__))
    gpu = _said(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    about = {"gpu": gpu, "compute_sanitizer": _said([_TOOL, "--version"])}
    for tool in _TOOLS.value:
        # What other kernels write counts as written only if they are watched, too: all of them, over a few tests.
        chosen, watched = (_FEW, []) if tool == "initcheck" else (_TESTS.value, ["--kernel-name", _KERNELS])
        files = ("tests/gpu/test_kernels_on_gpu.py", "tests/gpu/test_group_norm_on_gpu.py")
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files, "-k", chosen]
        command = [_TOOL, "--tool", tool, *watched, "--error-exitcode", "99", *tests]
        started = time.perf_counter()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=_SECONDS.value
            )
            text, status = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as e:
            text, status = (e.stdout or b"").decode() + (e.stderr or b"").decode(), None
        found = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*|\d+ passed.*|\d+ failed.*", text)
        tail = [] if status == 0 else text.strip().splitlines()[-15:]
        seconds = round(time.perf_counter() - started, 1)
        results.add(
            tool=tool, command=shlex.join(command), exit=status, said=found, tail=tail, seconds=seconds, **about
        )
        print(tool, status, found, *tail, sep="\n", flush=True)


def _said(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


if __name__ == "__main__":
    app.run(main)
