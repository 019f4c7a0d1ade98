"""Mutates modules and counts the mutants that the tests kill: python benchmarks/mutation.py --module=…

A sample of each module's mutants (benchmarks/mutant.py) is tried. First its test files run once, to learn which test
passes through which line; then each mutant runs in a fork of this process, with the mutated source in place of the
module, the quickest tests that pass through its line first, until one fails. Nothing on the disk changes, so tests that
start another Python see the module as it is. Needs `pip install cosmic-ray`.

The results are kept in a file for each module, results/mutation/<module>.json: the newest run of each seed.
mutants/<module>.json says which mutants change nothing that anybody could see, and why.
"""

import argparse
import ast
import contextlib
import gc
import hashlib
import importlib.abc
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mutant import Mutant, places, sample
from mutation_cover import Covered, FromText, Passed, in_fork, lines_of_tests, preload, run_pytest
from mutation_fixtures import Reuse, restore, reusable
from mutation_modules import MODULES
from results import RESULTS, ROOT, Results, first_paragraph

EQUIVALENT = pathlib.Path(__file__).parent / "mutants"
_WARM = ("numpy", "ml_collections", "absl.flags", "PIL.Image", "safetensors.numpy", "onnx_ir", "onnxruntime")
# as tests/conftest.py has it, which comes too late for a JAX that is imported before
_STRICT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
}
# processor seconds for a mutant of a line that many tests pass through, whatever else the machine does
_MOST_SECONDS = 20.0
# A mutant that takes so many times as long, and so many seconds more, hangs: killed. By the processor's seconds, as
# others use the machine too; by the clock only late, for what waits.
_DEADLINE = 6.0, 30.0
_DEADLINE_BY_CLOCK = 20.0, 300.0


def covering(mutant: Mutant, tests: dict[str, Passed], inside: set[int]) -> list[str]:
    """The tests that pass through a mutant's line, the quickest first; all where the line runs at the import, as a
    record's fields do."""
    near = set(range(mutant.line - 3, mutant.line + 4))  # a statement of several lines is traced at some of them
    found = [name for name, (*_, lines) in tests.items() if mutant.line in lines or mutant.line not in inside]
    found = found or [name for name, (*_, lines) in tests.items() if lines & near]
    found.sort(key=lambda name: tests[name][0])
    chosen, seconds = [], 0.0
    for name in found:
        seconds += tests[name][0]
        if chosen and seconds > _MOST_SECONDS:
            break
        chosen.append(name)
    return chosen


