"""Runs a module's tests as they are, to learn which of them passes through which of its lines."""

import ast
import builtins
import contextlib
import dataclasses
import importlib
import importlib.abc
import importlib.util
import os
import pathlib
import pickle
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
from mutation_fixtures import Keeping, Kept, Key, Line
from results import ROOT

Passed = tuple[float, float, set[int]]


class FromText(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from a text."""

    def __init__(self, name: str, path: pathlib.Path, source: str):
        self.name, self.path, self.source = name, path, source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def get_filename(self, name: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        return self.source.encode()

    def path_stats(self, path: str) -> Any:
        raise OSError("so that no compiled file is read or written")


class _Counted(FromText):
    """Imports one module so that it says which of its lines it passes: without a tracer, which slows everything."""

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:
        tree = ast.parse(data)
        for node in [*ast.walk(tree)]:
            for field in ("body", "orelse", "finalbody"):
                statements = getattr(node, field, None)
                if isinstance(statements, list) and not isinstance(node, ast.Module | ast.ClassDef):
                    setattr(node, field, [part for one in statements for part in (self._told(one), one)])
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimize)

    def _told(self, statement: ast.stmt) -> ast.stmt:
        inner = [part.lineno for part in getattr(statement, "body", ()) if not isinstance(part, ast.match_case)]
        last = min(inner, default=(statement.end_lineno or statement.lineno) + 1)
        call = f"__passed__({str(self.path)!r}, {statement.lineno}, {max(last, statement.lineno + 1)})"
        told = ast.parse(call).body[0]
        for node in ast.walk(told):
            ast.copy_location(node, statement)
        return told


class _Lines(Keeping):
    """A pytest plugin that notes, for each test, its seconds of the processor and of the clock, and which lines of some
    files it passed."""

    def __init__(self, paths: Sequence[pathlib.Path], folder: pathlib.Path):
        super().__init__(folder / "base", folder / "copies")
        self.tests: dict[str, tuple[float, float, set[Line]]] = {}
        builtins.__passed__ = self._passed  # type: ignore[attr-defined]
        for path in paths:
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            sys.meta_path.insert(0, _Counted(name, path, path.read_text()))

    def _passed(self, file: str, low: int, high: int) -> None:
        self.lines.update((file, line) for line in range(low, high))

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> Iterator[None]:
        self.lines, self.spent = set(), (0.0, 0.0)
        started, spent = time.monotonic(), sum(os.times()[:4])
        yield
        lines = self.lines.union(*(self.kept[key].lines for key in self.of_test(item)))
        seconds = sum(os.times()[:4]) - spent - self.spent[0], time.monotonic() - started - self.spent[1]
        self.tests[item.nodeid] = (*seconds, lines)


def in_fork(work: Callable[[], Any], seconds: float, of_processor: float) -> Any:
    """The result of a function that runs in a fork of this process; None where it does not end in time or dies.

    Args:
        work: the function.
        seconds: of the clock.
        of_processor: seconds of it that the fork, and each process that it starts, may use.
    """
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (int(of_processor) + 1, int(of_processor) + 1))
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            with open(file.name, "wb") as out:
                pickle.dump(work(), out)
            os._exit(0)
        end = time.monotonic() + seconds
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None
            time.sleep(0.05)
        content = pathlib.Path(file.name).read_bytes()
        return pickle.loads(content) if content else None


def run_pytest(arguments: Sequence[str], plugins: Sequence[object] = ()) -> int:
    """pytest's exit status, in this process."""
    return int(
        pytest.main(
            [*arguments, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not gpu and (not slow or alike)"],
            list(plugins),
        )
    )


@dataclasses.dataclass(frozen=True)
class Covered:
    """What the tests of a module do without a mutation.

    Attributes:
        tests: per test, seconds of the processor and of the clock, and the lines of the module that it passes through.
        kept: what fixtures made, for the mutants to use, and the lines that making it passes through.
        imported: modules that the tests import and no mutant can change: importing takes longer than most tests.
    """

    tests: dict[str, Passed]
    kept: dict[Key, tuple[Kept, set[int]]]
    imported: list[str]


def _to_preload(paths: Sequence[pathlib.Path]) -> list[str]:
    """What is imported now and no mutant can change: other packages, and modules of ours that import none of these."""
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    lie_here = {name: pathlib.Path(file) for name, file in files.items() if file}
    ours = {name: path for name, path in lie_here.items() if path.is_relative_to(ROOT)}
    package = {name: path for name, path in ours.items() if name.split(".")[0] == "vit_convert"}
    used = {name: _imports(path, name) & {*package} for name, path in package.items()}
    tainted = {name for name, path in package.items() if path in paths}
    while more := {name for name, uses in used.items() if uses & tainted} - tainted:
        tainted |= more
    return [name for name in lie_here if name not in ours or name in package.keys() - tainted]


def _imports(path: pathlib.Path, name: str) -> set[str]:
    """The names that a module imports, wherever it does, those that may be modules among them; and its packages."""
    found = {name.rpartition(".")[0]}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found | {parent for one in found for parent in (one.rpartition(".")[0],) if parent}


def preload(names: Iterable[str]) -> None:
    """Imports modules, so that no mutant has to; what cannot be imported by itself is left to the tests."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def lines_of_tests(
    paths: Sequence[pathlib.Path], tests: Sequence[str], folder: pathlib.Path
) -> dict[pathlib.Path, Covered]:
    """Runs the tests of some modules as they are.

    Args:
        paths: of the modules.
        tests: their tests, as for pytest.
        folder: for what fixtures make.

    Returns:
        What is known of each module.

    Raises:
        SystemExit: the tests fail as they are.
    """

    def work() -> Any:
        lines = _Lines(paths, folder)
        code = run_pytest([*tests, f"--basetemp={lines.base}"], [lines])
        return code, lines.tests, lines.kept, _to_preload(paths)

    code, found, kept, imported = in_fork(work, 1800, 900) or ("no answer", {}, {}, [])
    if code:
        raise SystemExit(f"{' '.join(tests)} fail without a mutation ({code})")

    def of(path: pathlib.Path) -> Covered:
        def own(lines: set[Line]) -> set[int]:
            return {number for file, number in lines if file == str(path)}

        return Covered(
            {name: (cpu, clock, own(lines)) for name, (cpu, clock, lines) in found.items()},
            {key: (value, own(value.lines)) for key, value in kept.items()},
            imported,
        )

    return {path: of(path) for path in paths}
