"""What a config pattern such as "block_03", "block_03/fc2" or a scope refers to, in a graph and in an engine."""

import fnmatch
import re
from collections.abc import Iterable, Sequence

from vit_convert.core.errors import UsageError, nearest

HOW_TO_NAME = "Give a block (block_03), a layer (block_03/fc2), a scope or an fnmatch pattern (*/MlpBlock_0/*)."
# of a model with several stacks of blocks, see `stack.Stack`
_STAGE = re.compile(r"(?:^|/)(stage_\w+)/block_(\d+)(?=/|$)")
_BLOCK = re.compile(r"(?:^|/)(?:encoder|mixer)?_?(?:block|layer)s?[_/.]?(\d+)(?=/|$)", re.IGNORECASE)
# names of parameters within a layer
_PARAMETERS = frozenset({"kernel", "weight", "w", "bias", "b", "scale", "embedding"})
_KINDS = {
    "Dense_0": "fc1",
    "Dense_1": "fc2",
    "qkv": "qkv",
    "query": "query",
    "key": "key",
    "value": "value",
    "out": "out",
}


def block_of(name: str) -> str | None:
    """Reads the block from a scoped name: "Transformer/encoderblock_3/MlpBlock_0/…" is in "block_03"; None outside the
    blocks.

    If a model has several stacks, the names include theirs: "stage_2/block_5/attn/…" is in "stage_2/block_05".
    """
    if found := _STAGE.search(name):
        return f"{found[1]}/block_{int(found[2]):02d}"
    found = _BLOCK.search(name)
    return f"block_{int(found[1]):02d}" if found else None


def kind_of(name: str) -> str:
    """Reads the role of a linear from its weight's name: qkv, query, key, value, out, fc1, fc2; otherwise the layer's
    own name."""
    parts = name.split("/")
    return next((_KINDS[part] for part in reversed(parts) if part in _KINDS), parts[-2] if len(parts) > 1 else name)


def layer_of(name: str) -> str:
    """Reads the layer from its parameter's name: "stage_0/fc1" for "stage_0/fc1/kernel"; "mlp/w1" and "head" for a
    layer of that name."""
    scope, _, last = name.rpartition("/")
    return scope if scope and re.sub(r"\.\d+$", "", last) in _PARAMETERS else name


def within_block(name: str) -> str:
    """The part of a scoped name after the block: "attn/qkv" for "blocks_0/attn/qkv"; outside the blocks, the whole
    name."""
    found = _STAGE.search(name) or _BLOCK.search(name)
    return name[found.end() :].lstrip("/") if found else name


def layer_names(name: str) -> set[str]:
    """The names by which a pattern may refer to a layer: its own name, its block, and "block_03/fc2"."""
    block = block_of(name)
    return {name, block, f"{block}/{kind_of(name)}"} if block else {name}


def matches(patterns: Iterable[str], names: Iterable[str]) -> bool:
    """Whether any pattern (fnmatch; a plain scope matches everything under it) matches any of the names."""
    names = list(names)
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"{p}/*") for p in patterns for name in names)


def check_patterns(option: str, patterns: Sequence[str], universe: Iterable[str]) -> None:
    """Refuses patterns that match nothing.

    Args:
        option: the config key, for the message.
        patterns: what was given.
        universe: every valid name.

    Raises:
        UsageError: a pattern matches no name.
    """
    universe = set(universe)
    for pattern in patterns:
        if not matches([pattern], universe):
            raise UsageError(
                f"{option}: {pattern!r} matches no block, layer or node.{nearest(pattern, universe)}",
                fix=HOW_TO_NAME,
            )
