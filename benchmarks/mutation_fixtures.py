"""Keeps what a module's tests make once, a converted bundle say, from one mutant to the next: it takes a hundred times
as long to make as most tests take to run."""

import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest

Key = tuple[str, str]  # a fixture's name, and the folder or file that it is of
Line = tuple[str, int]  # of a file


@dataclasses.dataclass
class Kept:
    """One fixture of a session or a file that gives paths.

    Attributes:
        value: the path, or the list of paths.
        roots: the folders that they lie in, below the base folder.
        lines: of the modules that are mutated, which making it passes through.
        seconds: of the processor and of the clock, that making it takes.
    """

    value: Any
    roots: list[pathlib.Path]
    lines: set[Line]
    seconds: tuple[float, float]


def _key(definition: Any) -> Key:
    return definition.argname, definition.baseid


class Keeping:
    """The part of a pytest plugin that notes what fixtures give, and copies it before a test can change it.

    Args:
        base: pytest's base folder.
        copies: where the copies go.
    """

    def __init__(self, base: pathlib.Path, copies: pathlib.Path):
        self.base, self.copies = base, copies
        self.lines: set[Line] = set()  # what is traced now
        self.kept: dict[Key, Kept] = {}
        self.spent = 0.0, 0.0  # of the processor and of the clock, in fixtures that are kept, since a test's start

    def of_test(self, item: Any) -> list[Key]:
        """The kept fixtures that a test uses, itself or through others."""
        found = item._fixtureinfo.name2fixturedefs
        return [_key(definitions[-1]) for definitions in found.values() if _key(definitions[-1]) in self.kept]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        around, self.lines = self.lines, set()
        started, spent = time.monotonic(), sum(os.times()[:4])
        outcome: Any = yield
        own, self.lines = self.lines, around
        roots = [] if outcome.excinfo or fixturedef.params else self._roots(outcome.get_result())
        if fixturedef.scope == "function" or not roots:
            self.lines |= own
            return
        took = sum(os.times()[:4]) - spent, time.monotonic() - started
        self.spent = self.spent[0] + took[0], self.spent[1] + took[1]
        self.kept[_key(fixturedef)] = Kept(outcome.get_result(), roots, own, took)
        for root in roots:
            shutil.copytree(root, self.copies / root.name, symlinks=True, dirs_exist_ok=True)

    def _roots(self, value: Any) -> list[pathlib.Path]:
        paths = value if isinstance(value, list) and value else [value]
        if not all(isinstance(path, pathlib.Path) and path.is_relative_to(self.base) for path in paths):
            return []
        return sorted({self.base / path.relative_to(self.base).parts[0] for path in paths if path != self.base})


class Reuse:
    """A pytest plugin that gives kept values instead of making them."""

    def __init__(self, kept: Mapping[Key, Kept]):
        self.kept = kept

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        found = self.kept.get(_key(fixturedef))
        if found is None or fixturedef.params:
            return None
        fixturedef.cached_result = (found.value, fixturedef.cache_key(request), None)
        return found.value


def reusable(kept: Mapping[Key, tuple[Kept, set[int]]], line: int, inside: set[int]) -> dict[Key, Kept]:
    """What a mutant of a line cannot have changed: a line of the import changes all that passes through the module."""
    return {
        key: found
        for key, (found, lines) in kept.items()
        if line not in lines and (line in inside or not lines & inside)
    }


def restore(kept: Iterable[Kept], copies: pathlib.Path) -> None:
    """Undoes changes by a test or a mutant to what is kept."""
    for root in {root for found in kept for root in found.roots}:
        if _state(root) != _state(copies / root.name):
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(copies / root.name, root, symlinks=True)


def _state(root: pathlib.Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(root)): (state.st_size, state.st_mtime_ns)
        for path in root.rglob("*")
        if not path.is_dir() and (state := path.lstat())
    }
