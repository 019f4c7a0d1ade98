"""A self-contained HTML page of a whole batch, made only from `batch.json`."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.core.bundle import atomic
from vit_convert.core.errors import UsageError
from vit_convert.report.drawing import COLOURS, apart, draw, tip
from vit_convert.report.page import fill

Batch = Mapping[str, Any]
Job = Mapping[str, Any]

_TEMPLATE = "zoo.html"
_SCHEMA = "vit_convert.batch/"
_FINISHED = ("done", "fresh")
_MOST_ROWS = 2000  # rows of a table: browsers cannot open a page with fifty thousand
_MOST_POINTS = 1000  # of a figure
_PALETTE = ("#2563eb", "#d97706", "#0d9488", "#be123c", "#7c3aed", "#16a34a", "#db2777", "#64748b")


def read_batch(path: str | os.PathLike[str]) -> Batch:
    """Reads the record of a batch.

    Args:
        path: of its workdir, or of its `batch.json`.

    Raises:
        UsageError: there is none.
    """
    file = pathlib.Path(path)
    file = file / "batch.json" if file.is_dir() else file
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UsageError(f"{file}: cannot be read ({e})", fix="Give the workdir of a batch.") from e
    if not isinstance(found, dict) or not str(found.get("schema", "")).startswith(_SCHEMA):
        raise UsageError(f"{file}: is not a record of a batch", fix="Give the workdir of a batch.")
    return found


def is_batch(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a batch's workdir or record."""
    file = pathlib.Path(path)
    return (file / "batch.json").is_file() or (file.name.startswith("batch") and file.suffix == ".json")


def write_zoo_page(path: str | os.PathLike[str], batch: Batch, *, title: str) -> None:
    """Writes the page.

    Args:
        path: the `.html` file.
        batch: the content of `batch.json`.
        title: of the page.

    Raises:
        UsageError: jinja2 or matplotlib is missing, or the file cannot be written.
    """
    text = render_zoo(batch, title=title)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render_zoo(batch: Batch, *, title: str) -> str:
    """The page as text.

    Raises:
        UsageError: jinja2 or matplotlib is missing.
    """
    jobs: Sequence[Job] = batch["jobs"]
    failed = [job for job in jobs if job["status"] not in (*_FINISHED, "pending")]
    shown = [job for job in jobs if job["status"] in (*_FINISHED, "pending")][:_MOST_ROWS]
    checks = (check["precision"] for job in jobs for check in job["figures"]["checks"])
    gpus = (engine["gpu"] for job in jobs for engine in job["engines"])
    return fill(
        _TEMPLATE,
        lambda: zoo_figures(jobs),
        title=title,
        batch=batch,
        models=_models(jobs),
        failed=failed[:_MOST_ROWS],
        shown=shown,
        left_out=max(0, len(jobs) - len(failed[:_MOST_ROWS]) - len(shown)),
        precisions=list(dict.fromkeys(checks)),
        gpus=list(dict.fromkeys(gpus)),
        by=_by,
    )


def _by(rows: Sequence[Mapping[str, Any]], key: str, value: str) -> Mapping[str, Any]:
    """The row whose key has this value; {} if none has."""
    return next((row for row in rows if row[key] == value), {})


def _name(job: Job) -> str:
    return f"{job['figures']['family']} {job['figures']['variant']}"


@dataclasses.dataclass(frozen=True)
class _ModelRow:
    """A row of the table of models: means and extremes over the jobs that converted one."""

    name: str
    num_params: int
    jobs: int
    seconds: float | None
    peak_rss_mib: float
    cosines: Mapping[str, float]
    images_per_second: Mapping[str, float]


