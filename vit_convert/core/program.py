"""What the command lines of all our programs share: flags, `--config.key=value`, --help, and exit codes."""

import inspect
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from vit_convert.core import config as configs
from vit_convert.core.command import exit_code
from vit_convert.core.errors import UsageError

_HELP = {"--help", "-h", "--helpfull", "--helpshort"}
_ABSL = {"help", "helpfull", "helpshort", "helpxml"}


class Program:
    """A program's command line.

    Args:
        doc: the module's docstring, shown first by --help.
        when_interrupted: what to say after Ctrl-C or SIGTERM.
        takes_config: whether it accepts `--config.key=value`; --help then lists the keys.

    Attributes:
        flags: the program's own, separate from those of other programs; `flags.DEFINE_string(...,
            flag_values=program.flags)` adds one.
    """

    def __init__(self, doc: str | None, *, when_interrupted: str, takes_config: bool = False):
        self._doc, self._when_interrupted, self._takes_config = (doc or "").rstrip(), when_interrupted, takes_config
        self.flags = flags.FlagValues()
        flags.DEFINE_bool("debug", False, "Also show tracebacks of user errors.", flag_values=self.flags)

    def main(self, argv: Sequence[str], run: Callable[[Sequence[str]], int], *, needs_words: bool = True) -> int:
        """Runs the program.

        Args:
            argv: the command line, the program's name first.
            run: the program itself; takes the same argument.
            needs_words: whether an empty command line is a mistake, answered with the text of --help.

        Returns:
            The exit code.
        """

        def answer() -> int:
            if _HELP & set(argv[1:]) or (needs_words and len(argv) == 1):
                print(self.help())
                return 0 if len(argv) > 1 else UsageError.exit_code
            return run(argv)

        return exit_code(answer, debug="--debug" in argv, when_interrupted=self._when_interrupted)

    def parse(self, words: Sequence[str]) -> list[str]:
        """Parses flags into `flags`, forgetting those of an earlier command line.

        Args:
            words: without the program's name and without `--config.key=value` words, see `overrides.split_overrides`.

        Returns:
            The words that are not flags.

        Raises:
            UsageError: an unknown flag or a bad value.
        """
        self.flags.unparse_flags()
        try:
            rest = self.flags(["", *words])[1:]
        except flags.Error as e:
            raise UsageError(str(e), fix="Flags are written --flag=value; --help lists them.") from e
        for name in self.flags:
            value = self.flags[name].value
            # absl's bounds let NaN through: no comparison with it is true
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"flag --{name}={value}: must be a finite number")
        return rest

    def help(self) -> str:
        """The text of --help: usage, flags and, where it takes them, every config key with its default."""
        names = [name for name in _in_order(self.flags) if name not in _ABSL]
        rows = [f"  --{name}={_shown(self.flags[name].default)}\n      {self.flags[name].help}" for name in names]
        lines = [self._doc, "", "Flags:", *rows]
        if self._takes_config:
            lines += ["", "Config keys and defaults:", textwrap.indent("\n".join(_config_keys()), "  ")]
        return "\n".join(lines)


def _in_order(values: flags.FlagValues) -> list[str]:
    """Flags in the order of their definition; --debug, which every program has, last."""
    return sorted(values, key=lambda name: name == "debug")


def _shown(default: Any) -> str:
    return ",".join(default) if isinstance(default, list) else str(default)


def _config_keys() -> list[str]:
    lines = inspect.getsource(configs.default_config).splitlines()
    keys = [line.strip() for line in lines if line.strip().startswith("config.") and "Config()" not in line]
    return [re.sub(r"config\.(\w+) = tower_keys\(.*?\)", r"config.\1.KEY = …", key) for key in keys]
