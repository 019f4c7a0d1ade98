"""Fuzzes the targets with atheris, each in a process of its own, and says what it found: python tests/fuzz/run.py
--seconds=60.

A finding does not end a run: its input and its traceback go to --findings, one of each place where an exception was
raised.
"""

import argparse
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Sequence
from typing import Any

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
CORPUS = HERE / "corpus"
_ADDRESS_SPACE = 4 << 30  # of a fuzzing process; what is mapped and never touched counts too
_LONGEST = 4096  # bytes of an input
ABOUT = (
    "Fuzzing with atheris of what reads foreign bytes; a finding is an exception that is no ConvertError, or more "
    "memory than 16 MiB and 64 bytes for each byte of the input. Edges and features are libFuzzer's, of the "
    "instrumented Python."
)
_PROGRESS = re.compile(r"#\d+\t.*? cov: (\d+) ft: (\d+)")


def fuzz(name: str, limits: Sequence[str], findings: pathlib.Path, corpus: pathlib.Path) -> None:
    """Fuzzes one target in this process, which ends with it."""
    sys.path[:0] = [str(ROOT), str(HERE)]
    import atheris

    with atheris.instrument_imports(include=["vit_convert", "zipfile", "csv", "json"]):
        import fuzz_targets

    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    target, seen = fuzz_targets.TARGETS[name], set()
    counts = {"executions": 0, "refused": 0, "peak_bytes": 0}
    findings.mkdir(parents=True, exist_ok=True)
    started = written = time.monotonic()

    def one(data: bytes) -> None:
        nonlocal written
        counts["executions"] += 1
        try:
            found = fuzz_targets.attempt(target, data)
            counts["refused"] += found.refused
            counts["peak_bytes"] = max(counts["peak_bytes"], found.peak_bytes)
        except Exception as e:
            place = _place(e)
            if place not in seen:
                seen.add(place)
                stem = findings / f"{name}-{len(seen):02d}"
                stem.with_suffix(".bin").write_bytes(data)
                stem.with_suffix(".txt").write_text(f"{place}\n\n{''.join(traceback.format_exception(e))}")
        if time.monotonic() > written + 1 or not counts["executions"] % 250:
            written = time.monotonic()
            record = {**counts, "seconds": round(written - started, 1), "findings": sorted(seen)}
            (findings / f"{name}.json").write_text(json.dumps(record, indent=1))

    tracemalloc.start()
    options = [*limits, f"-max_len={_LONGEST}", "-timeout=60", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *options, str(corpus), str(CORPUS / name)], one)
    atheris.Fuzz()


def _place(error: Exception) -> str:
    """The exception's type and the innermost line of this project that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if "vit_convert" in frame.filename] or frames
    return f"{type(error).__name__} in {pathlib.Path(frames[-1].filename).name}:{frames[-1].lineno}"


def supervise(name: str, limits: Sequence[str], findings: pathlib.Path) -> dict[str, Any]:
    """Runs one target in a child process, with a corpus that grows for the time of the run alone.

    Args:
        name: of TARGETS.
        limits: libFuzzer's options for how long it runs and from which seed.
        findings: the folder for what it finds.

    Returns:
        {"target", "seconds", "executions", "refused", "peak_bytes", "edges", "features", "findings"}.
    """
    with tempfile.TemporaryDirectory() as corpus:
        command = [
            sys.executable,
            __file__,
            f"--target={name}",
            f"--findings={findings}",
            f"--grow={corpus}",
            "--",
            *limits,
        ]
        # Sets in the order of their hashes would make two runs with one seed differ.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        found = subprocess.run(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, errors="replace", env=environment
        )
    (findings / f"{name}.log").write_text(found.stderr)
    progress = _PROGRESS.findall(found.stderr)
    path = findings / f"{name}.json"
    record = json.loads(path.read_text()) if path.exists() else {"findings": ["no execution"]}
    if found.returncode:
        record["findings"].append(f"exit {found.returncode}: {found.stderr.strip().splitlines()[-1]}")
    edges, features = (int(value) for value in progress[-1]) if progress else (None, None)
    return {"target": name, **record, "edges": edges, "features": features}


def summary(path: pathlib.Path) -> Any:
    """A result file of this run, with its hardware, versions and command."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from results import Results

    return Results(path, ABOUT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=int, default=5, help="of each target")
    parser.add_argument("--runs", type=int, default=-1, help="executions of each target at most; -1: as many as fit")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time; the same finds the same")
    parser.add_argument("--target", action="append", help="default: all of them")
    parser.add_argument("--findings", type=pathlib.Path, help="folder; default: a temporary one, which is kept")
    parser.add_argument(
        "--results", type=pathlib.Path, help="JSON file that gets a row for each target, as those of benchmarks/results"
    )
    parser.add_argument("--grow", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("limits", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    findings = arguments.findings or pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
    if arguments.grow:
        fuzz(arguments.target[0], arguments.limits, findings, arguments.grow)
    findings.mkdir(parents=True, exist_ok=True)
    results = summary(arguments.results) if arguments.results else None
    rows, limits = [], [f"-max_total_time={arguments.seconds}", f"-runs={arguments.runs}", f"-seed={arguments.seed}"]
    for name in arguments.target or sorted(path.name for path in CORPUS.iterdir()):
        rows.append(supervise(name, limits, findings))
        print(json.dumps(rows[-1]), flush=True)
        if results is not None:
            results.add(**rows[-1])
    return int(any(row["findings"] for row in rows))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONMALLOC", "default")
    sys.exit(main())
