"""Headers of `.npy` files against what numpy itself writes and reads, and those that nobody should believe."""

import io
import struct

import numpy as np
import pytest

from vit_convert.core.npy_header import read_npy_header

MAGIC = b"\x93NUMPY"


def header(text: str, version=(1, 0), length=None) -> io.BytesIO:
    content = text.encode("latin1")
    size = struct.pack("<H" if version == (1, 0) else "<I", len(content) if length is None else length)
    return io.BytesIO(MAGIC + bytes(version) + size + content)


def described(shape, descr="<f4", fortran=False) -> str:
    return repr({"descr": descr, "fortran_order": fortran, "shape": shape})


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(2.5),
        np.zeros((0, 3), np.uint8),
        np.zeros((1,) * 32, ">i2"),
        np.zeros(3, "V2"),
        np.zeros(3, [("a", "<f4"), ("b", "<i8")]),
    ],
)
def test_what_numpy_writes(array, version):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    values = stream.getbuffer().nbytes - array.nbytes
    stream.seek(0)
    assert read_npy_header(stream) == (
        array.shape,
        array.flags.f_contiguous and not array.flags.c_contiguous,
        array.dtype,
    )
    assert stream.tell() == values


def test_pickled_values_are_told():
    stream = io.BytesIO()
    np.save(stream, np.array([object()]), allow_pickle=True)
    stream.seek(0)
    assert read_npy_header(stream)[2].hasobject


@pytest.mark.parametrize("version", [(1, 1), (2, 1), (3, 0), (0, 0), (9, 9)])
def test_other_versions(version):
    with pytest.raises(ValueError, match="version"):
        read_npy_header(header(described((2,)), version))


@pytest.mark.parametrize(("version", "size"), [((1, 0), 2), ((2, 0), 4)])
def test_a_file_that_ends_in_its_header(version, size):
    content = header(described((2,)), version).getvalue()
    for end in range(8, 8 + size):
        with pytest.raises(ValueError, match="its npy header is cut"):
            read_npy_header(io.BytesIO(content[:end]))
    for end in (8 + size, 20, len(content) - 1):
        with pytest.raises(ValueError, match="its npy header is damaged"):
            read_npy_header(io.BytesIO(content[:end]))
    for end in range(8):
        with pytest.raises(ValueError, match=r"magic|EOF"):
            read_npy_header(io.BytesIO(content[:end]))


class Counting(io.BytesIO):
    most = 0

    def read(self, size=-1):
        self.most = max(self.most, size)
        return super().read(size)


@pytest.mark.parametrize(
    ("length", "said"), [(65_536, "damaged"), (65_537, "has 65537 bytes"), (2**32 - 1, "has 4294967295 bytes")]
)
def test_no_more_is_read_than_any_header_has(length, said):
    stream = Counting(header(described((2,)), (2, 0), length).getvalue())
    with pytest.raises(ValueError, match=said):
        read_npy_header(stream)
    assert stream.most <= 65_536


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "{",
        "{}",
        "[1, 2]",
        "{'descr': '<f4'}",
        described((2,), descr="<q9"),
        described("ab"),
        "(" * 900,
        described((2,)) + "+ 1",
        "1_",
    ],
)
def test_what_is_no_header(text):
    with pytest.raises(ValueError, match="its npy header is damaged"):
        read_npy_header(header(text))


@pytest.mark.parametrize(
    ("shape", "descr", "sound"),
    [
        ((1,) * 32, "<f4", True),
        ((1,) * 33, "<f4", False),  # numpy 1 has no more than 32 axes
        ((-1,), "<f4", False),
        ((3, -2), "<f4", False),
        ((-3, -2), "<f4", False),
        ((0,), "<f4", True),
        ((0, 5, 2**31), "<f4", True),
        ((0, 2**61), "<f4", False),  # numpy refuses it, though nothing is in it
        ((0, 2**61 - 1), "<f4", True),
        ((2**63 - 1,), "|u1", True),
        ((2**63,), "|u1", False),
        ((2**31, 2**31, 2), "|u1", False),
        ((2,), "|S0", False),  # of size zero, any number fit
        ((2,), "|V0", False),
        ((2,), "|V1", True),
    ],
)
def test_shapes_that_no_array_has(shape, descr, sound):
    stream = header(described(shape, descr))
    if sound:
        assert read_npy_header(stream) == (shape, False, np.dtype(descr))
    else:
        with pytest.raises(ValueError, match="no array has shape"):
            read_npy_header(stream)


def test_an_array_as_a_dtype():
    with pytest.raises(ValueError, match="no array has shape"):
        read_npy_header(header(described((2,), descr=("<f4", (3,)))))
