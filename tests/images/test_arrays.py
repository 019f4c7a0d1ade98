"""Images that are arrays already: every order of values, every compression, and what is no such file."""

import io
import zipfile

import numpy as np
import pytest

from vit_convert.core.errors import CalibrationError
from vit_convert.images.arrays import read_arrays

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)


def save(path, compressed=False, **arrays):
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_values_come_back_as_they_were(tmp_path, compressed, order):
    images = np.array(IMAGES, order=order)
    got, labels = read_arrays(save(tmp_path / "a.npz", compressed, other=np.ones(3), images=images))
    assert labels is None
    assert got.dtype == np.uint8 and np.array_equal(got, IMAGES)
    assert isinstance(got, np.memmap) != compressed


@pytest.mark.parametrize("before", [0, 1, 87, 128, 200, 255, 1000])
def test_wherever_they_lie_in_the_file(tmp_path, before):
    with zipfile.ZipFile(save(tmp_path / "a.npz", images=IMAGES)) as archive:
        content = archive.read("images.npy")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x", bytes(before))
        archive.writestr("images.npy", content)
    assert np.array_equal(read_arrays(tmp_path / "b.npz")[0], IMAGES)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, ">i4", np.int64, np.uint16])
def test_labels_are_whole_numbers_of_any_kind(tmp_path, dtype):
    _, labels = read_arrays(save(tmp_path / "a.npz", images=IMAGES, labels=np.array([7, 3], dtype)))
    assert labels.tolist() == [7, 3] and labels.dtype == np.int64


def test_a_label_beyond_int64_is_refused_by_its_own_value(tmp_path):
    with pytest.raises(CalibrationError, match="label 9223372036854775813 is the number of no class"):
        read_arrays(save(tmp_path / "a.npz", images=IMAGES, labels=np.array([1, 2**63 + 5], np.uint64)))


@pytest.mark.parametrize(
    "labels",
    [np.zeros(2), np.array([True, False]), np.zeros((2, 1), int), np.zeros(3, int), np.array(1), np.array(["a", "b"])],
)
def test_labels_of_another_kind(tmp_path, labels):
    with pytest.raises(CalibrationError) as error:
        read_arrays(save(tmp_path / "a.npz", images=IMAGES, labels=labels))
    assert f"`labels` is {labels.dtype} {list(labels.shape)}, needed are integers [2]" in str(error.value)
    assert "numpy.savez" in error.value.fix and error.value.exit_code == 6


@pytest.mark.parametrize(
    "images", [IMAGES[0], IMAGES[None], IMAGES[..., :2], IMAGES[..., 0], IMAGES.astype(np.int8), IMAGES.astype(float)]
)
def test_images_of_another_kind(tmp_path, images):
    with pytest.raises(CalibrationError) as error:
        read_arrays(save(tmp_path / "a.npz", images=images))
    assert f"`images` is {images.dtype} {list(images.shape)}, needed is uint8 [N, H, W, 3]" in str(error.value)
    assert "numpy.savez" in error.value.fix


@pytest.mark.parametrize("compressed", [False, True])
def test_no_images_and_images_without_a_pixel(tmp_path, compressed):
    got, labels = read_arrays(save(tmp_path / "a.npz", compressed, images=IMAGES[:0], labels=np.zeros(0, int)))
    assert got.shape == (0, 4, 5, 3) and labels.shape == (0,)
    for images in (IMAGES[:, :0], IMAGES[:, :, :0]):
        with pytest.raises(CalibrationError, match="which holds no pixel"):
            read_arrays(save(tmp_path / "a.npz", compressed, images=images))


def test_archives_without_images(tmp_path):
    with pytest.raises(CalibrationError) as error:
        read_arrays(save(tmp_path / "a.npz", pictures=IMAGES, labels=np.zeros(2, int)))
    assert f"images {tmp_path}/a.npz: holds ['pictures', 'labels'], not `images`" == str(error.value)


@pytest.mark.parametrize("name", ["images", "labels"])
def test_pickled_objects_are_never_loaded(tmp_path, name):
    arrays = {"images": IMAGES, name: np.array([object(), None])}
    with pytest.raises(CalibrationError, match=rf"not a readable \.npz \({name}\.npy is a pickled object array\)"):
        read_arrays(save(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("change", [b"x", -1])
def test_a_member_of_another_length_than_its_header_says(tmp_path, compression, change):
    with zipfile.ZipFile(save(tmp_path / "a.npz", images=IMAGES)) as archive:
        content = archive.read("images.npy")
    wrong = content + change if isinstance(change, bytes) else content[:change]
    with zipfile.ZipFile(tmp_path / "b.npz", "w", compression) as archive:
        archive.writestr("images.npy", wrong)
    said = rf"images\.npy: {120 + len(wrong) - len(content)} bytes, shape \(2, 4, 5, 3\) of uint8 needs 120"
    with pytest.raises(CalibrationError, match=said) as error:
        read_arrays(tmp_path / "b.npz")
    assert "numpy.savez" in error.value.fix


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_member_that_claims_another_number_of_images(tmp_path, count):
    """In its header and the archive's directory alike: what follows in the file are no pixels of it."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (count, 4, 5, 3)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + IMAGES.tobytes())
        archive.writestr("other", bytes(1000))
    whole = (tmp_path / "a.npz").read_bytes()
    at = whole.index(b"PK\1\2") + 24
    (tmp_path / "a.npz").write_bytes(
        whole[:at] + (len(header.getvalue()) + 60 * count).to_bytes(4, "little") + whole[at + 4 :]
    )
    with pytest.raises(CalibrationError, match=r"not a readable \.npz \(it is stored in"):
        read_arrays(tmp_path / "a.npz")


def test_what_is_no_archive(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK, and no more")
    for path in (tmp_path / "a.npz", tmp_path / "gone.npz"):
        with pytest.raises(CalibrationError, match=r"not a readable \.npz"):
            read_arrays(path)
