"""A model repository: folders that appear whole, each with its config and the files of one version."""

import dataclasses
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence

from vit_convert.core.bundle import atomic
from vit_convert.core.errors import UsageError

HEADER = "# Written by vit_convert"  # the beginning of each of our configs

_SHIM = '''"""Written by vit_convert: the code is in the package, which the Python that Triton runs must have."""

from vit_convert.serve.triton.models.{} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

Content = pathlib.Path | bytes | str  # a file to copy, or its content


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """One model.

    Attributes:
        name: of the folder, and of the model.
        config: text of `config.pbtxt`.
        version: number of its version folder.
        files: of the version, by path in its folder; empty for an ensemble.
        configs: further configs for --model-config-name, by name.
        beside: files beside the config, by path: labels and samples.
    """

    name: str
    config: str
    version: int = 1
    files: Mapping[str, Content] = dataclasses.field(default_factory=dict)
    configs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beside: Mapping[str, Content] = dataclasses.field(default_factory=dict)


def shim(module: str) -> str:
    """The `model.py` that names a class of ours: `vit_convert.serve.triton.models.<module>`."""
    return _SHIM.format(module)


def write_models(root: str | os.PathLike[str], models: Sequence[ModelFolder]) -> list[pathlib.Path]:
    """Writes models into a repository; other models, and other versions of these models, stay.

    Args:
        root: of the repository.
        models: to write; those that an ensemble needs come before it, because a polling server would load it at once.

    Returns:
        Their folders.

    Raises:
        UsageError: two models share a name, a name cannot be one, a file is in the way, or the disk is full or cannot
            be written.
    """
    root = pathlib.Path(root)
    names = [model.name for model in models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{root}: two models are called {', '.join(twice)}", fix="Write them one by one, with --name.")
    if wrong := [name for name in names if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name)]:
        raise UsageError(
            f"{root}: {wrong[0]!r} cannot be a model's name, which is a folder and a part of addresses",
            fix="Letters, digits, _, - and . make a name: give another --name.",
        )
    for place in (root, *(root / name for name in names)):
        if place.exists() and not place.is_dir():
            fix = "Give another --output or --name."
            raise UsageError(f"{place}: is a file, and a repository has folders", fix=fix)
    for model in models:
        _write(root / model.name, model)
    return [root / name for name in names]


def _write(folder: pathlib.Path, model: ModelFolder) -> None:
    config = folder / "config.pbtxt"
    if config.exists() and not config.read_text(encoding="utf-8", errors="replace").startswith(HEADER):
        raise UsageError(
            f"{config}: was not written by this command", fix="Give another --output or --name; nothing was changed."
        )
    with atomic(folder / str(model.version)) as version:
        version.mkdir()
        for name, content in model.files.items():
            _put(version / name, content)
    for name, content in {
        **model.beside,
        **{f"configs/{key}.pbtxt": text for key, text in model.configs.items()},
    }.items():
        with atomic(folder / name) as temporary:
            _put(temporary, content)
    with atomic(config) as temporary:  # last: a folder without it is not a model yet
        _put(temporary, model.config)


def _put(path: pathlib.Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pathlib.Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
