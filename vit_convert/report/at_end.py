"""The page at the end of a command, if matplotlib and jinja2 are installed; never older than its report."""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

from vit_convert.core.bundle import Bundle, hash_value, read_json
from vit_convert.core.pair import TOWERS
from vit_convert.core.progress import Progress

_NEEDED = ("matplotlib", "jinja2")
_OF_A_RUN = ("date", "command", "stages", "status")  # what changes in a report when a run finds nothing to do
_MARK = "<!-- of the report {} -->\n"


def write_at_end(bundle: Bundle, progress: Progress, *, wanted: bool = True) -> bool:
    """Writes a bundle's `report.html`, unless it is up to date; the page of another report is removed.

    Args:
        bundle: with its `report.json`; for a pair, with those of its towers, which the page compares.
        progress: shows what went wrong; the command's own result does not depend on a page.
        wanted: False only removes the page of another report.

    Returns:
        Whether the page exists.
    """
    page = bundle.report_html
    reports = {path: found for path in _places(bundle) if isinstance(found := read_json(path), dict)}
    mark = _MARK.format(hash_value([_lasting(report) for report in reports.values()])[:16])
    if bundle.report in reports and _begins_with(page, mark):
        return True
    try:
        page.unlink(missing_ok=True)
    except OSError as e:  # a folder that became read-only: the user needs to see what ended the command
        progress.warn(f"{page}: {e.strerror}: a page of an earlier run may be left")
        return False
    if bundle.report not in reports or not wanted or any(importlib.util.find_spec(name) is None for name in _NEEDED):
        return False
    try:
        from vit_convert.report.page import read_subject, write_page

        write_page(page, read_subject([bundle.report]), mark=mark)
    except Exception as e:  # an hour-long conversion must not fail because of a picture
        progress.warn(f"no {page.name}: {type(e).__name__}: {e}")
        return False
    return True


def _places(bundle: Bundle) -> list[pathlib.Path]:
    """The report of a model, or of a pair and both its towers."""
    towers = [bundle.root / tower / bundle.report.name for tower in TOWERS]
    return [bundle.report, *(path for path in towers if path.is_file())]


def _lasting(report: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a report that does not change when nothing is found to do; for a failed one, also where it failed."""
    stages = [row.get("name") for row in report.get("stages") or [] if row.get("status") == "failed"]
    return {**{key: value for key, value in report.items() if key not in _OF_A_RUN}, "failed": stages}


def _begins_with(path: pathlib.Path, mark: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(len(mark)) == mark
    except (OSError, UnicodeDecodeError):
        return False
