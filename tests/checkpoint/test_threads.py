"""Files read by several threads: under Python 3.12 and 3.13 members opened at once through one ZipFile fail with "Bad
CRC-32"."""

import concurrent.futures
import pathlib
import sys
import zipfile

import numpy as np
import pytest

from vit_convert.checkpoint.containers import read_container, verify
from vit_convert.core.errors import CheckpointError
from vit_convert.core.zip_member import FileState, open_member
from vit_convert.images.sources import open_images

SHIPPED = pathlib.Path(__file__).parents[2] / "checkpoints"
THREADS = 8


@pytest.fixture(autouse=True)
def _hasty_threads():
    """Threads that take turns after 10 µs instead of 5 ms: what fails once in five reads of a file then fails in
    each."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(params=["stored", "deflated"])
def shipped(request, tmp_path):
    """The checkpoint that ships, as it is and with its members compressed."""
    if request.param == "stored":
        return SHIPPED / "vit_digits.npz"
    np.savez_compressed(tmp_path / "deflated.npz", **np.load(SHIPPED / "vit_digits.npz"))
    return tmp_path / "deflated.npz"


def test_verifying_a_sound_file_never_fails(shipped):
    for _ in range(20):
        verify(shipped, read_container(shipped).leaves.values())


def test_threads_that_read_the_same_leaves(shipped):
    wanted = dict(np.load(shipped))
    leaves = read_container(shipped)
    names = list(wanted) * THREADS

    def read(name):
        np.testing.assert_array_equal(leaves[name], wanted[name])
        with leaves.leaves[name].open() as stream:
            return stream.read() == wanted[name].tobytes()

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(read, names))


def test_threads_that_read_images_of_an_archive(tmp_path):
    with (
        zipfile.ZipFile(SHIPPED / "digits" / "calibration.zip") as shipped,
        zipfile.ZipFile(tmp_path / "a.zip", "w") as archive,
    ):
        for member in shipped.infolist():
            content = shipped.read(member)
            # as the `zip` command writes: skipping it is what goes wrong
            member.extra = b"UT\x05\x00\x01\x00\x00\x00\x00"
            archive.writestr(member, content)
    source = open_images(tmp_path / "a.zip")
    wanted = [source.read(i) for i in range(len(source))]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for i, image in enumerate(pool.map(source.read, [*range(len(source))] * 10)):
            np.testing.assert_array_equal(image, wanted[i % len(source)])


def test_file_that_is_replaced_under_its_reader(tmp_path):
    """Half of one model and half of another is never a checkpoint."""
    path, other = tmp_path / "a.npz", tmp_path / "b.npz"
    np.savez_compressed(path, w=np.ones(1000, np.float32))
    np.savez_compressed(other, w=np.zeros(1000, np.float32))
    leaves = read_container(path).leaves
    other.replace(path)
    with pytest.raises(CheckpointError, match=r"w: damaged .*the file was changed"):
        verify(path, leaves.values())
    with pytest.raises(CheckpointError, match="the file was changed"):
        leaves["w"].read()


@pytest.fixture
def archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("ünï.txt", b"one" * 100)
        made.writestr("plain", b"two")
    return tmp_path / "a.zip"


def test_members_are_those_of_the_archive(archive):
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            with open_member(archive, member, FileState.of(archive)) as stream:
                assert stream.read() == opened.read(member)


@pytest.mark.parametrize(
    ("flag", "what"), [(0x1, "is encrypted"), (0x40, "is strongly encrypted"), (0x20, "is a compressed patch")]
)
def test_encrypted_members_are_refused(archive, flag, what):
    member = zipfile.ZipFile(archive).getinfo("plain")
    member.flag_bits |= flag
    with pytest.raises(NotImplementedError, match=f"plain {what}"):
        open_member(archive, member)


def test_header_of_another_member(archive):
    first, second = zipfile.ZipFile(archive).infolist()
    second.header_offset = first.header_offset
    with pytest.raises(zipfile.BadZipFile, match=r"its header is of 'ünï\.txt'"):
        open_member(archive, second)
    second.header_offset += 1
    with pytest.raises(zipfile.BadZipFile, match="its header is damaged"):
        open_member(archive, second)
