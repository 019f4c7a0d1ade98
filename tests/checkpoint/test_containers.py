import mmap
import pathlib
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy

from vit_convert.checkpoint import containers
from vit_convert.checkpoint.containers import read_container
from vit_convert.checkpoint.load import load_checkpoint


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
    # Headers, names and the buffers of the scan: 4 threads with at most 1 MiB read, its bytes again in the zip module, and a mask.
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
    assert largest < 12 << 20  # 4 MiB and the largest leaf, 2.3 MiB; the rest is what else this process touches for the first time
    assert float(kept.sum()) == total  # a view outlives its pages


def resident_file_bytes():
    return 1024 * int(pathlib.Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0])
