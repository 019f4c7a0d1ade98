"""What people see (bars, messages) and what machines read (events.jsonl)."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Advance = Callable[[float], None]


class Progress:
    """Reports one conversion twice: to the terminal and to a file of JSON lines.

    Args:
        events: path of the `events.jsonl` to append to; None keeps no file.
        quiet: print nothing.
    """

    def __init__(self, events: str | os.PathLike[str] | None = None, *, quiet: bool = False):
        self._events = events
        self._quiet = quiet
        self._torn = False

    def event(self, kind: str, **fields: Any) -> None:
        """Appends one line `{"time": unix seconds, "event": kind, ...}`; a full disk loses it, but does not fail the
        conversion."""
        if self._events is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **fields}, default=str) + "\n"
        try:
            with open(self._events, "ab", buffering=0) as f:
                data = f"{chr(10) if self._torn else ''}{line}".encode()
                self._torn = True
                self._torn = f.write(data) != len(data)
        except OSError:
            pass

    def say(self, text: str) -> None:
        """Prints one line to stderr and records it."""
        self.event("message", text=text)
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Prints one warning to stderr and records it."""
        self.event("warning", text=text)
        if not self._quiet:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def bar(self, label: str, total: float | None = None) -> Iterator[Advance]:
        """Shows a progress bar while the block runs.

        Args:
            label: a few words about what is being done.
            total: the amount of work; None if unknown.

        Yields:
            A function that advances the bar by the amount given.
        """
        try:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars
        except ImportError:  # the GPU host may have only numpy and TensorRT
            yield lambda amount: None
            return
        console = Console(stderr=True)
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            *([] if total is None else [TextColumn("{task.percentage:>3.0f}%")]),
            TimeElapsedColumn(),
            *([] if total is None else [TimeRemainingColumn()]),
        )
        with Bars(*columns, console=console, transient=True, disable=self._quiet or not console.is_terminal) as bars:
            task = bars.add_task(label, total=total)
            yield lambda amount: bars.update(task, advance=amount)


def human_seconds(seconds: float) -> str:
    """ "0.4 s", "12 s", "3 min 20 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def human_bytes(count: float) -> str:
    """ "812 B", "3.1 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
