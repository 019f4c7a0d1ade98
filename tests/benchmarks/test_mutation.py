"""What is mutated and with which tests is there, and survivors are told apart by the reasons that stand beside them."""

import json
import pathlib

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
