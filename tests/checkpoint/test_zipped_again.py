"""Checkpoints that somebody unpacked and zipped again: read as the file that they were, or refused by the member's
name."""

import zipfile

import numpy as np
import pytest

from vit_convert.core.errors import CheckpointError
from vit_convert.families.load import load_checkpoint


@pytest.fixture
def zipped(checkpoint, tmp_path):
    """Writes a checkpoint's members anew, after a change to their list of (name, content)."""
    path = checkpoint("mu/16")
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]

    def write(change):
        with zipfile.ZipFile(tmp_path / "again.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in change(members):
                archive.writestr(name, content)
        return path, tmp_path / "again.npz"

    return write


def folders(members):
    names = {"/".join(name.split("/")[:depth]) + "/" for name, _ in members for depth in range(1, name.count("/") + 1)}
    return [(name, b"") for name in sorted(names)]


@pytest.mark.parametrize(
    "change",
    [
        lambda members: folders(members) + members,
        lambda members: members + [(f"__MACOSX/{name.replace('/', '/._')}", b"\0\5\x16\7") for name, _ in members],
        lambda members: [*members, (".DS_Store", b"x"), ("Transformer/.DS_Store", b"x"), ("head/._kernel.npy", b"x")],
        lambda members: [(name.removesuffix(".npy"), content) for name, content in members],
    ],
    ids=["folders", "__MACOSX", ".DS_Store", "no suffix"],
)
def test_what_zipping_adds_is_passed_over(zipped, change):
    path, again = zipped(change)
    wanted, got = load_checkpoint(path), load_checkpoint(again)
    assert list(got.params) == list(wanted.params)
    assert all(np.array_equal(got.params[name], wanted.params[name]) for name in wanted.params)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda members: [(f"ViT/{name}", content) for name, content in members], "no known layout; it holds ViT/"),
        (lambda members: [*members, ("README.txt", b"hello")], "README.txt"),
        (lambda members: [*members, members[0]], "there are two of that name"),
        (lambda members: [(name.replace("/", "\\"), content) for name, content in members], "not a parameter's name"),
        (lambda members: [(f"../{name}", content) for name, content in members], "not a parameter's name"),
        (lambda members: [], "no parameters"),
    ],
    ids=["folder around", "readme", "twice", "Windows", "climbing", "nothing"],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_is_another_file_is_refused(zipped, change, named):
    _, again = zipped(change)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(again)
    assert named in str(error.value)