def _inside_functions(source: str) -> set[int]:
    """The lines of bodies that tell who passes them; those of a signature run at the import, and a lambda that is no
    function's, as of a property, does not tell."""
    bodies = [node.body for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return {line for body in bodies for line in range(body[0].lineno, (body[-1].end_lineno or body[-1].lineno) + 1)}


def try_module(
    module: str, covered: Covered, copies: pathlib.Path, count: int, seed: int, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Tries a sample of a module's mutants.

    Args:
        module: its path.
        covered: what its tests do without a mutation.
        copies: of what their fixtures made.
        count: of mutants.
        seed: of the sample.
        before: an earlier run of the same sample, whose survivors alone are tried again.

    Returns:
        {"module", "tests", "places" (that could be mutated), "mutants", "killed", "killed_at_first" (before tests were
        written for the survivors), "asked", "seed", "sha256", "survivors": [{"operator", "line", "before", "after"}]}.
    """
    path = ROOT / module
    source, name = path.read_text(), module.removesuffix(".py").replace("/", ".")
    tests, inside, killed, survivors = covered.tests, _inside_functions(source), 0, []
    if name in sys.modules:
        raise SystemExit(f"{name} is imported, so that no mutant of it would be")
    drawn = sample(source, count, seed)
    digest = hashlib.sha256(source.encode()).hexdigest()
    same = before is not None and before.get("sha256") == digest  # of another source the sample is another
    alive = {(row["operator"], row["before"], row["after"]) for row in before["survivors"]} if before and same else None
    for mutant in drawn:
        if alive is not None and (mutant.operator, mutant.before, mutant.after) not in alive:
            killed += 1
            continue
        chosen = covering(mutant, tests, inside)
        reused = reusable(covered.kept, mutant.line, inside)
        restore([found for found, _ in covered.kept.values()], copies)
        made = [found.seconds for key, (found, _) in covered.kept.items() if key not in reused]
        spent, clock = (sum(seconds[i] for seconds in [*made, *(tests[test] for test in chosen)]) for i in (0, 1))

        def work(mutant: Mutant = mutant, chosen: Sequence[str] = chosen, reused: Any = reused) -> int:
            sys.meta_path.insert(0, FromText(name, path, mutant.source))
            return run_pytest(["-x", *chosen], [Reuse(reused)])

        by_clock, of_processor = _DEADLINE_BY_CLOCK, _DEADLINE
        if chosen and in_fork(work, by_clock[0] * clock + by_clock[1], of_processor[0] * spent + of_processor[1]) != 0:
            killed += 1
        else:
            survivors.append({key: getattr(mutant, key) for key in ("operator", "line", "before", "after")})
            print(f"  {module}:{mutant.line} {mutant.operator}: {mutant.key}", flush=True)
    tried = {
        "module": module,
        "tests": list(MODULES[module]),
        "places": len(places(source)),
        "mutants": len(drawn),
        "killed": killed,
    }
    print(f"{module}: {killed} of {len(drawn)} killed", flush=True)
    tried["killed_at_first"] = before["killed_at_first"] if before and same else killed
    return {**tried, "asked": count, "seed": seed, "sha256": digest, "survivors": survivors}


def judged(run: dict[str, Any], reasons: dict[str, str]) -> dict[str, Any]:
    """A run whose survivors are told apart: those that change nothing that anybody could see, with the reason, and the
    others."""
    told = [{**row, "equivalent": _reason(row, reasons)} for row in run["survivors"]]
    for row in told:
        if row["before"].replace("frozen=True", "frozen=False") == row["after"]:
            row["equivalent"] = "nothing in the project changes such a record"
        if (row["before"], row["after"]) == ("if TYPE_CHECKING:", "if not TYPE_CHECKING:"):
            row["equivalent"] = "what type checkers alone need can be imported as well"
        if row["before"].startswith("def ") and row["before"].replace("*, ", "/, ") == row["after"]:
            row["equivalent"] = "nothing in the project names what stands before the mark"
    equivalent = sum(bool(row["equivalent"]) for row in told)
    share = run["killed"] / max(run["mutants"] - equivalent, 1)
    return {
        **run,
        "survivors": told,
        "equivalent": equivalent,
        "survived": len(told) - equivalent,
        "killed_share": round(share, 3),
    }


def _reason(row: dict[str, Any], reasons: dict[str, str]) -> str:
    """The reason of this mutant, or of any other number in its line, as of how a figure looks."""
    number = reasons.get(f"{row['before']} -> another number", "") if row.get("operator") == "NumberReplacer" else ""
    return reasons.get(f"{row['before']} -> {row['after']}", "") or number


def record_file(folder: pathlib.Path, module: str) -> pathlib.Path:
    """The file for a module in a folder."""
    return folder / f"{module.removesuffix('.py').removeprefix('vit_convert/').replace('/', '.')}.json"


def _record(out: pathlib.Path, module: str) -> Results:
    return Results(
        record_file(out, module), f"{__doc__.split(':')[0]}; survivors that are equivalent have the reason beside them."
    )


def _judge(results: Results, module: str) -> None:
    known = record_file(EQUIVALENT, module)
    reasons = json.loads(known.read_text()) if known.exists() else {}
    results.record["runs"] = sorted(
        (judged(row, reasons) for row in results.record["runs"]), key=lambda row: row["seed"]
    )
    results.save()


def print_table(out: pathlib.Path) -> None:
    """Prints what a folder of records holds, as a table in Markdown."""
    keys = ("module", "seed", "mutants", "killed_at_first", "killed", "equivalent", "survived")
    print(f"| {' | '.join(keys)} |\n|{'---|' * len(keys)}")
    for path in sorted(out.glob("*.json")):
        for row in json.loads(path.read_text())["runs"]:
            print("|", " | ".join(str(row[key]) for key in keys), "|")


def judge_again(out: pathlib.Path) -> None:
    """Judges the survivors of all records again, by the current reasons."""
    for path in out.glob("*.json"):
        record, known = json.loads(path.read_text()), EQUIVALENT / path.name
        reasons = json.loads(known.read_text()) if known.exists() else {}
        record["runs"] = [judged(row, reasons) for row in record["runs"]]
        path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=first_paragraph(__doc__))
    parser.add_argument("--module", action="append", help="default: all of them")
    parser.add_argument("--count", type=int, default=25, help="mutants a module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--again",
        action="store_true",
        help="try the survivors of the newest run that --out holds, and no others if the module is what it was",
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "mutation", help="folder")
    parser.add_argument("--table", action="store_true", help="judge and print what --out holds, and try nothing")
    arguments = parser.parse_args()
    if arguments.table:
        judge_again(arguments.out)
        return print_table(arguments.out)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    # Other packages' pytest plugins cost every mutant more than most tests do.
    os.environ |= {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **_STRICT}
    for name in _WARM:
        importlib.import_module(name)
    for modules in _of_the_same_tests(arguments.module or [*MODULES]):
        child = os.fork()  # what is imported for some modules may be the next one to be mutated
        if child == 0:
            _try_together(modules, arguments)
            os._exit(0)
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            print(f"{', '.join(modules)}: not tried ({code})", flush=True)


def _try_together(modules: Sequence[str], arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = lines_of_tests([ROOT / module for module in modules], MODULES[modules[0]], pathlib.Path(folder))
        preload(found[ROOT / modules[0]].imported)
        gc.freeze()  # what is imported stays: pytest collects garbage at the end of each run
        for module in modules:
            _try_and_record(module, found[ROOT / module], pathlib.Path(folder), arguments)


def _of_the_same_tests(modules: Iterable[str]) -> list[list[str]]:
    """Modules whose tests are the same need them run but once without a mutation."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for module in modules:
        groups.setdefault(MODULES[module], []).append(module)
    return [*groups.values()]


@contextlib.contextmanager
def _leaving_no_imports() -> Iterator[None]:
    """Forgets what of the package is imported within: what describes this machine in a record imports some of it."""
    before = set(sys.modules)
    yield
    for name in sorted(set(sys.modules) - before, reverse=True):
        parent, _, child = name.rpartition(".")
        if name.partition(".")[0] == "vit_convert":
            del sys.modules[name]
            with contextlib.suppress(KeyError, AttributeError):
                delattr(sys.modules[parent], child)


def _try_and_record(module: str, covered: Covered, folder: pathlib.Path, arguments: argparse.Namespace) -> None:
    with _leaving_no_imports():
        results = _record(arguments.out, module)
    runs = results.record["runs"]
    before = max(runs, key=lambda row: str(row["date"]), default=None) if arguments.again else None
    count, seed = (before["asked"], before["seed"]) if before else (arguments.count, arguments.seed)
    run = try_module(module, covered, folder / "copies", count, seed, before)
    results.record["runs"] = [row for row in runs if row["seed"] != seed]
    with _leaving_no_imports():
        results.add(**run)
        _judge(results, module)


if __name__ == "__main__":
    main()
