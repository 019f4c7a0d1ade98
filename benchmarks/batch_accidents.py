"""Batches with accidents: killed workers, parents and whole batches at random moments, and a zoo with broken files.

After each kill the same command continues; in the end every bundle must be right, no finished one made again, and no
process, lock or unfinished file left. The zoo's broken files must be named, and the others right.

    python benchmarks/batch_accidents.py --workdir=/tmp/batch_accidents --kills=50 --files=200
"""

import collections
import json
import pathlib
import random
import shlex
import shutil
import subprocess
import time
from typing import Any

from absl import app, flags
from batch_zoo import BREAKAGES, QUICK, Batch, can_mount, kill, wait_for, workers_of, write_table, write_zoo
from results import RESULTS, first_paragraph, hardware, today, versions

_FLAGS = flags.FlagValues()  # its own: tests import this beside other scripts
_WORKDIR = flags.DEFINE_string("workdir", None, "Scratch folder.", required=True, flag_values=_FLAGS)
_KILLS = flags.DEFINE_integer("kills", 50, "Kills at random moments.", flag_values=_FLAGS)
_FILES = flags.DEFINE_integer("files", 200, "Files of the zoo, of which a tenth is broken.", flag_values=_FLAGS)
_BATCH = flags.DEFINE_integer("batch", 12, "Files of a batch that is killed.", flag_values=_FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the moments.", flag_values=_FLAGS)
_OUTPUT = flags.DEFINE_string(
    "output", "", "Result file; by default benchmarks/results/zoo-accidents-<date>.json.", flag_values=_FLAGS
)

WHOM = ("worker", "parent", "everything")
GRAPHS = ("model.onnx", "model.onnx.data", "reference.npz", "config.json", "signature.json")


class Right:
    """The results of an undisturbed batch, for comparison; and runs of the same files with kills.

    Args:
        folder: for everything.
        count: how many files.
        jobs: workers at a time.
    """

    def __init__(self, folder: pathlib.Path, count: int, jobs: int = 2):
        self.folder, self.words = folder, [f"--checkpoints={folder / 'zoo'}", *QUICK, f"--jobs={jobs}", "--quiet"]
        self.names = [path.stem for path in write_zoo(folder / "zoo", count)]
        self.unharmed = Batch(self.words, folder / "unharmed")
        started = time.monotonic()
        code, said = self.unharmed.run()
        assert code == 0, said
        self.seconds = time.monotonic() - started

    def wrong_files(self, batch: Batch) -> list[str]:
        """Files of a batch that differ from those of the unharmed one."""
        pairs = [
            (batch.workdir / name / file, self.unharmed.workdir / name / file) for name in self.names for file in GRAPHS
        ]
        return [str(ours) for ours, theirs in pairs if not ours.exists() or ours.read_bytes() != theirs.read_bytes()]

    def killed(self, batch: Batch, whom: str, moment: float) -> dict[str, Any]:
        """Kills a batch at one moment, lets the rest end, and inspects the result.

        Args:
            batch: perhaps half done by earlier runs.
            whom: one of WHOM.
            moment: seconds from its start.

        Returns:
            What happened; "wrong" lists what should not have.
        """
        before, process = batch.finished(), batch.start()
        time.sleep(moment)
        workers = kill(process, whom)
        said, _ = process.communicate()
        row: dict[str, Any] = {"whom": whom, "seconds": round(moment, 2), "exit": process.returncode, "wrong": []}
        if not wait_for(lambda: not workers_of(process.pid), 5.0):
            row["wrong"].append(f"orphans {workers_of(process.pid)} of {workers}")
        expected = {0} if whom == "worker" else {-9, 0}
        if process.returncode not in expected:
            row["wrong"].append(f"exit {process.returncode}: {said[-500:]}")
        now = batch.finished()
        row["finished"] = len(now)
        row["wrong"] += [f"{name} was made again" for name in before if now.get(name) != before[name]]
        return row

    def whole(self, batch: Batch) -> list[str]:
        """Runs a batch that was killed to its end; returns what is wrong then."""
        before = batch.finished()
        code, said = batch.run()
        now = batch.finished()
        wrong = [] if code == 0 else [f"exit {code}: {said[-500:]}"]
        wrong += [f"{name} was made again" for name in before if now.get(name) != before[name]]
        wrong += [f"{name} is not finished" for name in self.names if name not in now]
        wrong += [f"left behind: {path}" for path in batch.left_behind()]
        return wrong + [f"differs: {path}" for path in self.wrong_files(batch)]


def kills(folder: pathlib.Path, count: int, files: int, seed: int) -> list[dict[str, Any]]:
    """Kills batches at random moments; a batch is killed several times until it is whole, and then a new one begins."""
    chance, right, rows = random.Random(seed), Right(folder, files), []
    number = 0
    while len(rows) < count:
        batch = Batch(right.words, folder / f"killed{number}")
        for _ in range(chance.randint(1, 4)):
            rows.append(right.killed(batch, chance.choice(WHOM), chance.uniform(0.2, right.seconds)))
            if len(rows) == count:
                break
        rows[-1]["wrong"] += right.whole(batch)
        print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(batch.workdir)
        number += 1
    return rows


def broken_zoo(folder: pathlib.Path, count: int) -> dict[str, Any]:
    """Converts a zoo of which a tenth is broken, in every way in turn."""
    ways = [way for way in BREAKAGES if way.name != "full disk" or can_mount()]
    paths, workdir = write_zoo(folder / "zoo", count), folder / "out"
    (folder / "table").mkdir()
    broken = {i: ways[i // 10 % len(ways)] for i in range(0, count, 10)}
    batch = Batch([f"--table={folder / 'table' / 'jobs.jsonl'}", *QUICK, "--quiet"], workdir)
    try:
        write_table(folder / "table" / "jobs.jsonl", paths, workdir, broken)
        code, said = batch.run()
    finally:
        for i, way in broken.items():
            if way.name == "full disk":
                subprocess.run(["umount", str(workdir / paths[i].stem)], check=False)
    wrong = [] if code == 9 else [f"exit {code}: {said[-500:]}"]
    for i, (path, job) in enumerate(zip(paths, batch.jobs().values())):
        expected = ("failed", broken[i].exit_code) if i in broken else ("done", 0)
        if (job["status"], job["exit_code"]) != expected or (i in broken and not job["error"]):
            wrong.append(f"{path.stem} ({broken[i].name if i in broken else 'whole'}): {job['status']}, {job['error']}")
    done = collections.Counter(job["status"] for job in batch.jobs().values())
    return {"files": count, "ways": [way.name for way in ways], "statuses": dict(done), "exit": code, "wrong": wrong}


def _given() -> list[str]:
    return [f"--kills={_KILLS.value}", f"--files={_FILES.value}", f"--batch={_BATCH.value}", f"--seed={_SEED.value}"]


def main(argv: list[str]) -> int:
    """Runs both, and writes the result; returns 1 if anything was wrong."""
    folder = pathlib.Path(_WORKDIR.value)
    zoo = broken_zoo(folder / "broken", _FILES.value)
    print(json.dumps(zoo), flush=True)
    rows = kills(folder / "kills", _KILLS.value, _BATCH.value, _SEED.value) if _KILLS.value else []
    wrong = [row for row in rows if row["wrong"]]
    about = {
        "what": first_paragraph(__doc__),
        "date": today(),
        "command": shlex.join(["python", "benchmarks/batch_accidents.py", *argv[1:], *_given()]),
        "hardware": hardware(),
        "versions": versions(),
        "zoo": zoo,
        "kills": dict(collections.Counter(row["whom"] for row in rows)),
        "files_of_a_killed_batch": _BATCH.value,
        "wrong": wrong,
        "rows": rows,
    }
    output = pathlib.Path(_OUTPUT.value or RESULTS / f"zoo-accidents-{today()}.json")
    output.write_text(json.dumps(about, indent=1) + "\n")
    print(f"{len(rows)} kills, {len(wrong)} wrong; {output}")
    return int(bool(wrong or zoo["wrong"]))


if __name__ == "__main__":
    flags.FLAGS.append_flag_values(_FLAGS)
    flags.mark_flag_as_required("workdir")
    _FLAGS.mark_as_parsed()  # by app.run, which knows them now
    app.run(main)
