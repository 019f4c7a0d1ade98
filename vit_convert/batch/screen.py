"""What people see of a batch: a bar, a line for each worker, and a table at the end."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.batch.estimate import Estimate
from vit_convert.batch.job import Job
from vit_convert.batch.outcome import DONE, Outcome
from vit_convert.core.progress import human_seconds
from vit_convert.core.text_table import text_table

_SHOWN_ERRORS = 40
_SHOWN_WARNED = 8
_LONGEST = 160  # characters of an error in the table; batch.json has all of them


class Screen:
    """Shows progress on stderr: live on a terminal, otherwise a line for each finished job.

    Args:
        estimates: by job, for the time that is left.
        quiet: show nothing.
    """

    def __init__(self, estimates: Mapping[str, Estimate], *, quiet: bool):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._estimates, self._quiet, self._total, self._ended = estimates, quiet, len(estimates), 0
        console = Console(stderr=True)
        self._live = console.is_terminal and not quiet
        words, count = TextColumn("{task.description}"), TextColumn("{task.fields[count]}")
        columns = (words, BarColumn(), count, TimeElapsedColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=console, transient=True, disable=not self._live)
        total = sum(estimate.seconds for estimate in estimates.values())
        self._all = self._bars.add_task("jobs", total=total, count=self._count)
        self._lines: dict[int, Any] = {}

    @property
    def _count(self) -> str:
        return f"{self._ended}/{self._total}"

    def __enter__(self) -> "Screen":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def start(self, line: int | None, job: Job) -> None:
        """The worker on this line starts a job; None if workers are elsewhere."""
        if line is None:
            return
        if line not in self._lines:
            self._lines[line] = self._bars.add_task("", total=None, count="")
        self._bars.reset(self._lines[line], description=f"  {line + 1}  {job.name}", total=None)

    def rest(self, line: int | None) -> None:
        """A worker is idle."""
        if line in self._lines:
            self._bars.update(self._lines[line], description=f"  {line + 1}" if line is not None else "")

    def end(self, line: int | None, outcome: Outcome) -> None:
        """A job ended; `line` is None if no worker ran it."""
        self._ended += 1
        self._bars.update(self._all, advance=self._estimates[outcome.name].seconds, count=self._count)
        self.rest(line)
        if outcome.failed:
            self.say(f"{outcome.name}: {outcome.status}, exit {outcome.exit_code}: {_short(outcome.error)}")
        elif not self._live and outcome.status == "done":
            self.say(f"[{self._count}] {outcome.name}: {outcome.status} in {human_seconds(outcome.seconds)}")

    def say(self, text: str) -> None:
        """Prints one line above the bars."""
        if self._live:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)


def summary(outcomes: Sequence[Outcome]) -> str:
    """The result of a batch: a row for each converted model, the failures by name, and counts of outcomes."""
    blocks = []
    if rows := _rows(outcomes):
        blocks.append(text_table(("model", "jobs", "params", "seconds", "peak MiB", "worst cosine"), rows))
    failed = [outcome for outcome in outcomes if outcome.failed]
    if failed:
        lines = [(outcome.name, str(outcome.exit_code), _short(outcome.error)) for outcome in failed[:_SHOWN_ERRORS]]
        width = max(len(name) for name, _, _ in lines)
        blocks.append("\n".join(f"{name.ljust(width)}  exit {code}  {error}" for name, code, error in lines))
        if len(failed) > _SHOWN_ERRORS:
            blocks.append(f"… and {len(failed) - _SHOWN_ERRORS} more")
    if warned := [outcome.name for outcome in outcomes if outcome.finished and outcome.figures.warnings]:
        named = ", ".join(warned[:_SHOWN_WARNED]) + (" …" if len(warned) > _SHOWN_WARNED else "")
        blocks.append(f"{len(warned)} with warnings, which batch.csv has: {named}")
    counts = {
        status: sum(outcome.status == status for outcome in outcomes)
        for status in (*DONE, "failed", "timeout", "pending")
    }
    blocks.append(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    return "\n\n".join(blocks)


def _rows(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    kinds: dict[tuple[str, int], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.finished:
            kinds.setdefault(
                (f"{outcome.figures.family} {outcome.figures.variant}", outcome.figures.num_params), []
            ).append(outcome)
    rows: list[tuple[str, ...]] = []
    for (model, params), of_kind in sorted(kinds.items(), key=lambda kind: kind[0][1]):
        ran = [outcome for outcome in of_kind if outcome.seconds]
        seconds = f"{sum(outcome.seconds for outcome in ran) / len(ran):.1f}" if ran else ""
        peak = f"{max(outcome.peak_rss_mib for outcome in ran):.0f}" if ran else ""
        cosines = [check.cosine for outcome in of_kind for check in outcome.figures.checks if check.cosine is not None]
        rows.append((model, str(len(of_kind)), f"{params:,}", seconds, peak, f"{min(cosines):.6f}" if cosines else ""))
    return rows


def dry_table(jobs: Sequence[Job], estimates: Mapping[str, Estimate], workers: int) -> str:
    """What `--dry_run` prints: the estimate for each job and for all of them together."""
    rows = []
    for job in jobs:
        found = estimates[job.name]
        about = "" if found.known else "?"
        took = (
            f"{found.num_params:,}{about}",
            f"{human_seconds(found.seconds)}{about}",
            f"{found.memory_mib:.0f}{about}",
        )
        rows.append((job.name, *took, job.checkpoint))
    table = text_table(("job", "params", "about", "MiB", "checkpoint"), rows)
    seconds = sum(estimates[job.name].seconds for job in jobs)
    unknown = "" if all(estimates[job.name].known for job in jobs) else "; '?': not at hand, taken to be a ViT-B"
    return f"{table}\n\n{len(jobs)} jobs, about {human_seconds(seconds / workers)} on {workers} workers{unknown}"


def _short(error: str) -> str:
    line = " ".join(error.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"
