"""What is mutated and with which tests is there, and survivors are told apart by the reasons that stand beside them."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_modules_and_their_tests_exist():
    from mutation_modules import MODULES

    tests = {test.removeprefix("--deselect=").split("::")[0] for tests in MODULES.values() for test in tests}
    assert [path for path in [*MODULES, *sorted(tests)] if not (ROOT / path).is_file()] == []


def test_a_survivor_with_a_reason_does_not_count():
    from mutation import judged

    rows = [{"before": "a < b", "after": "a <= b"}, {"before": "x = 1", "after": "x = 2"}]
    found = judged(
        {"module": "m.py", "mutants": 5, "killed": 3, "survivors": rows}, {"a < b -> a <= b": "they are never equal"}
    )
    assert [row["equivalent"] for row in found["survivors"]] == ["they are never equal", ""]
    # three of the four that change something
    assert (found["equivalent"], found["survived"], found["killed_share"]) == (1, 1, 0.75)


def test_a_reason_may_be_of_any_number_of_a_line():
    from mutation import judged

    line, reasons = "axes.legend(fontsize=8)", {"axes.legend(fontsize=8) -> another number": "how large letters are"}
    rows = [{"operator": "NumberReplacer", "before": line, "after": f"axes.legend(fontsize={size})"} for size in (7, 9)]
    rows += [{"operator": "DropStatement", "before": line, "after": "pass"}]
    found = judged({"mutants": 3, "killed": 0, "survivors": rows}, reasons)["survivors"]
    assert [row["equivalent"] for row in found] == ["how large letters are"] * 2 + [""]


def test_what_only_callers_from_outside_could_see_has_its_reason():
    from mutation import judged

    rows = [
        {"before": f"@dataclass(frozen={value}, kw_only=True)", "after": "@dataclass(frozen=False, kw_only=True)"}
        for value in (True, None)
    ]
    rows += [{"before": f"def f({names}) -> int:", "after": "def f(a, /, b) -> int:"} for names in ("a, *, b", "a, b")]
    rows.append({"before": "if TYPE_CHECKING:", "after": "if not TYPE_CHECKING:"})
    found = judged({"mutants": 5, "killed": 0, "survivors": rows}, {})["survivors"]
    assert [bool(row["equivalent"]) for row in found] == [True, False, True, False, True]


def test_a_busy_machine_takes_no_tests_away(monkeypatch):
    """What a mutant is given goes by the processor's seconds: by the clock, a mutant lived for want of the test that
    kills it."""
    from mutant import Mutant
    from mutation import covering

    mutant = Mutant("operator", 7, "a", "b", "")
    tests = {
        "slow": (3.0, 900.0, {7}),
        "quick": (0.5, 2.0, {6, 7}),
        "elsewhere": (0.1, 0.1, {8}),
        "long": (50.0, 50.0, {7}),
    }
    assert covering(mutant, tests, {7}) == ["quick", "slow"]
    # a line of the import: all, as far as time goes
    assert covering(mutant, tests, set()) == ["elsewhere", "quick", "slow"]
    assert covering(mutant, {"long": tests["long"]}, {7}) == ["long"]  # one at least


def test_which_lines_tell_who_passes_them():
    """A mutant of a line that does not tell is given every test: a property of a lambda was given none of its own."""
    from mutation import _inside_functions

    source = """
class A:
    path = property(lambda self: self.root / "a")

    def method(self, default=lambda: 1):
        return max(self.rows, key=lambda row: row.batch)

