"""What people see of a batch."""

import io

import pytest
import rich.console

from vit_convert.batch.estimate import Estimate
from vit_convert.batch.job import Job
from vit_convert.batch.outcome import Checked, Figures, Outcome
from vit_convert.batch.screen import Screen, _short, dry_table, summary

NAMES = ("a", "b", "c")
ESTIMATES = {name: Estimate((7_000, "fp16"), 7_000, 90.0, 512.0, name != "c") for name in NAMES}
FIGURES = Figures("vit", "mu/16", 7_000, (32, 32), checks=(Checked("fp16", True, 0.99999),))


@pytest.fixture
def terminal(monkeypatch):
    """A terminal that keeps what is written."""
    written, made = io.StringIO(), rich.console.Console

    def console(**options):
        return made(file=written, force_terminal=True, width=100, **{**options, "stderr": False})

    monkeypatch.setattr(rich.console, "Console", console)
    return written


def test_a_terminal_has_a_bar_a_line_for_each_worker_and_what_is_left(terminal):
    with Screen(ESTIMATES, quiet=False) as screen:
        screen.start(0, Job("a"))
        screen.start(1, Job("b"))
        screen.end(0, Outcome("a", status="done", exit_code=0))
        screen.end(1, Outcome("b", status="failed", exit_code=3, error="b.npz: no zip"))
        screen._bars.refresh()
        said = terminal.getvalue()
    assert "1  a" in said and "2  b" in said and "2/3" in said and "b: failed, exit 3: b.npz: no zip" in said
    assert screen._bars.tasks[0].completed == 180.0 and screen._bars.tasks[0].total == 270.0  # by the estimates


def test_elsewhere_there_is_a_line_for_each_that_ended(capsys):
    with Screen(ESTIMATES, quiet=False) as screen:
        screen.start(0, Job("a"))
        screen.end(0, Outcome("a", status="done", exit_code=0, seconds=2.5))
        screen.end(None, Outcome("b", status="fresh", exit_code=0))
    assert capsys.readouterr().err == "[1/3] a: done in 2.5 s\n"


def test_quiet_says_nothing(capsys):
    with Screen(ESTIMATES, quiet=True) as screen:
        screen.end(0, Outcome("a", status="failed", exit_code=3, error="x"))
        screen.say("x")
    assert capsys.readouterr() == ("", "")


def test_the_summary_has_models_failures_warnings_and_counts():
    odd = Figures("vit", "mu/16", 7_000, checks=(Checked("fp16", True, 0.9),), warnings=("zeros",))
    told = summary(
        [
            Outcome("a", status="done", exit_code=0, seconds=2.0, peak_rss_mib=300.0, figures=FIGURES),
            Outcome("b", status="done", exit_code=0, seconds=4.0, peak_rss_mib=400.0, figures=odd),
            Outcome("c", status="failed", exit_code=3, error="c.npz:\nno zip"),
            Outcome("d"),
        ]
    )
    assert "vit mu/16     2   7,000      3.0       400      0.900000" in told
    assert "c  exit 3  c.npz: no zip" in told and "1 with warnings, which batch.csv has: b" in told
    assert told.endswith("2 done, 1 failed, 1 pending")


def test_the_dry_table_sums_up_by_workers():
    told = dry_table([Job(name, f"{name}.npz") for name in NAMES], ESTIMATES, 2).splitlines()
    assert told[1].split() == ["a", "7,000", "90", "s", "512", "a.npz"] and "7,000?" in told[3]
    assert told[-1] == "3 jobs, about 2 min 15 s on 2 workers; '?': not at hand, taken to be a ViT-B"


@pytest.mark.parametrize(("count", "more"), [(40, ""), (41, "… and 1 more"), (100, "… and 60 more")])
def test_no_more_failures_than_a_screen_holds(count, more):
    found = summary([Outcome(f"job{i}", status="failed", exit_code=3, error="broken") for i in range(count)])
    assert found.count("exit 3  broken") == 40 and (more in found if more else "more" not in found)


def test_models_stand_by_their_size():
    """Whatever their names, and the order in which they ended."""
    sizes = (("vit", "B/16", 86_567_656), ("mixer", "L/16", 208_196_168), ("vit", "Ti/16", 5_717_416))
    rows = [
        Outcome(name, status="done", exit_code=0, figures=Figures(family, variant, params))
        for name, (family, variant, params) in zip("abc", sizes)
    ]
    lines = [line for line in summary(rows).splitlines() if "/16" in line]
    assert [line.split()[:2] for line in lines] == [["vit", "Ti/16"], ["vit", "B/16"], ["mixer", "L/16"]]


@pytest.mark.parametrize("length", [1, 159, 160, 161, 500])
def test_long_errors_are_cut(length):
    said = _short("x" * length)
    assert said == ("x" * length if length <= 160 else "x" * 160 + " …")
    assert _short("two\n  lines\tof it") == "two lines of it"
