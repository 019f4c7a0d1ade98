"""Selects the model in a file: without optimizer state, and without the prefix of all names."""

from collections.abc import Iterable, Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.errors import CheckpointError


def select(leaves: Mapping[str, Leaf], subtree: str, path: str) -> tuple[str, dict[str, Leaf]]:
    """Keeps the model's leaves and strips their common prefix.

    `params/` is the optax era of big_vision, `opt/target/` the flax.optim era before it; both have the optimizer's
    moments beside the model, under the same names and of the same shapes, so everything else under `opt/` and `chrono/`
    is left out.

    Args:
        leaves: all leaves of the file.
        subtree: a folder of the tree to take, such as "img"; "" for the whole tree.
        path: the file, for messages.

    Returns:
        What was stripped (such as "params/img/"), and the leaves by the rest of their names.

    Raises:
        CheckpointError: nothing is left.
    """
    prefix = next((p for p in ("params/", "opt/target/") if any(name.startswith(p) for name in leaves)), "")
    kept = {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
    if not prefix:
        kept = {name: leaf for name, leaf in kept.items() if not name.startswith(("opt/", "chrono/"))}
    if subtree:
        folder = subtree.strip("/") + "/"
        kept = {name.removeprefix(folder): leaf for name, leaf in kept.items() if name.startswith(folder)}
        prefix += folder
    if not kept:
        raise CheckpointError(
            f"{path}: no parameters under {prefix or '/'!r}; it holds {few_of(leaves)}",
            fix="Check the file, and what follows ':' in its path.",
        )
    return prefix, kept


def few_of(names: Iterable[str]) -> str:
    """ "a, b, c, d and 3 more"."""
    listed = sorted(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
