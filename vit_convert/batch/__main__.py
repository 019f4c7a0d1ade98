"""Converts many checkpoints with one command, which continues where it stopped.

  python -m vit_convert.batch --checkpoints='zoo/*.npz' --config.precision=fp16,int8 --workdir=out

Each conversion gives what `python -m vit_convert` makes from the same checkpoint and config, in a folder of its own in
the workdir; batch.json there records how each one ended. When the command is repeated, it skips finished jobs within
milliseconds and does the rest.

Exit codes: 0 done, 2 usage or config, 9 some conversions failed, 130 interrupted (run again to continue).
"""

import dataclasses
import functools
import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from vit_convert.core.config import default_config
from vit_convert.core.config_files import split_config
from vit_convert.core.errors import UsageError, nearest
from vit_convert.core.overrides import split_overrides
from vit_convert.core.program import Program

if TYPE_CHECKING:
    from vit_convert.batch.engines import EngineSettings

_PROGRAM = Program(__doc__, when_interrupted="finished jobs are kept, the same command continues", takes_config=True)
_FLAGS = _PROGRAM.flags
flags.DEFINE_multi_string(
    "checkpoints",
    [],
    "What to convert: files, globs, folders, addresses, or .txt files with one per line; repeatable, or "
    "comma-separated.",
    flag_values=_FLAGS,
)
flags.DEFINE_string(
    "table",
    "",
    "What to convert: a .csv or .jsonl with name, checkpoint and config keys, or AugReg's index.csv.",
    flag_values=_FLAGS,
)
flags.DEFINE_string(
    "where", "", "Rows of the table to use: \"ds=='i1k' and adapt_resolution==384\".", flag_values=_FLAGS
)
flags.DEFINE_string("column", "", "Column of the table that holds the checkpoint.", flag_values=_FLAGS)
flags.DEFINE_string(
    "jobs_file",
    "",
    "What to convert: a Python file whose get_jobs() returns a list of {key: value}.",
    flag_values=_FLAGS,
)
flags.DEFINE_multi_string(
    "sweep",
    [],
    "Convert all in several settings: config.precision=fp16,int8; ';' separates values that contain commas; "
    "repeatable.",
    flag_values=_FLAGS,
)
flags.DEFINE_string(
    "workdir",
    "out",
    "Folder in which each conversion gets a sub-folder, with batch.json; also gs:// or s3://.",
    flag_values=_FLAGS,
)
flags.DEFINE_string(
    "scratch", "", "Folder for unfinished bundles of a remote workdir; empty: one of the system's.", flag_values=_FLAGS
)
flags.DEFINE_multi_string(
    "checkpoint_folders",
    [],
    "Folder searched for checkpoints before checkpoints/, and into which they are downloaded; may be repeated.",
    flag_values=_FLAGS,
)
flags.DEFINE_string(
    "shard", "", "i/n: the i-th of n parts of the jobs, for n commands on n machines.", flag_values=_FLAGS
)
flags.DEFINE_integer(
    "jobs",
    0,
    "Concurrent conversions; 0: one per core, of this machine or of the cluster.",
    flag_values=_FLAGS,
    lower_bound=0,
)
flags.DEFINE_float(
    "memory_gib", 0.0, "Memory for all of them; 0: the machine's free memory.", flag_values=_FLAGS, lower_bound=0.0
)
flags.DEFINE_integer(
    "retries",
    2,
    "Further attempts after failures that may be temporary: a killed process, a network error.",
    flag_values=_FLAGS,
    lower_bound=0,
)
flags.DEFINE_float(
    "timeout", 0.0, "Seconds that one conversion may take; 0: no limit.", flag_values=_FLAGS, lower_bound=0.0
)
flags.DEFINE_list(
    "engines",
    [],
    "What to do with each bundle on a GPU, in separate tasks: build,verify,benchmark; empty: nothing.",
    flag_values=_FLAGS,
)
flags.DEFINE_list(
    "gpus", [], "GPUs of this machine for --engines: 0,1, or 0:L4 with its type; empty: all.", flag_values=_FLAGS
)
flags.DEFINE_string(
    "trt_python", sys.executable, "The Python with TensorRT for --engines, on every GPU node.", flag_values=_FLAGS
)
flags.DEFINE_string(
    "engine_flags",
    "",
    "Further flags for `python -m vit_convert.engine`: '--precision=fp16 --duration=0.5'.",
    flag_values=_FLAGS,
)
flags.DEFINE_bool("fail_fast", False, "Start nothing more after a failure.", flag_values=_FLAGS)
flags.DEFINE_string("until", "", "Last stage to run, as in a single conversion.", flag_values=_FLAGS)
flags.DEFINE_bool("force", False, "Redo stages that are fresh.", flag_values=_FLAGS)
flags.DEFINE_bool("only_failed", False, "Run only the jobs that failed last time.", flag_values=_FLAGS)
flags.DEFINE_enum("runner", "local", ["local", "ray"], "Where conversions run.", flag_values=_FLAGS)
flags.DEFINE_string("ray_address", "auto", "The Ray cluster; auto: the one of this machine.", flag_values=_FLAGS)
flags.DEFINE_bool(
    "dry_run", False, "Print the jobs with their estimated time and memory, and do nothing.", flag_values=_FLAGS
)
flags.DEFINE_bool(
    "page", True, "Write report.html of each bundle, and batch.html at the end.",
    flag_values=_FLAGS,
)  # fmt: skip
flags.DEFINE_bool("quiet", False, "Print only errors.", flag_values=_FLAGS)


