"""From a file to a model's parameters, whatever its family: everything present, nothing left over, every value
finite."""

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Sequence

from vit_convert.checkpoint.containers import read_container, split_subtree, verify
from vit_convert.checkpoint.select import select
from vit_convert.core.bundle import hash_file
from vit_convert.core.errors import UsageError, nearest
from vit_convert.families.family import Asked, Family, Loaded, Size
from vit_convert.families.registry import families as known_families
from vit_convert.families.registry import family_named, family_of

OUTPUTS = ("logits", "features")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Loaded):
    """A checkpoint file, understood and verified.

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
    outputs: str = "logits",
    posemb_grid: Size | None = None,
) -> Checkpoint:
    """Loads a checkpoint of any family and layout, strictly.

    Args:
        path: `.npz` or `.safetensors`; `file.npz:img` takes one sub-tree, as in big_vision.
        family: "auto", or the name of the family that it must be of.
        families: further ones, see `registry.families`.
        variant: "auto" reads it from the shapes; a name such as "B/32" is checked against them.
        image_size: (height, width) in pixels that the model is to run at; None keeps the checkpoint's.
        outputs: "logits", or "features" to leave the head out.
        posemb_grid: (rows, columns) of the stored position table where it is not square.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: the file does not hold, leaf for leaf, the model that it should.
        UsageError: an argument has no meaning for this model.
    """
    if outputs not in OUTPUTS:
        raise UsageError(
            f"outputs {outputs!r}: unknown.{nearest(outputs, OUTPUTS)}", fix=f"Use {' or '.join(OUTPUTS)}."
        )
    known = known_families(families)
    if family != "auto":
        family_named(family, known)  # before anything is opened
    name, subtree = split_subtree(path)
    file = pathlib.Path(name)
    everything = read_container(file).leaves
    prefix, stored = select(everything, subtree, str(file))
    found, layout = family_of(stored.keys(), str(file), asked=family, known=known)
    loaded = found.load(
        stored, layout, Asked(file, prefix, everything.keys(), variant, image_size, outputs, posemb_grid)
    )
    pool = concurrent.futures.ThreadPoolExecutor(1)
    hashing = pool.submit(hash_file, file)
    pool.shutdown(wait=False)
    verify(file, (leaf for name, leaf in stored.items() if name not in loaded.unused))
    fields = {field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)}
    return Checkpoint(**fields, path=file, family=found, hashing=hashing)
