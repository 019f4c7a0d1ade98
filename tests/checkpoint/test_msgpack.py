"""Flax's MessagePack files, written by Flax: read as views, cut arrays put together, and anything else refused."""

import struct

import flax.serialization
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from vit_convert.checkpoint import flax_msgpack
from vit_convert.checkpoint.containers import read_container, split_subtree, verify
from vit_convert.checkpoint.draw import write_msgpack
from vit_convert.core.errors import CheckpointError
from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint

NUMBERS = np.random.default_rng(0)
TREE = {
    "layer" + "_long" * 8: {"kernel": NUMBERS.standard_normal((3, 300)).astype(np.float32), "empty": np.zeros((0, 4))},
    "half": NUMBERS.standard_normal((2, 70_000)).astype(np.float16),
    "scalar": np.float32(0.5),
    "t": np.array(4.75, np.float32),
    "bf16": jnp.asarray([1.5, -2.0], jnp.bfloat16),
    "step": 70_000,
    "opt": {"0": {"count": 3, "names": ["a", None, True, -1.5, -200]}, "mu": np.arange(5)},
}


@pytest.fixture
def write(tmp_path):
    def write(content, name="flax_model.msgpack"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else flax.serialization.msgpack_serialize(content))
        return path

    return write


def test_what_flax_writes(write):
    leaves = read_container(write(TREE))
    expected = {"layer" + "_long" * 8 + "/kernel", "layer" + "_long" * 8 + "/empty", "half", "scalar", "t", "bf16"}
    assert set(leaves) == expected | {"opt/mu"}
    for name in leaves:
        right = TREE
        for part in name.split("/"):
            right = right[part]
        np.testing.assert_array_equal(leaves[name], np.asarray(right))
        assert leaves[name].dtype == np.asarray(right).dtype and not leaves[name].flags.writeable
    verify("f", [leaf for name, leaf in leaves.leaves.items() if name != "opt/mu"])


# One of every form of MessagePack's specification, behind which the next entry has to be found.
FORMS = {
    "fixint": b"\x07",
    "negative fixint": b"\xe1",
    "nil": b"\xc0",
    "false": b"\xc2",
    "true": b"\xc3",
    **{f"bin {8 << i}": bytes([0xC4 + i]) + (3).to_bytes(1 << i) + b"abc" for i in range(3)},
    **{f"ext {8 << i}": bytes([0xC7 + i]) + (3).to_bytes(1 << i) + b"\x09abc" for i in range(3)},
    "float 32": b"\xca" + struct.pack(">f", 1.5),
    "float 64": b"\xcb" + struct.pack(">d", 1.5),
    **{f"uint {8 << i}": bytes([0xCC + i]) + (7).to_bytes(1 << i) for i in range(4)},
    **{f"int {8 << i}": bytes([0xD0 + i]) + (7).to_bytes(1 << i) for i in range(4)},
    **{f"fixext {1 << i}": bytes([0xD4 + i]) + b"\x09" + bytes(1 << i) for i in range(5)},
    "fixstr": b"\xa3abc",
    **{f"str {8 << i}": bytes([0xD9 + i]) + (3).to_bytes(1 << i) + b"abc" for i in range(3)},
    "fixarray": b"\x92\x01\x02",
    **{f"array {16 << i}": bytes([0xDC + i]) + (2).to_bytes(2 << i) + b"\x01\x02" for i in range(2)},
    "fixmap": b"\x81\xa1k\x01",
    **{f"map {16 << i}": bytes([0xDE + i]) + (1).to_bytes(2 << i) + b"\xa1k\x01" for i in range(2)},
}


@pytest.mark.parametrize("form", FORMS)
def test_what_stands_behind_a_value_of_any_form(write, form):
    msgpack.unpackb(FORMS[form])  # the library's own reading: it is one value, whole
    array = flax.serialization.msgpack_serialize({"a": np.arange(6, dtype=np.float32)})
    leaves = read_container(write(b"\x82\xa1x" + FORMS[form] + array[1:]))
    np.testing.assert_array_equal(leaves["a"], np.arange(6))


@pytest.mark.parametrize("form", FORMS)
def test_a_side_of_an_array_in_any_form(write, form):
    """A size is a whole number, of which Flax writes those without a sign."""
    array = b"\x93\x91" + FORMS[form] + b"\xa5uint8\xc4\x07" + bytes(7)
    path = write(b"\x81\xa1a\xc7" + bytes([len(array)]) + b"\x01" + array)
    if form.startswith(("fixint", "uint")):
        assert read_container(path)["a"].shape == (7,)
    else:
        with pytest.raises(CheckpointError, match="no size at 8"):
            read_container(path)


