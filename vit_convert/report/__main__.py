"""Writes a report that people read: one HTML file without scripts, from report.json alone.

  python -m vit_convert.report BUNDLE [BUNDLE ...] [--output=FILE]
  python -m vit_convert.report WORKDIR [--output=FILE]

Each BUNDLE is a folder that `python -m vit_convert` wrote, also one of two towers, or its report.json. One bundle's
page goes into it as report.html; the page that compares several goes to --output. WORKDIR is that of a batch, or its
batch.json: the page of the whole zoo goes beside it as batch.html. Needs matplotlib and jinja2: the extra `report`.

Exit codes: 0 done, 2 usage, or a report that cannot be read.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from vit_convert.core.errors import UsageError
from vit_convert.core.program import Program

_PROGRAM = Program(__doc__, when_interrupted="no page was written")
_FLAGS = _PROGRAM.flags
flags.DEFINE_string(
    "output", "", "The page; empty: report.html in the bundle, or batch.html in the workdir.", flag_values=_FLAGS
)


def main(argv: Sequence[str]) -> int:
    """Runs the command line.

    Args:
        argv: arguments, the program's name first.

    Returns:
        The exit code.
    """
    return _PROGRAM.main(argv, _run)


def _run(argv: Sequence[str]) -> int:
    from vit_convert.report.page import read_subject, write_page
    from vit_convert.report.zoo import is_batch, read_batch, write_zoo_page

    paths = _PROGRAM.parse(argv[1:])
    if not paths:
        raise UsageError("no bundle is given", fix="--help tells more.")
    if len(paths) > 1 and not _FLAGS.output:
        raise UsageError(f"{len(paths)} bundles: the place for their page is not given", fix="Give --output=FILE.")
    first = pathlib.Path(paths[0])
    if len(paths) == 1 and is_batch(first):
        output = pathlib.Path(_FLAGS.output or (first / "batch.html" if first.is_dir() else first.with_suffix(".html")))
        write_zoo_page(output, read_batch(first), title=(first if first.is_dir() else first.parent).resolve().name)
        print(output)
        return 0
    subject = read_subject(paths)
    output = (
        pathlib.Path(_FLAGS.output) if _FLAGS.output else (first if first.is_dir() else first.parent) / "report.html"
    )
    write_page(output, subject)
    print(output)
    return 0


def run() -> None:
    """Entry point of the module."""
    sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()
