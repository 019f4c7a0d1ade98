"""Members of checkpoint files: every order and kind of values comes back, and every damage is refused by the member's
name."""

import io
import json
import os
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vit_convert.checkpoint import containers
from vit_convert.checkpoint.containers import Leaf, read_container, split_subtree, verify
from vit_convert.core.errors import CheckpointError

VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4) - 7


def npy(array, descr=None):
    content = io.BytesIO()
    header = {"descr": descr or np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(content, header)
    return content.getvalue() + array.tobytes()


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as made:
        for name, content in members:
            made.writestr(name, content)
    return path


def refused(path):
    with pytest.raises(CheckpointError) as error:
        read_container(path)
    assert str(path) in str(error.value) and error.value.exit_code == 3
    return str(error.value).removeprefix(f"{path}: "), error.value.fix


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8", "<i4", "|u1", "|b1", "<c8"])
def test_arrays_of_npz(tmp_path, save, order, dtype):
    arrays = {
        "a/b": np.asarray(VALUES.astype(dtype), order=order),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3), np.float32),
    }
    save(tmp_path / "a.npz", **arrays)
    leaves = read_container(tmp_path / "a.npz")
    assert list(leaves) == list(arrays) and len(leaves) == 3
    for name, array in arrays.items():
        leaf = leaves.leaves[name]
        assert (leaf.name, leaf.shape, leaf.dtype, leaf.size) == (name, array.shape, array.dtype, array.size)
        assert leaves[name].dtype == array.dtype and np.array_equal(leaves[name], array)
        with leaf.open() as stream:
            assert stream.read() == array.tobytes("A")
    assert leaves.leaves["a/b"].fortran == (order == "F")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_bfloat16_as_numpy_spells_it(tmp_path, compression):
    values = VALUES.astype(ml_dtypes.bfloat16)
    path = archive(tmp_path / "a.npz", [("a.npy", npy(values, "|V2"))], compression)
    assert read_container(path)["a"].dtype == values.dtype and np.array_equal(read_container(path)["a"], values)
    verify(path, read_container(path).leaves.values())
    other = archive(tmp_path / "b.npz", [("a.npy", npy(VALUES, "|V4"))], compression)
    assert read_container(other)["a"].dtype == np.dtype("V4")  # two bytes alone are it


SAFETENSORS = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_},
}


@pytest.mark.parametrize("dtype", SAFETENSORS)
def test_arrays_of_safetensors(tmp_path, dtype):
    values = VALUES.astype(SAFETENSORS[dtype])
    path = tmp_path / "a.bin"  # told by its content
    safetensors.numpy.save_file({"x": np.ones(3, np.float32), "a.b": values}, path, metadata={"format": "np"})
    leaves = read_container(path)
    assert set(leaves) == {"x", "a.b"}
    assert leaves["a.b"].dtype == values.dtype and np.array_equal(leaves["a.b"], values)
    assert (leaves.leaves["a.b"].name, leaves.leaves["a.b"].shape, leaves.leaves["a.b"].size) == ("a.b", (2, 3, 4), 24)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("before", [0, 1, 87, 128, 200, 255, 1000])
def test_wherever_they_lie_in_the_file(tmp_path, before, compression):
    path = archive(tmp_path / "a.npz", [("b", npy(np.zeros(before, np.uint8))), ("a.npy", npy(VALUES))], compression)
    leaves = read_container(path)
    assert np.array_equal(leaves["a"], VALUES)
    with leaves.leaves["a"].open() as stream:
        assert stream.read() == VALUES.tobytes()
    tensors = {"b": np.zeros(before, np.uint8), "a": VALUES}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", metadata={"x": "y" * (before % 8)})
    assert np.array_equal(read_container(tmp_path / "a.safetensors")["a"], VALUES)


def test_stored_values_are_views_that_cannot_be_written(tmp_path):
    np.savez(tmp_path / "a.npz", a=VALUES)
    np.savez_compressed(tmp_path / "b.npz", a=VALUES)
    view = read_container(tmp_path / "a.npz")["a"]
    assert not view.flags.writeable and not view.flags.owndata
    inflated = read_container(tmp_path / "b.npz")
    assert inflated["a"] is inflated["a"]  # inflated once


