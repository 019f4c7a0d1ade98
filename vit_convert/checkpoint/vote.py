"""Sizes by majority, so that a single missing or transposed leaf is reported and does not make every other leaf
look wrong."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from vit_convert.checkpoint.containers import Leaf


def most_common(leaves: Mapping[str, Leaf], *patterns_and_axes: tuple[str, int]) -> int:
    """The length that most leaves of one kind have along an axis.

    Args:
        leaves: by canonical name.
        patterns_and_axes: regular expressions, searched for in the names, with the axis to read. If one kind of leaf is
            missing everywhere (a model without biases), the next one is used.

    Returns:
        The length; 0 if no leaf matches.
    """
    for pattern, axis in patterns_and_axes:
        shapes = [leaf.shape for name, leaf in leaves.items() if re.search(pattern, name)]
        votes = Counter(shape[axis] for shape in shapes if -len(shape) <= axis < len(shape))
        if votes:
            return votes.most_common(1)[0][0]
    return 0


def count_numbers(names: Iterable[str], pattern: str) -> int:
    """How many different numbers (group 1 of the pattern) there are among the names that begin with it."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def patch_side(leaves: Mapping[str, Leaf], kernel: str, width: int) -> int:
    """The side of the patch that a kernel [side, side, 3, width] takes, whatever the order of its axes; 1 if it is not
    found."""
    sides = Counter(leaves[kernel].shape) - Counter((3, width)) if kernel in leaves else Counter()
    return sides.most_common(1)[0][0] if sides else 1
