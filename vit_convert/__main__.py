"""Converts a Flax/JAX vision transformer to TensorRT engines and proves the numbers at every step.

  python -m vit_convert --config vit_b32.py --workdir=OUT

A config is a Python file with get_config(); a bare name is looked up here and in configs/. Any key can be set on the
command line as --config.key=value. Everything is written to <workdir>/<name>/, and a rerun redoes only what changed.

Exit codes: 0 done, 2 usage or config, 3 checkpoint, 4 export or your own model, 5 a numeric check failed, 6 calibration
or evaluation images, 7 an engine is not built or does not load, 8 an engine does not run, 130 interrupted (run again to
continue).
"""

import gc
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from vit_convert.core import config as configs
from vit_convert.core.config_files import find_config, load_config, split_argument, split_config
from vit_convert.core.errors import INTERRUPTED, UsageError
from vit_convert.core.overrides import apply_overrides, split_overrides
from vit_convert.core.program import Program
from vit_convert.stages import stages

_STAGES = [stage.name for stage in stages()]
_PROGRAM = Program(__doc__, when_interrupted="finished stages are kept, the same command continues", takes_config=True)
_FLAGS = _PROGRAM.flags
flags.DEFINE_string("workdir", "out", "Folder in which each conversion gets a sub-folder.", flag_values=_FLAGS)
flags.DEFINE_multi_string(
    "checkpoints",
    [],
    "Folder searched for checkpoints before checkpoints/, and into which they are downloaded; may be repeated.",
    flag_values=_FLAGS,
)
flags.DEFINE_string("until", "", f"Last stage to run: {', '.join(_STAGES[:-1])} or {_STAGES[-1]}.", flag_values=_FLAGS)
flags.DEFINE_bool("force", False, "Redo stages that are fresh.", flag_values=_FLAGS)
flags.DEFINE_bool(
    "page", True, "Also write report.html, if matplotlib and jinja2 are installed; takes a second or two.",
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
    config, rest = parse_config(argv)
    if left := _PROGRAM.parse(rest[1:]):
        raise UsageError(f"unexpected argument {left[0]!r}", fix="Flags are written --flag=value; --help lists them.")
    from vit_convert.convert import convert

    convert(
        config,
        _FLAGS.workdir,
        until=_FLAGS.until,
        force=_FLAGS.force,
        quiet=_FLAGS.quiet,
        command=["python", "-m", "vit_convert", *argv[1:]],
        checkpoints=_checkpoint_folders(),
        page=_FLAGS.page,
    )
    return 0


def _checkpoint_folders() -> list[str]:
    words = (word for value in _FLAGS.checkpoints for word in ([value] if os.path.isdir(value) else value.split(",")))
    return [word for word in words if word]


def parse_config(argv: Sequence[str]) -> tuple[Any, list[str]]:
    """Loads the config file named on the command line and applies its `--config.key=value` overrides.

    Args:
        argv: arguments, the program's name first.

    Returns:
        The full, locked, checked config, and the remaining arguments.

    Raises:
        UsageError: the config is missing or unreadable, a key is unknown, or a value is bad.
    """
    path, others = split_config(argv[1:])
    if not path:
        raise UsageError("no --config given", fix="For example --config vit_b32.py; see --help.")
    path, argument = split_argument(path)
    found = find_config(path)
    name = pathlib.Path(found).stem + (re.sub(r"[^\w.+-]+", "_", f"_{argument}") if argument else "")
    config = configs.complete(load_config(found, argument), name, check=False)
    overrides, rest = split_overrides(others, config)
    result = apply_overrides(config, overrides)
    configs.check_values(result)
    return result, [argv[0], *rest]


def run() -> None:
    """Entry point of the installed command."""
    # What JAX and ONNX load is never freed; searching it for reference cycles took a quarter of the import time,
    gc.set_threshold(50_000)
    code = main(sys.argv)
    gc.freeze()  # and half a second at exit.
    if code == INTERRUPTED:
        # Python remembers an interrupt that passed through exec() of a string, as in imports, and would kill itself
        # with the signal.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