def test_leaves_are_computed_when_they_are_read():
    reads = []

    def read():
        reads.append(1)
        return VALUES

    leaf = Leaf("a", (2, 3, 4), VALUES.dtype, read)
    half = Leaf("h", (2,), np.dtype(np.float16), lambda: np.array([1, 2], np.float16))
    last = leaf.derive((3, 4), lambda values: values[-1], "[1]")
    assert (last.name, last.shape, last.dtype, last.size, reads) == ("a[1]", (3, 4), np.float32, 12, [])
    assert np.array_equal(last.read(), VALUES[-1]) and reads == [1]
    assert leaf.derive((1,), lambda values: values).name == "a"
    assert leaf.as_float32() is leaf
    wide = half.as_float32()
    assert (wide.name, wide.shape, wide.dtype, wide.read().dtype, wide.read().tolist()) == (
        "h",
        (2,),
        np.float32,
        np.float32,
        [1, 2],
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.npz", ("a.npz", "")),
        ("a.npz:img", ("a.npz", "img")),
        ("b/a.safetensors:img/vit", ("b/a.safetensors", "img/vit")),
        ("gs://b/a.npz:img", ("gs://b/a.npz", "img")),
        ("a.npz:", ("a.npz:", "")),
        ("a.bin:img", ("a.bin:img", "")),
        (".npz:img", (".npz:img", "")),
        ("a.npz:img:x", ("a.npz:img:x", "")),
        ("a.npz:b.npz:img", ("a.npz:b.npz", "img")),
    ],
)
def test_parts_of_files(path, expected):
    assert split_subtree(path) == expected


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_no_file(tmp_path):
    assert (
        refused(tmp_path)[0].startswith("a folder (a tensorstore or Orbax checkpoint?)")
        and ".npz" in refused(tmp_path)[1]
    )
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe")[0] == "not a regular file" and refused(tmp_path / "pipe")[1]
    assert refused(tmp_path / "gone.npz") == (
        "cannot be read (No such file or directory)",
        "Check the path, or give a https:// or gs:// address.",
    )
    with pytest.raises(CheckpointError, match=r"cannot be read \(.*null"):
        read_container("a\0.npz")