@pytest.mark.parametrize("sides", [(5, 70), (2, 3, 41)])
def test_an_array_that_flax_cut(write, monkeypatch, sides):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 400)  # of a gigabyte
    whole = NUMBERS.standard_normal(sides).astype(np.float32)
    leaves = read_container(write({"a": {"kernel": whole}, "bias": np.ones(3, np.float32)}))
    assert set(leaves) == {"a/kernel", "bias"} and len(leaves.leaves["a/kernel"].read.args[1].pieces) > 2
    np.testing.assert_array_equal(leaves["a/kernel"], whole)
    verify("f", leaves.leaves.values())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_we_write_flax_reads(tmp_path, dtype):
    path, values = tmp_path / "a.msgpack", NUMBERS.standard_normal((4, 5)).astype(np.float32)
    names = ["a/b/kernel", "a/b/bias", "a/" + "x" * 40, "scale"]
    write_msgpack(path, [(name, (4, 5), lambda: values) for name in names], dtype)
    found = flax.serialization.msgpack_restore(path.read_bytes())
    assert set(found["a"]) == {"b", "x" * 40} and set(found["a"]["b"]) == {"kernel", "bias"}
    np.testing.assert_array_equal(np.asarray(found["scale"]), values.astype(found["scale"].dtype))
    assert str(found["scale"].dtype) == dtype and list(read_container(path)) == names


def test_a_flax_clip_is_the_same_in_either_container(tmp_path):
    paths = [tmp_path / f"clip.{ending}" for ending in ("msgpack", "safetensors")]
    for path in paths:
        write_random_checkpoint(path, "CLIP-mu/16", image_size=(32, 32), layout="clip_flax", prefix="params/")
    for tower in ("img", "txt"):
        one, other = (load_checkpoint(f"{path}:{tower}", variant="CLIP-mu/16") for path in paths)
        assert split_subtree(f"{paths[0]}:{tower}") == (str(paths[0]), tower) and one.layout.value == "clip_flax"
        assert one.pair == other.pair and set(one.params) == set(other.params)
        for name in one.params:
            np.testing.assert_array_equal(one.params[name], other.params[name])


def array(shape, dtype, values, *, claimed=None):
    """An extension of Flax's with what it says of itself."""
    parts = bytes([0x90 | len(shape)]) + b"".join(b"\xce" + struct.pack(">I", side) for side in shape)
    parts += bytes([0xA0 | len(dtype)]) + dtype.encode() + b"\xc6" + struct.pack(">I", claimed or len(values)) + values
    return b"\xc9" + struct.pack(">I", len(parts) + 1) + b"\x01\x93" + parts


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x81\xa1a" + array((2, 2), "float32", bytes(12)), r"an array \(2, 2\) of float32 needs 16 bytes, it has 12"),
        (b"\x81\xa1a" + array((2,), "object", bytes(16)), "an array of 'object'"),
        (b"\x81\xa1a" + array((2,), "float32", bytes(8), claimed=1 << 31), "cut off: a bin of 2147483648"),
        (b"\x81\xa1a" + array((1 << 31, 1 << 31), "float32", bytes(8)), r"needs 18446744073709551616 bytes, it has 8"),
        (b"\x81\xa1a" + array((2,), "float32", bytes(8))[:-1], "cut off"),
        (b"\x82\xa1a" + array((2,), "float32", bytes(8)), "cut off"),
        (b"\x81\xa1a" + array((2,), "float32", bytes(8)) + b"\xc0", "1 bytes behind the parameters"),
        (2 * (b"\x82\xa1a" + array((1,), "bool", b"\1")), "no name at"),
        (b"\x82" + 2 * (b"\xa1a" + array((1,), "bool", b"\1")), "'a' is there twice, or no parameter's name"),
        (b"\x81\xa2.." + array((1,), "bool", b"\1"), r"'\.\.' is there twice, or no parameter's name"),
        (b"\xdf\xff\xff\xff\xff\xa1a", "cut off: a map of 4294967295"),
        (b"\x81\xda\x04\x00" + b"a" * 1024 + b"\xc0", "no name at 1, but str of 1024"),
        (b"\x81\xa1a" * 70 + b"\xc0", "deeper than 64 levels"),
        (b"\x81\xa1a" + b"\x91" * 70 + b"\xc0", "deeper than 64 levels"),
        (b"\x81\xa2\xff\xfe\xc0", "codec can't decode"),
        (b"\x81\xa1a\xc1", "byte 0xc1 begins nothing"),
    ],
)
def test_refused(write, content, said):
    with pytest.raises(CheckpointError, match=rf"flax_model.msgpack: not a sound \.msgpack file of Flax \(.*{said}"):
        read_container(write(content))


