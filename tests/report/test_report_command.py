"""Which page the command writes, and where."""

import pytest

from vit_convert.report import page, zoo
from vit_convert.report.__main__ import main


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command; returns its exit code and the pages that it would write. Folders that begin with z are
    batches'."""
    for name in ("one", "two", "zoo"):
        (tmp_path / name).mkdir()
    (tmp_path / "zoo" / "z.json").write_text("{}")
    (tmp_path / "one" / "report.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "is_batch", lambda path: path.name.startswith("z"))
    monkeypatch.setattr(zoo, "read_batch", lambda path: f"batch {path}")
    monkeypatch.setattr(page, "read_subject", lambda paths: [f"report {path}" for path in paths])

    def command(*words):
        written = []
        monkeypatch.setattr(
            zoo, "write_zoo_page", lambda path, record, *, title: written.append((str(path), record, title))
        )
        monkeypatch.setattr(page, "write_page", lambda path, reports: written.append((str(path), reports)))
        return main(["report", *words]), written

    return command


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["one"], ("one/report.html", ["report one"])),
        (["one/report.json"], ("one/report.html", ["report one/report.json"])),
        (["one", "--output=a.html"], ("a.html", ["report one"])),
        (["one", "two", "--output=a.html"], ("a.html", ["report one", "report two"])),
        (["zoo", "one", "--output=a.html"], ("a.html", ["report zoo", "report one"])),  # a batch beside a bundle
        (["zoo"], ("zoo/batch.html", "batch zoo", "zoo")),
        (["zoo/z.json"], ("zoo/z.html", "batch zoo/z.json", "zoo")),
        (["zoo", "--output=a.html"], ("a.html", "batch zoo", "zoo")),
    ],
)
def test_where_the_page_goes(command, capsys, words, written):
    code, found = command(*words)
    assert (code, found) == (0, [written]) and capsys.readouterr().out.splitlines() == [written[0]]


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--output=a.html"], "no bundle is given"), (["one", "two"], "2 bundles: the place for their page")],
)
def test_what_is_not_said(command, capsys, words, said):
    code, found = command(*words)
    assert (code, found) == (2, []) and said in capsys.readouterr().err
