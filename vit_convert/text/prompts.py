"""Prompts as people write them: one per line, or class names and templates."""

import os
from collections.abc import Sequence

from vit_convert.core.errors import CalibrationError, UsageError
from vit_convert.text.files import read_lines

_CLASSES = "Save them as UTF-8, one a line; token ids belong into config.text.evaluation.data."
_MOST_PROMPTS = 1 << 22  # classes times templates; more is surely a mistake


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Reads prompts, one per line; empty lines are skipped.

    Args:
        path: a UTF-8 text file.

    Raises:
        CalibrationError: it cannot be read, or holds no prompt.
    """
    prompts = [line.strip() for line in read_lines(path, "prompts") if line.strip()]
    if not prompts:
        raise CalibrationError(f"prompts {path}: no line in it", fix="Write one prompt a line.")
    return prompts


def read_classes(path: str | os.PathLike[str]) -> list[str]:
    """Reads class names, one per line, in the order of their numbers.

    Args:
        path: a UTF-8 text file.

    Raises:
        CalibrationError: it cannot be read, or a line is empty or repeated.
    """
    names = [line.strip() for line in read_lines(path, "classes", fix=_CLASSES)]
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        if not name or seen.setdefault(name, i) != i:
            found = f"{name!r} for a second time" if name else "empty"
            raise CalibrationError(
                f"classes {path}: line {i + 1} is {found}", fix="List the classes in the order of their numbers."
            )
    if not names:
        raise CalibrationError(f"classes {path}: no line in it", fix="List the classes in the order of their numbers.")
    return names


def read_templates(given: Sequence[str]) -> list[str]:
    """Templates of prompts, each with {} for the name of a class.

    Args:
        given: templates, and paths of files that hold one per line; empty to use the bare names.

    Raises:
        UsageError: a template without {}.
        CalibrationError: a file cannot be read.

    Example:
        >>> read_templates(["a photo of a {}", "{}"])
        ['a photo of a {}', '{}']
    """
    found: list[str] = []
    for entry in given or ("{}",):
        found += [entry] if "{}" in entry else read_prompts(entry) if os.path.isfile(entry) else [entry]
    for template in found:
        if "{}" not in template:
            raise UsageError(
                f"template {template!r}: no {{}} in it, and no such file",
                fix="Write {} where the class's name belongs.",
            )
    return found


def filled(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The prompts of all classes: each class with every template, class after class.

    Args:
        classes: their names.
        templates: see `read_templates`.

    Raises:
        UsageError: there are too many.

    Example:
        >>> filled(["cat", "dog"], ["a {}", "the {}"])
        ['a cat', 'the cat', 'a dog', 'the dog']
    """
    if len(classes) * len(templates) > _MOST_PROMPTS:
        raise UsageError(
            f"{len(classes):,} classes with {len(templates):,} templates: at most {_MOST_PROMPTS:,} prompts"
        )
    return [template.replace("{}", name) for name in classes for template in templates]
