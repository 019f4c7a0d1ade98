"""Files that are no checkpoint of ours: each is named, and what is said to do about it works. None is unpickled."""

import bz2
import gzip
import lzma
import pathlib
import pickle

import flax
import numpy as np
import pytest
import safetensors.numpy

from vit_convert.checkpoint.containers import read_container
from vit_convert.checkpoint.other_formats import START, refuse_other_format
from vit_convert.core.errors import CheckpointError

TREE = {"img": {"head": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T}}, "t": np.float32(2)}


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def refused(path):
    with pytest.raises(CheckpointError) as error:
        read_container(path)
    assert str(error.value).startswith(f"{path}: ") and error.value.exit_code == 3
    return str(error.value).removeprefix(f"{path}: "), error.value.fix


def follow(fix, path, folder, monkeypatch):
    """Runs the two lines that a message gives, and reads what they wrote."""
    monkeypatch.chdir(folder)
    code = fix.partition("safetensors: ")[2].replace("PATH", repr(str(path)))
    exec(code, {"pickle": pickle, "numpy": np, "flax": flax, "safetensors": safetensors})
    leaves = read_container(folder / "model.safetensors")
    assert sorted(leaves) == ["img/head/kernel", "t"]
    np.testing.assert_array_equal(leaves["img/head/kernel"], TREE["img"]["head"]["kernel"])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_any_protocol(tmp_path, protocol, monkeypatch):
    """Byte 80, with which most begin, is also that of an empty MessagePack map."""
    path = tmp_path / "params.npz"
    path.write_bytes(pickle.dumps({"bomb": Bomb(tmp_path / "exploded")}, protocol))
    assert refused(path)[0] == "a Python pickle, which could run code when loaded"
    assert not (tmp_path / "exploded").exists()
    path.write_bytes(pickle.dumps(TREE, protocol))
    follow(refused(path)[1], path, tmp_path, monkeypatch)


def test_a_dictionary_in_an_npy(tmp_path, monkeypatch):
    path = tmp_path / "vit_b32.npy"
    np.save(path, np.array(TREE, dtype=object))
    said, fix = refused(path)
    assert said == "a .npy file: one array, or a pickle, which could run code when loaded"
    follow(fix, path, tmp_path, monkeypatch)


def test_the_parts_of_a_checkpoint(tmp_path, monkeypatch):
    """Of an index, which lists them."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    for i, name in enumerate("ab", 1):
        safetensors.numpy.save_file({name: np.full(i, i, np.float32)}, tmp_path / f"{i}.safetensors")
    monkeypatch.chdir(tmp_path)
    code = refused(index)[1].partition("Python: ")[2]
    exec(code, {"safetensors": safetensors, "PARTS": ["1.safetensors", "2.safetensors"]})
    whole = read_container("model.safetensors")
    assert {name: whole[name].tolist() for name in whole} == {"a": [1.0], "b": [2.0, 2.0]}


def test_pytorch_before_it_used_zip(tmp_path):
    """Its first pickle is this number, by protocol 2 (`torch.serialization.MAGIC_NUMBER`)."""
    path = tmp_path / "swin.pth"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
    said, fix = refused(path)
    assert said == "a PyTorch file" and "torch.load" in fix and "save_file" in fix


@pytest.mark.parametrize(
    ("content", "said", "fix"),
    [
        (b"", "empty", "Fetch the file again."),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS", "git lfs pull"),
        (b"\n<!doctype html><title>404</title>", "a web page", "an address of the file itself"),
        (b"<?xml version='1.0'?><Error><Code>NoSuchKey", "a server's message", "an address of the file itself"),
        (b'{"weight_map": {}}', "the index of a checkpoint in parts", "save_file"),
        (gzip.compress(b"PK", mtime=0), "compressed by gzip", "Unpack"),
        (bz2.compress(b"PK"), "bzip2", "Unpack"),
        (lzma.compress(b"PK"), "xz", "Unpack"),
        (b"\x28\xb5\x2f\xfd" + bytes(9), "zstd", "Unpack"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "an HDF5 file", "numpy.savez"),
    ],
)
def test_other_files(tmp_path, content, said, fix):
    path = tmp_path / "B_16.npz"
    path.write_bytes(content)
    found = refused(path)
    assert said in found[0] and fix in found[1]


@pytest.mark.parametrize("length", [0x280, 0x3C, 0x8B1F, 0x93])
def test_a_safetensors_header_may_be_of_any_length(tmp_path, length):
    """Its first bytes are that length, and may be those of a pickle, a page, of gzip."""
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + np.float32(3).tobytes())
    assert read_container(path)["a"].tolist() == [3.0]


@pytest.mark.parametrize("start", [b"PK\3\4", b"\x83\xa4step\x05", b"\xde\0\1", b"\x80\6", b"\x80"])
def test_what_may_be_a_checkpoint_is_left_to_its_reader(start):
    refuse_other_format("a", start.ljust(START, b"\0"))


def test_a_folder_with_a_checkpoint_in_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert refused(tmp_path)[0] == "a folder (a tensorstore or Orbax checkpoint?), not a file"
    (tmp_path / "model.safetensors").touch()
    assert refused(tmp_path) == ("a folder, not a file", f"Give a file in it: {tmp_path / 'model.safetensors'}.")
