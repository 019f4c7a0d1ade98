"""From a file to a model's parameters, for any family: everything present, nothing left over, every value finite."""

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Sequence

from vit_convert.checkpoint.containers import read_container, split_subtree, verify
from vit_convert.checkpoint.select import select
from vit_convert.core.config import read_outputs
from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.core.manifest import hash_once
from vit_convert.families.family import Asked, Family, Loaded, Size
from vit_convert.families.registry import families as known_families
from vit_convert.families.registry import family_named, family_of, tower_family_of

_TOWERS = {"img": "image", "image": "image", "txt": "text", "text": "text"}  # by the suffix after the file's name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Loaded):
    """A checkpoint file that was identified and verified.

    Attributes:
        path: the file.
        family: of its model.
        hashing: of the file, in a thread; `sha256` waits for it.
    """

    path: pathlib.Path
    family: Family
    hashing: "concurrent.futures.Future[str]"

    @property
    def sha256(self) -> str:
        """The file's sha256, in hex."""
        return self.hashing.result()


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    family: str = "auto",
    families: Sequence[str] = (),
    variant: str = "auto",
    image_size: Size | None = None,
    outputs: str = "auto",
    posemb_grid: Size | None = None,
    normalize: bool = True,
    text_length: int | None = None,
) -> Checkpoint:
    """Loads a checkpoint of any family and layout, strictly.

    Args:
        path: `.npz`, `.safetensors` or `.msgpack`; `file.npz:img` and `file.npz:txt` take one tower of two, or a
            sub-tree of that name.
        family: "auto", or the name of the family to which it must belong.
        families: further ones, see `registry.families`.
        variant: "auto" reads it from the shapes; a name such as "B/32" is checked against them.
        image_size: (height, width) in pixels at which the model shall run; None keeps the checkpoint's.
        outputs: see `families.outputs`, separated by commas; "auto" for the model's main purpose.
        posemb_grid: (rows, columns) of the stored position table if it is not square.
        normalize: divide a tower's embeddings by their norm.
        text_length: tokens that a text tower takes, if fewer than the checkpoint's; None keeps the checkpoint's.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: the file does not hold exactly the model that it should.
        UsageError: an argument has no meaning for this model.
    """
    read_outputs(outputs)  # before anything is opened
    known = known_families(families)
    if family != "auto":
        family_named(family, known)  # before anything is opened
    name, subtree = split_subtree(path)
    file = pathlib.Path(name)
    everything = read_container(file).leaves
    prefix, stored = select(everything, "", str(file))
    tower = ""
    if paired := tower_family_of(stored.keys(), asked=family, known=known):
        found, layout, towers = paired
        tower = _tower(str(file), subtree, towers)
    else:
        prefix, stored = select(everything, subtree, str(file))
        found, layout = family_of(stored.keys(), str(file), asked=family, known=known)
    asked = Asked(
        file, prefix, everything.keys(), variant, image_size, outputs, posemb_grid, tower, normalize, text_length
    )
    loaded = found.load(stored, layout, asked)
    if text_length is not None and not loaded.text:
        raise UsageError(f"{file}: text_length={text_length}: the model takes no text", fix="Leave it out.")
    pool = concurrent.futures.ThreadPoolExecutor(1)
    hashing = pool.submit(hash_once, file)  # once for both towers of a pair
    pool.shutdown(wait=False)
    verify(file, (leaf for name, leaf in stored.items() if name not in loaded.unused))
    fields = {field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)}
    return Checkpoint(**fields, path=file, family=found, hashing=hashing)


def towers_in(path: str | os.PathLike[str], *, family: str = "auto", families: Sequence[str] = ()) -> tuple[str, ...]:
    """The towers that a path refers to: ("image", "text") for a checkpoint with both, a single one if it has only one
    or the path names it, () for any other.

    Args:
        path: see `load_checkpoint`. Only the names of its leaves are read.
        family: "auto", or the name of the family to which it must belong.
        families: further ones, see `registry.families`.

    Raises:
        CheckpointError: the file cannot be read.
        UsageError: the checkpoint lacks the named tower.
    """
    name, subtree = split_subtree(path)
    _, stored = select(read_container(name).leaves, "", name)
    paired = tower_family_of(stored.keys(), asked=family, known=known_families(families))
    if paired is None:
        return ()
    return (_tower(name, subtree, paired[2]),) if subtree else paired[2]


def _tower(file: str, subtree: str, towers: Sequence[str]) -> str:
    """The requested tower of a checkpoint: the one named after the file, or the only one.

    Raises:
        CheckpointError: it has two, and none is named.
        UsageError: it lacks the named one.
    """
    there = " and ".join(f"{file}:{'img' if tower == 'image' else 'txt'}" for tower in towers)
    if not subtree:
        if len(towers) == 1:
            return towers[0]
        raise CheckpointError(f"{file}: an image tower and a text tower", fix=f"Name one: {there}.")
    tower = _TOWERS.get(subtree.strip("/"), "")
    if tower not in towers:
        raise UsageError(f"{file}:{subtree}: the checkpoint has no such tower", fix=f"It has {there}.")
    return tower
