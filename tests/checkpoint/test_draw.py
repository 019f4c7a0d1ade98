"""Random files: what numpy and safetensors read back, and values that depend on seed and name alone."""

import json
import math
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vit_convert.checkpoint.draw import draw, normal, write_npz, write_safetensors

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
A, B = (
    np.random.default_rng(seed).standard_normal(shape).astype(np.float32) for seed, shape in ((0, (4, 3)), (1, (5,)))
)


def test_values_depend_on_seed_and_name_alone():
    """As anybody can draw them again with numpy."""
    again = np.random.default_rng([7, zlib.crc32(b"a/b")]).standard_normal((4, 3), np.float32)
    assert np.array_equal(normal(7, "a/b", (4, 3)), again) and normal(7, "a/b", (4, 3)).dtype == np.float32
    assert not np.array_equal(normal(8, "a/b", (4, 3)), again) and not np.array_equal(normal(7, "a/c", (4, 3)), again)


@pytest.mark.parametrize(
    ("name", "shape", "mean", "deviation"),
    [
        ("x/scale", (20_000,), 1, 0.1),
        ("x/bias", (20_000,), 0, 0.02),
        ("x/kernel", (100, 400), 0, 1 / math.sqrt(100)),
        ("x/kernel", (3, 3, 16, 300), 0, 1 / math.sqrt(144)),
        ("kernel", (25, 1000), 0, 1 / 5),
    ],
)
def test_sizes_of_the_values(name, shape, mean, deviation):
    """So that what goes in with variance 1 comes out with variance 1."""
    values = draw(0, name, shape)
    count = math.prod(shape)
    assert (values.shape, values.dtype) == (shape, np.float32)
    assert abs(values.mean() - mean) < 5 * deviation / math.sqrt(count)
    assert abs(values.std() / deviation - 1) < 5 / math.sqrt(2 * count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_npz_as_numpy_reads_it(tmp_path, dtype):
    write_npz(tmp_path / "a.npz", iter([("x/a", (4, 3), iter([A[:1], A[1:]])), ("b", (5,), (B,))]), dtype)
    with np.load(tmp_path / "a.npz") as read:
        assert list(read) == ["x/a", "b"]
        for name, values in (("x/a", A), ("b", B)):
            got = read[name].view(DTYPES[dtype]) if dtype == "bfloat16" else read[name]
            assert got.dtype == DTYPES[dtype] and np.array_equal(got, values.astype(DTYPES[dtype]))
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_float32_is_what_nobody_asked_otherwise(tmp_path):
    write_npz(tmp_path / "a.npz", [("b", (5,), [B])])
    write_safetensors(tmp_path / "a.safetensors", [("b", (5,), lambda: B)])
    assert (
        np.load(tmp_path / "a.npz")["b"].dtype
        == safetensors.numpy.load_file(tmp_path / "a.safetensors")["b"].dtype
        == np.float32
    )


@pytest.mark.parametrize(("count", "large"), [(249, False), (250, True), (600, True)])
def test_members_beyond_what_a_plain_zip_holds(tmp_path, monkeypatch, count, large):
    """Half of zipfile's limit, here 2000 bytes, leaves room for the header: of 4 bytes each, 250 values are it."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 2000)
    values = np.arange(count, dtype=np.float32)
    write_npz(tmp_path / "a.npz", [("a", (count,), [values])])
    header = (tmp_path / "a.npz").read_bytes()[:30]
    assert int.from_bytes(header[28:30], "little") == (20 if large else 0)  # an extra field for sizes of 64 bits
    assert np.array_equal(np.load(tmp_path / "a.npz")["a"], values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_as_its_own_reader_reads_it(tmp_path, dtype):
    computed = []

    def compute(values):
        computed.append(values.shape)
        return values

    write_safetensors(tmp_path / "a", [("x/a", (4, 3), lambda: compute(A)), ("b", (5,), lambda: compute(B))], dtype)
    assert computed == [(4, 3), (5,)]
    read = safetensors.numpy.load_file(tmp_path / "a")
    for name, values in (("x/a", A), ("b", B)):
        assert read[name].dtype == DTYPES[dtype] and np.array_equal(read[name], values.astype(DTYPES[dtype]))
    content = (tmp_path / "a").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0  # values begin where a float64 may
    assert list(json.loads(content[8 : 8 + length])) == ["x/a", "b"]
    assert len(content) == 8 + length + (12 + 5) * np.dtype(DTYPES[dtype]).itemsize


def test_what_fails_leaves_nothing(tmp_path):
    def fails():
        raise ValueError("out of luck")

    for write in (
        lambda: write_npz(tmp_path / "a.npz", [("a", (5,), (fails() for _ in range(1)))]),
        lambda: write_safetensors(tmp_path / "a", [("a", (5,), fails)]),
    ):
        with pytest.raises(ValueError, match="out of luck"):
            write()
    assert not list(tmp_path.iterdir())