def _models(jobs: Sequence[Job]) -> list[_ModelRow]:
    """A row for each model with a whole bundle, smallest first."""
    kinds: dict[tuple[int, str], list[Job]] = {}
    for job in jobs:
        if job["status"] in _FINISHED:
            kinds.setdefault((job["figures"]["num_params"], _name(job)), []).append(job)
    rows = []
    for (params, name), of_kind in sorted(kinds.items()):
        seconds = [job["seconds"] for job in of_kind if job["seconds"]]
        cosines = _cosines(of_kind)
        rows.append(
            _ModelRow(
                name=name,
                num_params=params,
                jobs=len(of_kind),
                seconds=sum(seconds) / len(seconds) if seconds else None,
                peak_rss_mib=max(job["peak_rss_mib"] for job in of_kind),
                cosines={precision: min(values) for precision, values in cosines.items()},
                images_per_second={gpu: max(values) for gpu, values in _speeds(of_kind).items()},
            )
        )
    return rows


def _cosines(jobs: Sequence[Job]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for job in jobs:
        for check in job["figures"]["checks"]:
            if check["cosine"] is not None:
                found.setdefault(check["precision"], []).append(check["cosine"])
    return found


def _speeds(jobs: Sequence[Job]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for job in jobs:
        for engine in job["engines"]:
            if engine["images_per_second"]:
                found.setdefault(engine["gpu"], []).append(engine["images_per_second"])
    return found


Point = tuple[float, float, str, str]
"""A point's position, the series that it belongs to, and the tip that a browser shows for it."""


def zoo_figures(jobs: Sequence[Job]) -> list[str]:
    """All figures for which the jobs have numbers, as SVG elements; of very many jobs, an even selection is drawn.

    Args:
        jobs: rows of `batch.json`.
    """
    whole = [job for job in jobs if job["status"] in _FINISHED and job["figures"]["num_params"]]
    every = -(-len(whole) // _MOST_POINTS) or 1
    drawn = whole[::every]
    size, family = lambda job: job["figures"]["num_params"], lambda job: job["figures"]["family"]

    def said(job: Job, what: str) -> str:
        return f"{job['name']} ({_name(job)}): {what}"

    seconds = [(size(j), j["seconds"], family(j), said(j, f"{j['seconds']:.1f} s")) for j in drawn if j["seconds"]]
    memory = [
        (size(j), j["peak_rss_mib"], family(j), said(j, f"{j['peak_rss_mib']:,.0f} MiB"))
        for j in drawn
        if j["peak_rss_mib"]
    ]
    errors = [
        (size(j), max(1 - c["cosine"], 1e-9), c["precision"], said(j, f"{c['precision']}, cosine {c['cosine']:.7f}"))
        for j in drawn
        for c in j["figures"]["checks"]
        if c["cosine"] is not None
    ]
    speeds = [
        (size(j), e["images_per_second"], e["gpu"] or "GPU", said(j, f"{e['gpu']} {e['images_per_second']:,.0f}/s"))
        for j in drawn
        for e in j["engines"]
        if e["images_per_second"]
    ]
    found = [
        _scatter(seconds, "Time of a conversion", "seconds"),
        _scatter(memory, "Memory of a conversion", "peak, MiB"),
        _scatter(errors, "Distance of the graphs to JAX", "1 - cosine"),
        _scatter(speeds, "Fastest engine of each bundle", "images/s"),
    ]
    return [apart(svg, number) for number, svg in enumerate(svg for svg in found if svg)]


def _scatter(points: Sequence[Point], title: str, y: str) -> str:
    """Points over the number of parameters, both logarithmic; "" without any."""
    from matplotlib import ticker

    groups = list(dict.fromkeys(group for _, _, group, _ in points))

    def colour(group: str) -> str:
        return COLOURS.get(group, _PALETTE[groups.index(group) % len(_PALETTE)])

    def paint(axes: Any) -> None:
        axes.set(xscale="log", yscale="log")
        axes.margins(0.08)
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        for x, height, group, text in points:
            (spot,) = axes.plot(x, height, "o", ms=6, alpha=0.6, color=colour(group))
            tip(spot, text)
        for group in groups:
            axes.plot([], [], "o", color=colour(group), label=group)
        axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=4)  # where there is no point

    return draw(paint, title, "parameters", y) if points else ""