KEY = lambda row: row.name
"""
    assert _inside_functions(source) == {6}


def test_a_module_that_describes_the_machine_can_be_mutated():
    """What a record is written with imports some of the package, of which no mutant would be."""
    from mutation import _leaving_no_imports

    import vit_convert.core

    name, parent = "vit_convert.core.host", vit_convert.core
    before = sys.modules.pop(name, None)
    kept = parent.__dict__.pop("host", None)
    try:
        with _leaving_no_imports():
            from vit_convert.core import host

            assert host.num_cores() >= 1
        assert name not in sys.modules and not hasattr(parent, "host") and parent is sys.modules["vit_convert.core"]
    finally:
        sys.modules.update({name: before} if before else {})
        parent.__dict__.update({"host": kept} if kept else {})


def test_a_command_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    import results

    folder = ROOT / "benchmarks"
    monkeypatch.setattr(
        results.sys, "argv", [str(folder / "mutation.py"), "--seed=3", f"--out={folder}/results", "--name=a b"]
    )
    record = results.Results(tmp_path / "x.json", "about").record
    assert record["command"] == "python benchmarks/mutation.py --seed=3 --out=benchmarks/results '--name=a b'"


def test_a_record_for_each_module(tmp_path, capsys):
    from mutation import print_table, record_file

    path = record_file(tmp_path, "vit_convert/export/rules/gelu.py")
    assert path == tmp_path / "export.rules.gelu.json"
    row = {"module": "m.py", "seed": 3, "mutants": 5, "killed_at_first": 2, "killed": 3, "equivalent": 1, "survived": 1}
    path.write_text(json.dumps({"runs": [row]}))
    print_table(tmp_path)
    assert capsys.readouterr().out.splitlines()[2:] == ["| m.py | 3 | 5 | 2 | 3 | 1 | 1 |"]


CONFTEST = """
import pytest
from shapes import side

@pytest.fixture(scope="session")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "side.txt").write_text(str(side(2)))
    return folder

@pytest.fixture
def copied(made, tmp_path):
    (tmp_path / "side.txt").write_text((made / "side.txt").read_text())
    return tmp_path
"""
SHAPES = """def side(x):
    y = x + 1
    return y

def area(x):
    return x * x
"""
TESTS = """
import shapes

def test_area(copied):
    assert shapes.area(int((copied / "side.txt").read_text())) == 9

def test_side(made):
    assert (made / "side.txt").read_text() == "3"
    (made / "side.txt").write_text("spoilt")
"""


def test_what_fixtures_make_is_kept_for_mutants_that_cannot_have_changed_it(tmp_path):
    """In a process of its own: the lines of each test, what is kept, and what is restored."""
    folder, base = tmp_path / "tests", tmp_path / "folder"
    folder.mkdir()
    base.mkdir()
    for name, text in {"conftest.py": CONFTEST, "shapes.py": SHAPES, "test_shapes.py": TESTS}.items():
        (folder / name).write_text(text)
    script = f"""
import json, pathlib, sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(folder)!r}]
import mutation_cover
from mutation_fixtures import Reuse, restore, reusable
mutation_cover.ROOT = pathlib.Path({str(folder)!r})
path, base = mutation_cover.ROOT / "shapes.py", pathlib.Path({str(base)!r})
found = mutation_cover.lines_of_tests([path], [str(path.parent)], base)[path]
(key, (kept, lines)), = found.kept.items()
spoilt = (kept.value / "side.txt").read_text()
restore([kept], base / "copies")
for_area = reusable(found.kept, 6, {{2, 3, 6}})
again = mutation_cover.run_pytest([str(path.parent)], [Reuse(for_area)])
rows = {{name.split("::")[1]: sorted(lines) for name, (_, _, lines) in found.tests.items()}}
print(json.dumps([rows, key[0], sorted(lines), spoilt, again, len(for_area)]
                 + [len(reusable(found.kept, line, {{2, 3, 6}})) for line in (2, 4)]))
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    rows, name, lines, spoilt, again, *reused = json.loads(ran.stdout.splitlines()[-1])
    assert rows == {"test_area": [2, 3, 6], "test_side": [2, 3]}  # the session's lines belong to both
    assert (name, lines, spoilt, again) == ("made", [2, 3], "spoilt", 0)
    assert reused == [1, 0, 0]  # of area's line; of side's; of the import, which side depends on
