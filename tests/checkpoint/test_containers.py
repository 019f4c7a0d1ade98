import io
import mmap
import pathlib
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vit_convert.checkpoint import containers
from vit_convert.checkpoint.containers import read_container, verify
from vit_convert.core.errors import CheckpointError
from vit_convert.families.load import load_checkpoint


def memory_map_of(array):
    while array is not None and not isinstance(array, mmap.mmap):
        array = array.base
    return array


@pytest.mark.parametrize("layout", ["vit_jax", "big_vision_scan"])
def test_uncompressed_float32_is_never_copied(checkpoint, layout):
    path = checkpoint("S/16", layout=layout, image_size=(224, 224))
    size = path.stat().st_size
    tracemalloc.start()
    loaded = load_checkpoint(path)
    arrays = dict(loaded.params)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    file_map = memory_map_of(arrays["head/kernel"])
    for name, array in arrays.items():
        if not (name == "cls" and layout == "vit_jax"):  # which is computed: its row of the table is added
            assert memory_map_of(array) is file_map, name
            assert np.shares_memory(array, np.frombuffer(file_map, np.uint8)), name
            assert not array.flags.writeable
    # Headers, names and the buffers of the scan: 4 threads with at most 1 MiB read, its bytes again in the zip module,
    # and a mask.
    assert peak < 16 << 20 < size / 4


def test_safetensors_are_memory_mapped(checkpoint, tmp_path):
    safetensors.numpy.save_file(dict(np.load(checkpoint("mu/16"))), tmp_path / "same.safetensors")
    params = load_checkpoint(tmp_path / "same.safetensors").params
    assert memory_map_of(params["head/kernel"]) is not None


def test_headers_alone_are_read_at_first(tmp_path):
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "c.npz", big=rng.standard_normal(2_000_000), small=np.arange(6).reshape(2, 3))
    tracemalloc.start()
    leaves = read_container(tmp_path / "c.npz")
    assert leaves.leaves["big"].shape == (2_000_000,) and leaves.leaves["small"].dtype == np.int64
    assert tracemalloc.get_traced_memory()[1] < 2 << 20  # the inflated array has 16 MB
    tracemalloc.stop()
    assert (leaves["small"] == [[0, 1, 2], [3, 4, 5]]).all()
    assert leaves["big"] is leaves["big"]  # inflated once


def test_every_kind_of_array_comes_back(tmp_path):
    arrays = {
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3), np.float32),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big_endian": np.arange(4, dtype=">f4"),
        "half/nested": np.arange(3, dtype=np.float16),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "all.npz", **arrays)
        leaves = read_container(tmp_path / "all.npz")
        assert list(leaves) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(leaves[name], array)
            assert leaves[name].dtype == array.dtype


def test_sha256(checkpoint):
    import hashlib

    path = checkpoint("mu/16")
    assert load_checkpoint(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_pages_of_the_file_do_not_pile_up(checkpoint, monkeypatch):
    monkeypatch.setattr(containers, "_RESIDENT_BYTES", 4 << 20)
    leaves = read_container(checkpoint("S/16", image_size=(224, 224)))  # 84 MiB
    before, largest = resident_file_bytes(), 0
    kept = leaves["embedding/kernel"]
    total = float(kept.sum())
    for name in leaves:
        leaves[name].sum()
        largest = max(largest, resident_file_bytes() - before)
    # 4 MiB and the largest leaf, 2.3 MiB; the rest is what else this process touches for the first time
    assert largest < 12 << 20
    assert float(kept.sum()) == total  # a view outlives its pages


def resident_file_bytes():
    return 1024 * int(pathlib.Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0])


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_pages_are_kept_below_the_bound(checkpoint):
    leaves = read_container(checkpoint("S/16", image_size=(224, 224)))  # 84 MiB of 256
    before = resident_file_bytes()
    for name in leaves:
        leaves[name].sum()
    # to give pages back for every leaf would be to read them all again
    assert resident_file_bytes() - before > 60 << 20


VALUES = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@pytest.mark.parametrize("kind", ["npz", "deflated", "safetensors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("value", VALUES)
def test_a_value_that_is_not_finite_is_found_wherever_it_lies(tmp_path, kind, dtype, value):
    """A leaf is scanned in pieces: the first of them, its last value, the next one, far behind, the very last."""
    shape = (700, 1000)
    piece = containers._CHUNK_BYTES // np.dtype(dtype).itemsize
    assert shape[0] * shape[1] > 1.3 * piece
    for place in (0, piece - 1, piece, shape[0] * shape[1] - 3, shape[0] * shape[1] - 1):
        array = np.zeros(shape, dtype)
        array.reshape(-1)[place] = VALUES[value]
        path = write_leaf(tmp_path, kind, array)
        row, column = divmod(place, shape[1])
        with pytest.raises(CheckpointError, match=rf"big\[{row}, {column}\]: {value}, a parameter must be finite"):
            verify(path, read_container(path).leaves.values())


def test_a_value_beyond_float32_and_one_that_lies_in_column_order(tmp_path):
    array = np.zeros((700, 1000), np.float64)
    array[600, 7] = 1e39
    with pytest.raises(CheckpointError, match=r"big\[600, 7\]: inf"):
        verify(path := write_leaf(tmp_path, "npz", array), read_container(path).leaves.values())
    array[600, 7] = np.inf
    for kind in ("npz", "deflated"):
        path = write_leaf(tmp_path, kind, np.asfortranarray(array))
        with pytest.raises(CheckpointError, match=r"big\[600, 7\]: inf"):
            verify(path, read_container(path).leaves.values())


@pytest.mark.parametrize("kind", ["npz", "deflated"])
def test_headers_of_npy_version_2(tmp_path, kind):
    """What numpy writes where a header is long: another length before it, and values behind it all the same."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    content = io.BytesIO()
    np.lib.format.write_array(content, array, version=(2, 0))
    with zipfile.ZipFile(
        tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED
    ) as archive:
        archive.writestr("b/c.npy", content.getvalue())
    np.testing.assert_array_equal(read_container(tmp_path / "a.npz")["b/c"], array)


def write_leaf(folder, kind, array):
    path = folder / f"{kind}.{'safetensors' if kind == 'safetensors' else 'npz'}"
    if kind == "safetensors":
        safetensors.numpy.save_file({"big": array}, path)
    else:
        (np.savez_compressed if kind == "deflated" else np.savez)(path, big=array)
    return path
