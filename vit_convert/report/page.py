"""A self-contained HTML page of one report, or of several side by side; made only from `report.json`."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit_convert.core.bundle import atomic
from vit_convert.core.errors import UsageError
from vit_convert.core.pair import TOWERS
from vit_convert.report.figures import MOST_DRAWN, figures
from vit_convert.report.record import PairReport
from vit_convert.report.record import Report as Record
from vit_convert.report.roofline import kernels, reached, roofline_of

Report = Mapping[str, Any]

_TEMPLATE = "page.html"
_OBJECTS = (
    "checkpoint",
    "onnx",
    "calibration",
    "sensitivity",
    "accuracy",
    "checks",
    "verdicts",
    "engine",
    "recommended",
)
_LISTS = ("engines", "benchmark", "stages")
_FIX = "Give the folder that a conversion wrote."


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a page is about.

    Attributes:
        reports: of models and towers, in order.
        pairs: of pairs of towers, whose towers are among the above.
    """

    reports: Sequence[Report]
    pairs: Sequence[Report] = ()


def read_subject(paths: Sequence[str | os.PathLike[str]]) -> Subject:
    """Reads the reports of bundles and of pairs, each of which stands for its towers too.

    Args:
        paths: as for `read`.

    Raises:
        UsageError: see `read`.
    """
    reports, pairs = [], []
    for path in paths:
        file, content = _content(path)
        if "towers" not in content:
            reports.append(read(path))
            continue
        try:
            pair = PairReport.from_dict(content).to_dict()
        except ValueError as e:
            raise UsageError(f"{file}: cannot be read ({e})", fix=_FIX) from e
        pairs.append(pair)
        for tower in TOWERS:
            if (found := file.parent / tower / file.name).is_file():
                reports.append({**read(found), "name": f"{pair['name']}/{tower}"})
    return Subject(reports, pairs)


def _content(path: str | os.PathLike[str]) -> tuple[pathlib.Path, Mapping[str, Any]]:
    file = pathlib.Path(path)
    file = file / "report.json" if file.is_dir() else file
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UsageError(f"{file}: cannot be read ({e})", fix=_FIX) from e
    if not isinstance(found, dict):
        raise UsageError(f"{file}: cannot be read ({found!r} is not of type mapping)", fix=_FIX)
    return file, found


def read(path: str | os.PathLike[str]) -> Report:
    """Reads a report.

    Args:
        path: of a bundle, or of its `report.json`.

    Raises:
        UsageError: there is none, or it does not fit the schema of `report/record.py`.
    """
    file, content = _content(path)
    try:
        found = Record.from_dict(content)
    except ValueError as e:  # RecordError is one
        raise UsageError(f"{file}: cannot be read ({e})", fix=_FIX) from e
    if not found.name:
        raise UsageError(f"{file}: is not a report of a conversion", fix=_FIX)
    return found.to_dict()


def write_page(path: str | os.PathLike[str], subject: Subject, *, mark: str = "") -> None:
    """Writes the page.

    Args:
        path: the `.html` file.
        subject: one report, or several to compare.
        mark: a comment to put in front of it.

    Raises:
        UsageError: jinja2 or matplotlib is missing, or the file cannot be written.
    """
    text = render(subject.reports, subject.pairs)
    with atomic(path) as temporary:
        temporary.write_text(mark + text, encoding="utf-8")


def render(reports: Sequence[Report], pairs: Sequence[Report] = ()) -> str:
    """The page as text.

    Args:
        reports: see `Subject`.
        pairs: see `Subject`.

    Raises:
        UsageError: jinja2 or matplotlib is missing.
    """
    names = [str(report["name"]) for report in reports]
    title = ", ".join(names) if len(names) <= MOST_DRAWN else f"{names[0]} and {len(names) - 1} more"
    if len(pairs) == 1 and all(name.startswith(f"{pairs[0]['name']}/") for name in names):
        title = str(pairs[0]["name"])
    own: dict[str, Any] = {"engine_row": _engine_row, "consistency": _consistency, "most": MOST_DRAWN}
    own |= {"reached": reached, "roofline_of": roofline_of, "kernels": kernels, "pairs": pairs}
    own["reports"] = list(map(_whole, reports))
    return fill(_TEMPLATE, lambda: figures(reports), title=title, **own)


def fill(template: str, draw: Callable[[], Sequence[str]], **names: Any) -> str:
    """Renders a template of this folder as text.

    Args:
        template: its file.
        draw: gives the figures, as SVG elements; they are `figures` in it.
        names: the template's variables.

    Raises:
        UsageError: jinja2 or matplotlib is missing.
    """
    try:
        import jinja2
        import markupsafe

        drawn = [markupsafe.Markup(svg) for svg in draw()]
    except ImportError as e:
        raise UsageError(f"{e.name} is not installed", fix="pip install 'vit_convert[report]'") from e
    return str(_template(jinja2, template).render(figures=drawn, **names))


@functools.cache
def _template(jinja2: Any, name: str) -> Any:
    """A template of this folder, read once in a process that writes many pages."""
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["plain"] = lambda text: str(text).replace("`", "")  # which only a terminal's reader knows
    environment.filters["mib"] = lambda count: f"{count / 2**20:,.1f} MiB"
    return environment.get_template(name)


def _whole(report: Report) -> Report:
    """A report in which sections that a failed conversion lacks are empty."""
    empty: dict[str, Any] = {**{key: {} for key in _OBJECTS}, **{key: [] for key in _LISTS}}
    return {**empty, **{key: value for key, value in report.items() if value is not None}}


@dataclasses.dataclass(frozen=True)
class _EngineRow:
    """A row of the table of engines; top1 and cosine may be missing in the report."""

    proof: str
    top1: Any
    cosine: Any
    fused: str
    recommended: bool


def _engine_row(report: Report, engine: Mapping[str, Any]) -> _EngineRow:
    checks = (report.get("verify") or {}).get("engines") or {}
    found: Mapping[str, Any] = next((check for check in checks.values() if check.get("plan") == engine["path"]), {})
    proved = found.get("passed")
    fused = engine.get("fused_attention") or {}
    return _EngineRow(
        proof="not verified" if proved is None else "verified" if proved else "MISSED",
        top1=found.get("top1"),
        cosine=found.get("cosine"),
        fused=fused.get("text") or f"unknown: {engine.get('fused_attention_unknown', '')}",
        recommended=engine["path"] == (report.get("engine") or {}).get("path"),
    )


def _consistency(check: Mapping[str, Any]) -> str:
    """The results of a graph's checks without a reference; "" if they did not run."""
    rows = check.get("consistency") or []
    if like := check.get("consistency_like"):
        return f"as {like}"
    wrong = [row["check"] for row in rows if not row["passed"]]
    return f"FAILED: {', '.join(wrong)}" if wrong else "passed" if rows else ""