@pytest.mark.parametrize("content", [b"x", b"123456 {x", b"12345678x{"])
def test_what_is_no_checkpoint(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    assert refused(tmp_path / "a.npz") == (
        "not a zip file, so not an .npz",
        "Give an .npz, .safetensors or .msgpack checkpoint.",
    )


def test_what_begins_like_one(tmp_path):
    for content in (b"PK", b"PK\3\4aaaa{", b"PK\3\4" + bytes(40)):
        (tmp_path / "a.npz").write_bytes(content)
        said, fix = refused(tmp_path / "a.npz")
        assert said.startswith("truncated or damaged zip (") and "compare its size" in fix
    (tmp_path / "a.npz").write_bytes(b"12345678{")
    said, fix = refused(tmp_path / "a.npz")
    assert said.startswith("not a valid .safetensors file (") and fix == "Fetch the file again."


def test_a_dtype_of_safetensors_that_is_none_of_ours(tmp_path):
    header = json.dumps({"a": {"dtype": "U16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert refused(tmp_path / "a.safetensors") == (
        "a: dtype U16 is not supported",
        "Save the parameters as F32, F16 or BF16.",
    )


@pytest.mark.parametrize("name", ["/a", "a//b", "a/", "a\\b", "..", "a/../b", ".", "a/./b", ""])
def test_names_that_are_none(tmp_path, name):
    said, fix = refused(archive(tmp_path / "a.npz", [(f"{name}.npy", npy(VALUES))]))
    assert said == f"member {f'{name}.npy'!r}: not a parameter's name" and "'/'" in fix


@pytest.mark.parametrize("name", ["...", "a/.b", "a..b", "a b", "ü"])
def test_names_that_are_odd(tmp_path, name):
    assert list(read_container(archive(tmp_path / "a.npz", [(f"{name}.npy", npy(VALUES))]))) == [name]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_of_one_name(tmp_path):
    for names in (("a.npy", "a.npy"), ("a", "a.npy")):
        path = archive(tmp_path / "a.npz", [(name, npy(VALUES)) for name in names])
        assert refused(path)[0] == f"member {names[1]!r}: there are two of that name"


@pytest.mark.parametrize("name", ["__MACOSX/a.npy", "x/.DS_Store", ".DS_Store", "x/._a.npy", "._a", "x/"])
def test_what_zipping_adds(tmp_path, name):
    path = archive(tmp_path / "a.npz", [("a.npy", npy(VALUES)), (name, b"" if name.endswith("/") else b"x")])
    assert list(read_container(path)) == ["a"]


@pytest.mark.parametrize("name", ["x__MACOSX/a.npy", "DS_Store", "x/_a.npy", "a/__MACOSX/b", ".DS_Store/b", "._x/a"])
def test_what_it_does_not(tmp_path, name):
    path = archive(tmp_path / "a.npz", [("a.npy", npy(VALUES)), (name, npy(VALUES))])
    assert list(read_container(path)) == ["a", name.removesuffix(".npy")]


def test_a_folder_with_content_is_none(tmp_path):
    assert "not a parameter's name" in refused(archive(tmp_path / "a.npz", [("x/", b"x")]))[0]


@pytest.mark.parametrize("name", ["archive/data.pkl", "data.pkl"])
def test_files_of_pytorch(tmp_path, name):
    said, fix = refused(archive(tmp_path / "a.npz", [("a.npy", npy(VALUES)), (name, b"x")]))
    assert said == "a PyTorch file, not an .npz of a Flax model" and fix


def test_a_member_that_is_no_array(tmp_path):
    said, fix = refused(archive(tmp_path / "a.npz", [("README.txt", b"hello, this is none")]))
    assert said.startswith("member README.txt: unreadable (") and "numpy.savez" in fix


def test_pickled_objects(tmp_path):
    np.savez(tmp_path / "a.npz", p=np.array([object()], dtype=object))
    said, fix = refused(tmp_path / "a.npz")
    assert said == "member p: a pickled object array, which could run code when loaded" and "numpy.savez" in fix


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("change", [b"x", -1])
def test_a_member_of_another_length_than_its_header_says(tmp_path, compression, change):
    content = npy(VALUES)
    content = content + change if isinstance(change, bytes) else content[:change]
    said, _ = refused(archive(tmp_path / "a.npz", [("a.npy", content)], compression))
    assert said == f"member a: {96 + (1 if change == b'x' else -1)} bytes, shape (2, 3, 4) of float32 needs 96"


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("count", [23, *range(25, 120, 5), 10**6])
def test_a_member_that_claims_another_length(tmp_path, compression, count):
    """Its header and the directory agree on other values than were stored: what follows in the file are none of
    them."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
    path = archive(tmp_path / "a.npz", [("a.npy", header.getvalue() + VALUES.tobytes())], compression)
    whole = path.read_bytes()
    directory = whole.index(b"PK\1\2")
    claimed = (len(header.getvalue()) + 4 * count).to_bytes(4, "little")
    path.write_bytes(whole[: directory + 24] + claimed + whole[directory + 28 :])  # its size, uncompressed
    with pytest.raises(CheckpointError, match=r"a: unreadable \((it is stored in|Bad CRC)|a: damaged \("):
        verify(path, read_container(path).leaves.values())


# --- verification -----------------------------------------------------------------------------------------------------


@pytest.fixture
def _small_pieces(monkeypatch):
    monkeypatch.setattr(containers, "_CHUNK_BYTES", 16)  # four float32 values at a time


def write(path, array, kind):
    if kind == "safetensors":
        safetensors.numpy.save_file({"w": array}, path)
    else:
        (np.savez if kind == "stored" else np.savez_compressed)(path, w=array)
    return path


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("kind", ["stored", "deflated", "safetensors"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_place_of_a_leaf_is_looked_at(tmp_path, kind, dtype, order):
    verify(path := write(tmp_path / "a.npz", VALUES.astype(dtype), kind), read_container(path).leaves.values())
    if order == "F" and kind == "safetensors":
        pytest.skip("it has rows alone")
    for place in np.ndindex(*VALUES.shape):
        array = np.asarray(VALUES.astype(dtype), order=order)
        array[place] = np.nan
        path = write(tmp_path / "a.npz", array, kind)
        with pytest.raises(CheckpointError) as error:
            verify(path, read_container(path).leaves.values())
        assert str(error.value) == f"{path}: w[{', '.join(map(str, place))}]: nan, a parameter must be finite"
        assert error.value.fix == "The training diverged or the file is damaged."


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize(("value", "said"), [(np.inf, "inf"), (-np.inf, "-inf"), (1e39, "inf"), (-1e39, "-inf")])
def test_what_float32_does_not_hold(tmp_path, value, said):
    array = VALUES.astype(np.float64)
    array[1, 2, 0] = value
    array[1, 2, 3] = np.nan  # the first is named
    np.savez(tmp_path / "a.npz", ok=VALUES, w=array)
    with pytest.raises(CheckpointError, match=rf"w\[1, 2, 0\]: {said}, a parameter must be finite"):
        verify(tmp_path / "a.npz", read_container(tmp_path / "a.npz").leaves.values())
    array[1, 2] = 3e38
    np.savez(tmp_path / "a.npz", w=array)
    verify(tmp_path / "a.npz", read_container(tmp_path / "a.npz").leaves.values())


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_, np.complex64, "U1"])
def test_values_that_are_no_parameters(tmp_path, dtype):
    np.savez(tmp_path / "a.npz", w=np.zeros(3, dtype))
    with pytest.raises(
        CheckpointError, match=rf"a\.npz: w: dtype {np.dtype(dtype)}, parameters are floating-point numbers"
    ):
        verify(tmp_path / "a.npz", read_container(tmp_path / "a.npz").leaves.values())


@pytest.mark.parametrize("kind", ["stored", "deflated"])
def test_a_byte_that_was_flipped(tmp_path, kind):
    path = write(tmp_path / "a.npz", np.random.default_rng(0).standard_normal(1000).astype(np.float32), kind)
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    leaves = read_container(path)
    with pytest.raises(CheckpointError, match=rf"{path}: w: damaged \(.*\)") as error:
        verify(path, leaves.leaves.values())
    assert error.value.fix == "Fetch the file again."
    if kind == "deflated":
        with pytest.raises(CheckpointError, match=rf"{path}: w: damaged \("):
            leaves["w"]


def test_the_largest_leaf_comes_first(tmp_path, monkeypatch):
    """So that the threads end together."""
    seen = []
    monkeypatch.setattr(containers, "_verify_leaf", lambda path, leaf: seen.append(leaf.name))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    np.savez(tmp_path / "a.npz", small=np.ones(2), large=np.ones(9), middle=np.ones(5))
    verify(tmp_path / "a.npz", read_container(tmp_path / "a.npz").leaves.values())
    assert seen == ["large", "middle", "small"]


@pytest.mark.parametrize(("processors", "threads"), [(1, 1), (2, 2), (4, 4), (64, 4), (None, 1)])
def test_threads(monkeypatch, processors, threads):
    """Each holds a piece, and beyond four the memory is what they wait for."""
    asked, pool = [], containers.concurrent.futures.ThreadPoolExecutor
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    monkeypatch.setattr(containers.concurrent.futures, "ThreadPoolExecutor", lambda n: asked.append(n) or pool(n))
    verify("a", [])
    assert asked == [threads]


def test_pages_are_given_back_beyond_the_bound(tmp_path, monkeypatch):
    """What was handed out since is counted, from the array that made it too much."""
    np.savez(tmp_path / "a.npz", **dict.fromkeys("abcd", VALUES))
    monkeypatch.setattr(containers, "_RESIDENT_BYTES", 2 * VALUES.nbytes)
    leaves = read_container(tmp_path / "a.npz")
    counts = []

    def handed_out(name):
        array = leaves[name]
        owner = leaves.leaves[name].read.__closure__
        mapped = next(cell.cell_contents for cell in owner if isinstance(cell.cell_contents, containers._Mapped))
        counts.append(mapped._handed_out // VALUES.nbytes)
        return array

    first = handed_out("a")
    for name in "bcda":
        assert np.array_equal(handed_out(name), VALUES)
    assert counts == [1, 2, 1, 2, 1] and np.array_equal(first, VALUES)
