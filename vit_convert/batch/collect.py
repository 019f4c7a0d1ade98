"""From the command line to the jobs of a batch, each with a unique name."""

import collections
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vit_convert.batch.checkpoints import drafts_of_checkpoints
from vit_convert.batch.draft import Draft, clean, draft_of
from vit_convert.batch.job import Job
from vit_convert.batch.sweep import Hyper, settings_of_flags, settings_of_hyper
from vit_convert.batch.tables import drafts_of_table
from vit_convert.core.config_files import find_config, load_file, split_argument
from vit_convert.core.errors import UsageError
from vit_convert.core.user_code import user_code

_LONGEST_NAME = 200  # bytes, the limit of `config.name`


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Attributes:
        config: file, and argument after ":"; "" for the defaults.
        overrides: "--config.key=value" words, for all jobs.
        checkpoints: see `drafts_of_checkpoints`.
        table: see `drafts_of_table`.
        where: see `Where`.
        column: see `drafts_of_table`.
        jobs: a Python file with get_jobs().
        sweep: see `settings_of_flags`.
    """

    config: str = ""
    overrides: Sequence[str] = ()
    checkpoints: Sequence[str] = ()
    table: str = ""
    where: str = ""
    column: str = ""
    jobs: str = ""
    sweep: Sequence[str] = ()


def collect(asked: Asked) -> list[Job]:
    """The jobs of a command line, their keys and values checked.

    Raises:
        UsageError: nothing to convert, two jobs with the same given name, a key that is set twice, or an invalid
            config.
    """
    if (asked.where or asked.column) and not asked.table:
        raise UsageError(
            "--where and --column without --table", fix="They choose from the rows and columns of a table."
        )
    file, argument = split_argument(asked.config) if asked.config else ("", "")
    file = find_config(file) if file else ""
    drafts = _drafts(asked, file, argument)
    settings = _settings(asked, file)
    jobs = [_job(draft, setting, asked.overrides, file, argument) for draft in drafts for setting in settings]
    jobs = _with_names_of_their_own(jobs, {draft.origin for draft in drafts if draft.named})
    _check_configs(jobs)
    return jobs


def _drafts(asked: Asked, file: str, argument: str) -> list[Draft]:
    drafts = drafts_of_checkpoints(asked.checkpoints)
    drafts += drafts_of_table(asked.table, where=asked.where, column=asked.column) if asked.table else []
    drafts += _drafts_of_file(asked.jobs) if asked.jobs else []
    if not drafts and file:
        drafts = [Draft(asked.config, clean(f"{pathlib.Path(file).stem}{f'_{argument}' if argument else ''}"))]
    if not drafts:
        raise UsageError(
            "nothing to convert", fix="Give --checkpoints, --table, --jobs_file or --config; --help tells more."
        )
    return drafts


def _drafts_of_file(path: str) -> list[Draft]:
    get_jobs = getattr(load_file(path), "get_jobs", None)
    if not callable(get_jobs):
        raise UsageError(
            f"--jobs_file={path}: it has no get_jobs()", fix="It returns a list of {'checkpoint': …, 'precision': …}."
        )
    with user_code(f"{path}: get_jobs()", UsageError):
        made = list(get_jobs())
    for number, row in enumerate(made):
        if not isinstance(row, Mapping):
            raise UsageError(
                f"{path}: get_jobs()[{number}] is a {type(row).__name__}",
                fix="Each is {'checkpoint': …, 'precision': …}.",
            )
    return [draft_of(row, f"{path}[{number}]", stem=f"job_{number}") for number, row in enumerate(made)]


def _settings(asked: Asked, file: str) -> list[dict[str, str]]:
    """The settings for every draft: the combinations of the config's get_hyper() with those of the flags."""
    get_hyper = getattr(load_file(file), "get_hyper", None) if file else None
    hyper: list[dict[str, str]] = [{}]
    if get_hyper is not None:
        with user_code(f"{file}: get_hyper()", UsageError):
            made = get_hyper(Hyper())
        hyper = settings_of_hyper(made, file)
    flags = settings_of_flags(asked.sweep)
    return [{**ours, **given} for ours in hyper for given in flags]


def _job(draft: Draft, setting: Mapping[str, str], overrides: Sequence[str], file: str, argument: str) -> Job:
    """A draft in one setting: the command line's keys, overridden by its own, plus the swept ones."""
    given = dict(word.removeprefix("--config.").split("=", 1) for word in overrides)
    if twice := sorted(setting.keys() & (given.keys() | draft.values.keys())):
        raise UsageError(f"{draft.origin}: config.{twice[0]} is both swept and set", fix="Leave one of them out.")
    name = given.pop("name", "") or draft.stem
    checkpoint = draft.checkpoint or given.pop("checkpoint", "")
    given.pop("checkpoint", None)
    values = {**given, **draft.values, **setting}
    swept = "".join(f"-{key.rpartition('.')[2]}_{value}" for key, value in setting.items())
    words = tuple(f"--config.{key}={value}" for key, value in values.items())
    return Job(clean(name + swept), checkpoint, words, file, argument, draft.origin)


def _with_names_of_their_own(jobs: Sequence[Job], named: set[str]) -> list[Job]:
    """The jobs without duplicates; generated names that collide get eight digits of a hash of what is converted.

    Raises:
        UsageError: two jobs have the same given name, even if everything else is equal.
    """
    own = {job.origin: job.origin for job in jobs if job.origin in named}
    jobs = list(
        {(job.name, job.checkpoint, job.overrides, own.get(job.origin)): job for job in reversed(jobs)}.values()
    )
    jobs.reverse()
    count = collections.Counter(job.name for job in jobs)
    given: dict[str, Job] = {}
    result = []
    for job in jobs:
        if job.origin in named:
            if (first := given.setdefault(job.name, job)) is not job:
                raise UsageError(
                    f"{first.origin} and {job.origin}: both are called {job.name!r}", fix="Give each a name of its own."
                )
        elif count[job.name] > 1 or len(os.fsencode(job.name)) > _LONGEST_NAME:
            job = dataclasses.replace(job, name=f"{job.name[: _LONGEST_NAME // 2]}-{_digits(job)}")
        result.append(job)
    return result


def _digits(job: Job) -> str:
    return hashlib.sha256("\n".join([job.checkpoint, *job.overrides]).encode()).hexdigest()[:8]


def _check_configs(jobs: Iterable[Job]) -> None:
    """Checks keys and values before any work; jobs that differ only in name and checkpoint are checked once."""
    seen: set[Any] = set()
    for job in jobs:
        if job.kind in seen:
            continue
        seen.add(job.kind)
        try:
            job.make_config()
        except UsageError as e:
            raise UsageError(f"{job.origin}: {e}", fix=e.fix) from e
