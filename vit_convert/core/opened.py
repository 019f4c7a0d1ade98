"""A folder opened for a conversion: writable, locked, and cleared of what killed conversions left."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence

import ml_collections

from vit_convert.core.bundle import Bundle, utf8_path
from vit_convert.core.leftovers import remove_temporaries
from vit_convert.core.lock import hold
from vit_convert.core.pipeline import Context
from vit_convert.core.progress import Progress


@contextlib.contextmanager
def opened(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    command: Sequence[str],
    *,
    quiet: bool,
    checkpoints: Sequence[str | os.PathLike[str]] = ("checkpoints",),
) -> Iterator[Context]:
    """Holds the bundle `workdir/<config.name>` while the block works on it.

    Args:
        config: the full, checked config.
        workdir: where bundles lie.
        command: the command line shown to others who want the bundle; empty for this process's own.
        quiet: print nothing.
        checkpoints: folders to search for a checkpoint.

    Yields:
        What the stages share.

    Raises:
        UsageError: another command is using the folder, or it cannot be written.
    """
    bundle = Bundle(os.path.join(workdir, config.name))
    utf8_path(bundle.root.absolute())
    bundle.require_writable()
    words = list(command or sys.argv)
    line = shlex.join(words)
    with hold(bundle, line):
        remove_temporaries(bundle)
        progress = Progress(bundle.events, quiet=quiet)
        progress.event("command", argv=words, name=config.name)
        yield Context(config, bundle, progress, line, checkpoints)
