"""Converts a Flax/JAX vision transformer to TensorRT engines and proves the numbers at every step.

  python -m vit_convert --config vit_b32.py --workdir=OUT

A config is a Python file with get_config(); a bare name is looked up here and in configs/. Any key can be set on the
command line as --config.key=value. Everything is written to <workdir>/<name>/, and a rerun redoes only what changed.

Exit codes: 0 done, 2 usage or config, 3 checkpoint, 4 export or an own model, 5 a numeric check failed, 6 calibration or evaluation images,
7 an engine is not built or does not load, 8 an engine does not run, 130 interrupted (run again to continue).
"""

import gc
import importlib.machinery
import inspect
import os
import pathlib
import re
import sys
import textwrap
import types
from collections.abc import Sequence
from typing import Any

from absl import flags

from vit_convert.core import config as configs
from vit_convert.core.command import exit_code
from vit_convert.core.errors import INTERRUPTED, ConvertError, UsageError, nearest
from vit_convert.core.overrides import apply_overrides, dotted_keys, split_overrides
from vit_convert.core.user_code import explain, where

_FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "out", "Folder that gets one sub-folder per conversion.", flag_values=_FLAGS)
flags.DEFINE_string(
    "until",
    "",
    "Last stage to run: checkpoint, images, export, reference, check, calibrate, sensitivity, plan, quantize, build, verify or benchmark.",
    flag_values=_FLAGS,
)
flags.DEFINE_multi_string(
    "checkpoints",
    [],
    "Folder in which checkpoints are looked for before checkpoints/, and to which they are fetched; may be repeated.",
    flag_values=_FLAGS,
)
flags.DEFINE_bool("force", False, "Redo stages that are fresh.", flag_values=_FLAGS)
flags.DEFINE_bool("quiet", False, "Print nothing but errors.", flag_values=_FLAGS)
flags.DEFINE_bool("debug", False, "Show tracebacks of users' mistakes as well.", flag_values=_FLAGS)


def main(argv: Sequence[str]) -> int:
    """Runs the command line.

    Args:
        argv: arguments, the program's name first.

    Returns:
        The exit code.
    """
    kept = "finished stages are kept, the same command continues"
    return exit_code(lambda: _run(argv), debug="--debug" in argv, when_interrupted=kept)


def _run(argv: Sequence[str]) -> int:
    if len(argv) == 1 or {"--help", "-h", "--helpfull", "--helpshort"} & set(argv[1:]):
        print(help_text())
        return 0 if len(argv) > 1 else UsageError.exit_code
    config, rest = parse_config(argv)
    flags_of(rest)
    from vit_convert.convert import convert

    convert(
        config,
        _FLAGS.workdir,
        until=_FLAGS.until,
        force=_FLAGS.force,
        quiet=_FLAGS.quiet,
        command=["python", "-m", "vit_convert", *argv[1:]],
        checkpoints=_checkpoint_folders(),
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
        The full, locked, checked config, and the arguments that are left.

    Raises:
        UsageError: no config, an unreadable one, an unknown key or a bad value.
    """
    path, others = "", []
    words = iter(argv[1:])
    for word in words:
        if match := re.fullmatch(r"--?config=(.*)", word):
            path = match[1]
        elif re.fullmatch(r"--?config", word):
            path = next(words, "")
        else:
            others.append(word)
    if not path:
        raise UsageError("no --config given", fix="For example --config vit_b32.py; --help tells more.")
    found = configs.find_config(path)
    config = configs.complete(_load_config(found), pathlib.Path(found).stem, check=False)
    overrides, rest = split_overrides(others, config)
    result = apply_overrides(config, overrides)
    configs.check_values(result)
    return result, [argv[0], *rest]


def _load_config(path: str) -> Any:
    loader = importlib.machinery.SourceFileLoader("vit_convert_user_config", path)  # a config is Python, whatever its file is called
    module = types.ModuleType(loader.name)
    module.__file__ = path
    try:
        loader.exec_module(module)
        return module.get_config()
    except ConvertError:
        raise
    except (Exception, SystemExit) as e:
        missing = " PYTHONPATH names folders to import from." if isinstance(e, ImportError) else ""
        raise UsageError(f"{path}: {_explain(e)}", fix=f"--debug shows the whole traceback.{missing}") from e


def _explain(e: BaseException) -> str:
    """The error in one line; for an unknown key of a locked config, the nearest valid ones."""
    if match := re.match(r'(?:\'|")?Key "?(\w+)"? does not exist', str(e)):
        return (
            f"unknown key {match[1]!r}.{nearest(match[1], [key.split('.')[-1] for key in dotted_keys(configs.default_config())])}{where(e)}"
        )
    return explain(e)


def flags_of(argv: Sequence[str]) -> None:
    """Parses what is not config.

    Raises:
        UsageError: an unknown flag or a bad value.
    """
    _FLAGS.unparse_flags()
    try:
        left = _FLAGS(list(argv))
    except flags.Error as e:
        raise UsageError(str(e)) from e
    if len(left) > 1:
        raise UsageError(f"unexpected argument {left[1]!r}", fix="Flags are written --flag=value; --help lists them.")


def help_text() -> str:
    """The text of --help: usage, flags, and every config key with its default, read from `default_config` itself."""
    lines = inspect.getsource(configs.default_config).splitlines()
    keys = [line.strip() for line in lines if line.strip().startswith("config.") and "ConfigDict()" not in line]
    return "\n".join(
        [
            (__doc__ or "").rstrip(),
            "",
            "Flags:",
            _flag_lines(),
            "",
            "Config keys and defaults:",
            textwrap.indent("\n".join(keys), "  "),
        ]
    )


def _flag_lines() -> str:
    rows = (_FLAGS[name] for name in ("workdir", "checkpoints", "until", "force", "quiet", "debug"))
    return "\n".join(f"  --{flag.name}={flag.default!r}\n      {flag.help}" for flag in rows)


def run() -> None:
    """Entry point of the installed command."""
    gc.set_threshold(50_000)  # what JAX and ONNX load stays: looking through it for cycles took a quarter of the imports' time
    code = main(sys.argv)
    gc.freeze()  # and at the exit half a second
    if code == INTERRUPTED:
        # Python remembers an interrupt that passed through exec() of a string, as imports do, and would end itself by the signal.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
