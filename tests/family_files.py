"""Files of the families' tests: loading one by its family, and writing one with leaves changed."""

import pathlib

import numpy as np

from vit_convert.checkpoint.containers import read_container
from vit_convert.families.family import Asked


def load(family, path, **asked):
    """Loads a file as a family does."""
    leaves = read_container(path).leaves
    layout = family.match(leaves)
    assert layout is not None
    return family.load(leaves, layout, Asked(pathlib.Path(path), **asked))


def outputs(family, path, images, **asked):
    """What the Flax model of a file computes of images."""
    return family.model(load(family, path, **asked)).run(images)


def rewrite(path, change):
    """Saves the `.npz` again with what `change`, given its arrays, made of them."""
    arrays = dict(np.load(path))
    np.savez(path, **(change(arrays) or arrays))
    return path


def without(arrays, name):
    """The arrays but one."""
    return {key: value for key, value in arrays.items() if key != name}