def main(argv: Sequence[str]) -> int:
    """Runs the command line.

    Args:
        argv: arguments, the program's name first.

    Returns:
        The exit code.
    """
    return _PROGRAM.main(argv, _run)


def _run(argv: Sequence[str]) -> int:
    config, others = split_config(argv[1:])
    overrides, rest = split_overrides(others, default_config())
    if left := _PROGRAM.parse(rest):
        raise UsageError(
            f"unexpected argument {left[0]!r}",
            fix="Flags are written --flag=value; globs in quotes; --help lists them.",
        )
    from vit_convert.batch.batch import run_batch
    from vit_convert.batch.collect import Asked, collect
    from vit_convert.batch.devices import local_devices
    from vit_convert.batch.estimate import estimate
    from vit_convert.batch.job import shard_of
    from vit_convert.batch.local import Limits
    from vit_convert.batch.machine import free_memory_gib
    from vit_convert.batch.run import Settings
    from vit_convert.batch.screen import dry_table
    from vit_convert.core.host import num_cores
    from vit_convert.stages import require_stage

    require_stage(_FLAGS.until)
    shard, engines = _shard(_FLAGS.shard), _engines()
    if engines.commands and not any(word.startswith("--config.engine.backend=") for word in overrides):
        overrides = ["--config.engine.backend=none", *overrides]  # a task does what a conversion would do itself
    asked = Asked(
        config, overrides, _FLAGS.checkpoints, _FLAGS.table, _FLAGS.where, _FLAGS.column, _FLAGS.jobs_file, _FLAGS.sweep
    )
    jobs = [job for job in collect(asked) if not shard or shard_of(job.name, shard[1]) == shard[0]]
    workdir, remote = _places()
    engines = dataclasses.replace(engines, remote=remote)
    folders = tuple(_FLAGS.checkpoint_folders)
    settings = Settings(workdir, folders, _FLAGS.until, _FLAGS.force, engines, remote, _FLAGS.page)
    gpus = local_devices(_FLAGS.gpus) if engines.commands and _FLAGS.runner == "local" and not _FLAGS.dry_run else []
    limits = Limits(
        _FLAGS.jobs or (num_cores() if _FLAGS.runner == "local" else 0),
        _FLAGS.memory_gib or free_memory_gib(),
        _FLAGS.retries,
        _FLAGS.timeout,
        _FLAGS.fail_fast,
        tuple(gpus),
    )
    if _FLAGS.dry_run:
        print(dry_table(jobs, {job.name: estimate(job, settings.folders) for job in jobs}, limits.jobs or num_cores()))
        return 0
    run_batch(
        jobs,
        settings,
        limits,
        shard=shard,
        only_failed=_FLAGS.only_failed,
        runner=_runner(),
        quiet=_FLAGS.quiet,
        command=["python", "-m", "vit_convert.batch", *argv[1:]],
    )
    return 0


def _places() -> tuple[str, str]:
    """Where conversions work, and where bundles go from there; "" if they stay."""
    from vit_convert.batch.remote import is_remote, remote_at

    if not is_remote(_FLAGS.workdir):
        return _FLAGS.workdir, ""
    address = remote_at(_FLAGS.workdir).address
    name = f"vit_convert-{hashlib.sha256(address.encode()).hexdigest()[:12]}"
    return _FLAGS.scratch or os.path.join(tempfile.gettempdir(), name), address


def _engines() -> "EngineSettings":
    from vit_convert.batch.engines import COMMANDS, EngineSettings

    if wrong := [word for word in _FLAGS.engines if word not in COMMANDS]:
        raise UsageError(f"--engines: {wrong[0]!r} is none of {', '.join(COMMANDS)}.{nearest(wrong[0], COMMANDS)}")
    if (_FLAGS.gpus or _FLAGS.engine_flags) and not _FLAGS.engines:
        raise UsageError("--gpus and --engine_flags belong to --engines", fix="--engines=build,verify,benchmark")
    if _FLAGS.engines and _FLAGS.until:
        raise UsageError(f"--until={_FLAGS.until} and --engines: engines follow on whole conversions", fix="Give one.")
    if _FLAGS.engines and _FLAGS.runner == "local" and shutil.which(_FLAGS.trt_python) is None:
        raise UsageError(f"--trt_python={_FLAGS.trt_python}: no such program", fix="The Python that has TensorRT.")
    commands = tuple(command for command in COMMANDS if command in _FLAGS.engines)
    try:
        words = tuple(shlex.split(_FLAGS.engine_flags))
    except ValueError as e:
        raise UsageError(f"--engine_flags={_FLAGS.engine_flags}: {e}") from e
    return EngineSettings(commands, _FLAGS.trt_python, words, _FLAGS.force, _FLAGS.timeout)


def _runner() -> Callable[..., Any]:
    from vit_convert.batch.local import LocalRunner

    if _FLAGS.runner == "local":
        return LocalRunner
    from vit_convert.batch.cluster import RayRunner

    return functools.partial(RayRunner, address=_FLAGS.ray_address)


def _shard(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard={text}: expected i/n with i from 1 to n", fix="For example --shard=3/10.")
    return int(match[1]), int(match[2])


def run() -> None:
    """Entry point of the installed command."""
    sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()