@pytest.mark.parametrize(("level", "most"), [(b"\x81\xa1a", 64), (b"\x91", 64), (b"\x92\xc0", 64)])
def test_so_many_levels_are_read(write, level, most):
    """Below the map that a file is."""
    behind = b"\xc0\xa1b" + array((2,), "float32", bytes(8))
    assert list(read_container(write(b"\x82\xa1x" + level * most + behind))) == ["b"]
    with pytest.raises(CheckpointError, match=f"deeper than {most} levels"):
        read_container(write(b"\x82\xa1x" + level * (most + 1) + behind))


@pytest.mark.parametrize("spoilt", ["shape", "number", "digit", "piece"])
def test_arrays_that_are_cut_wrongly(write, monkeypatch, spoilt):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 400)
    tree = {"a": flax.serialization._chunk(np.ones((5, 70), np.float32))}
    if spoilt == "shape":
        tree["a"]["shape"]["0"] = 6
    elif spoilt == "number":
        tree["a"]["chunks"]["9"] = tree["a"]["chunks"].pop("1")
    elif spoilt == "digit":  # Arabic, which int() reads too
        tree["a"]["chunks"]["\u0661"] = tree["a"]["chunks"].pop("1")
    else:
        tree["a"]["chunks"]["1"] = 3
    with pytest.raises(
        CheckpointError, match=r"do not make an array|other numbers than 0 to 3|have a '\u0661'|cut is none"
    ):
        read_container(write(tree))


def test_a_file_is_not_read_to_be_listed(write):
    """Only headers are asked for, whatever the size of what they stand before."""
    content, asked = write({"a": np.zeros(1 << 20, np.float32)}).read_bytes(), []

    def read(offset, count):
        asked.append(count)
        return content[offset : offset + count]

    assert [name for name, _ in flax_msgpack.read_arrays(read, len(content))] == ["a"] and max(asked) < 16


def test_what_begins_a_map_in_the_specification():
    """fixmap, map 16 and map 32; Flax's files are maps."""
    maps = {*range(0x80, 0x90), 0xDE, 0xDF}
    assert {first for first in range(256) if flax_msgpack.starts_msgpack(bytes([first, 0]))} == maps
    assert not flax_msgpack.starts_msgpack(b"")


@pytest.mark.parametrize(
    "inner",
    [
        b"\x92\x91\x01\xa5uint8",  # two parts
        b"\x94\x91\x01\xa5uint8\xc4\x01a\xc0",
        b"\x93\x81\x01\x01\xa5uint8\xc4\x01a",  # a map of axes
        b"\x93\x07\xa5uint8\xc4\x01a",
        b"\x83\x91\x01\xa5uint8\xc4\x01a\xc0\xc0\xc0",
        b"\x93\xdc\x00\x21" + b"\x01" * 33 + b"\xa5uint8\xc4\x01a",  # more axes than NumPy's 32
        b"\xa3abc",
    ],
)
def test_extensions_that_are_no_arrays(write, inner):
    with pytest.raises(CheckpointError, match="no array at 6"):
        read_container(write(b"\x81\xa1a\xc7" + bytes([len(inner)]) + b"\x01" + inner))


def test_an_array_is_written_as_one_up_to_two_gigabytes():
    """Of which only the head is made; Flax cuts what is larger."""
    flax_msgpack.packed_array(((1 << 29) - 1,), np.dtype(np.float32))
    with pytest.raises(ValueError, match=f"an array of {1 << 31} bytes"):
        flax_msgpack.packed_array((1 << 29,), np.dtype(np.float32))


@pytest.mark.parametrize("content", [b"\x91\xc0", b"\xa1a", b"\x07", b"\xc0", b"\xc4\x01a"])
def test_what_is_no_map_at_all(content):
    with pytest.raises(ValueError, match="not a map of parameters"):
        list(flax_msgpack.read_arrays(lambda offset, count: content[offset : offset + count], len(content)))
