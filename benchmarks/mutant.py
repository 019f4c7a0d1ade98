"""The mutants of a module: one change to its source each, by cosmic-ray's operators and by leaving a statement out."""

import ast
import collections
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change to a module.

    Attributes:
        operator: cosmic-ray's name, or DropStatement.
        line: where, from 1.
        before: the line.
        after: what it became, or what the statement became.
        source: the whole module, changed.
    """

    operator: str
    line: int
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        return f"{self.before} -> {self.after}"


def places(source: str) -> list[list[Callable[[], Mutant]]]:
    """Every place of a module that can be mutated, except annotations: its mutants of one kind, each made on demand."""
    import cosmic_ray.ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    skipped = _annotations(source)
    nodes = list(cosmic_ray.ast.ast_nodes(cosmic_ray.ast.get_ast(source)))
    found: dict[tuple[str, tuple[int, int]], list[Callable[[], Mutant]]] = collections.defaultdict(list)

    def make(name: str, occurrence: int, line: int) -> Mutant:
        return _mutant(name.removeprefix("core/"), source, mutate_code(source, get_operator(name)(), occurrence), line)

    for name in operator_names():
        if name in ("core/VariableInserter", "core/VariableReplacer"):
            continue  # these need to be told which variables
        operator, kind = get_operator(name)(), name.split("_")[0]
        starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(starts):
            if not any(low <= start < high for low, high in skipped):
                found[kind, start].append(functools.partial(make, name, occurrence, start[0]))
    dropped = [
        [functools.partial(_mutant, "DropStatement", source, changed, line)] for line, changed in _dropped(source)
    ]
    return [*found.values(), *dropped]


def _mutant(operator: str, source: str, changed: str, line: int) -> Mutant:
    old, new = source.splitlines(), changed.splitlines()
    at = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), line - 1)
    return Mutant(operator, at + 1, old[at].strip(), new[at].strip() if at < len(new) else "", changed)


def _annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    found = []
    for node in ast.walk(ast.parse(source)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.AST):
                found.append(((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)))
    return found


def _dropped(source: str) -> Iterator[tuple[int, str]]:
    """The module without one of its calls, raises or augmented assignments that are statements."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        called = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        if called or isinstance(node, ast.Raise | ast.AugAssign):
            indent = " " * node.col_offset
            yield node.lineno, "".join([*lines[: node.lineno - 1], f"{indent}pass\n", *lines[node.end_lineno :]])


def sample(source: str, count: int, seed: int) -> list[Mutant]:
    """A number of places drawn at random, and one of the mutants of each."""
    rng, found = random.Random(seed), places(source)
    drawn = rng.sample(found, min(count, len(found)))
    made = [_made(rng.choice(makers)) for makers in drawn]
    return sorted((mutant for mutant in made if mutant is not None), key=lambda mutant: mutant.line)


def _made(maker: Callable[[], Mutant]) -> Mutant | None:
    try:
        mutant = maker()
        compile(mutant.source, "mutant", "exec")
    except (SyntaxError, AttributeError):
        # "def f(-, x)" is none that a test need kill; the latter of "except (a.Error, …)"
        return None
    return mutant
