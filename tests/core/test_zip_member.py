"""Members of archives against Python's own zipfile, and those that it would read wrongly, at length or not at all."""

import os
import struct
import zipfile

import pytest

from vit_convert.core.zip_member import UNREADABLE, FileState, data_offset, open_member

CONTENT = {"a.txt": b"one" * 100, "b/ünï.txt": b"two", "empty": b""}


def write(path, compression=zipfile.ZIP_STORED, extra=b"", content=CONTENT):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            member = zipfile.ZipInfo(name)
            member.compress_type, member.extra = compression, extra
            archive.writestr(member, data)
    return path


def members(path):
    with zipfile.ZipFile(path) as archive:
        return archive.infolist()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("extra", [b"", b"UT\x05\x00\x01\x00\x00\x00\x00"])
def test_members_are_those_of_zipfile(tmp_path, compression, extra):
    path = write(tmp_path / "a.zip", compression, extra)
    for member in members(path):
        with open_member(path, member, FileState.of(path)) as stream:
            assert stream.read() == CONTENT[member.filename]


@pytest.mark.parametrize("extra", [b"", b"UT\x05\x00\x01\x00\x00\x00\x00"])
def test_where_the_bytes_begin(tmp_path, extra):
    path = write(tmp_path / "a.zip", extra=extra)
    whole = path.read_bytes()
    with open(path, "rb") as file:
        for member in members(path):
            start = data_offset(file, member)
            assert whole[start : start + member.file_size] == CONTENT[member.filename]
            # what begins after the header of 30 bytes, the name and what the header has besides
            assert start == member.header_offset + 30 + len(member.filename.encode()) + len(extra)


def test_names_in_the_code_page_of_dos(tmp_path):
    """Without the flag for UTF-8, as old programs write them."""
    path = write(tmp_path / "a.zip", content={"gr_n.txt": b"x"})
    path.write_bytes(path.read_bytes().replace(b"gr_n.txt", b"gr\x81n.txt"))
    (member,) = members(path)
    assert member.filename == "grün.txt"
    assert open_member(path, member).read() == b"x"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in Linux's /proc")
def test_handles_are_closed(tmp_path):
    path = write(tmp_path / "a.zip")
    member, count = members(path)[0], len(os.listdir("/proc/self/fd"))
    stream = open_member(path, member)
    assert len(os.listdir("/proc/self/fd")) == count + 1
    stream.close()
    assert len(os.listdir("/proc/self/fd")) == count
    member.compress_size = 10_000
    with pytest.raises(zipfile.BadZipFile) as error:
        open_member(path, member)
    assert len(os.listdir("/proc/self/fd")) == count, error


def test_a_file_that_ends_before_its_member_does(tmp_path):
    """The claimed number of bytes is room that a reader makes, so it is held against the file first."""
    path = write(tmp_path / "a.zip", content={"a": b"x" * 50})
    (member,) = members(path)
    end = member.header_offset + 30 + 1 + 50
    os.truncate(path, end)  # the directory behind it is gone, which was read already
    assert open_member(path, member).read() == b"x" * 50
    os.truncate(path, end - 1)
    with pytest.raises(zipfile.BadZipFile, match="it ends after the file, which is truncated"):
        open_member(path, member)


@pytest.mark.parametrize("bits", range(16))
def test_flags_of_what_cannot_be_read(tmp_path, bits):
    """APPNOTE.TXT 4.4.4: bit 0 encrypted, 5 patched, 6 strongly encrypted; the others say nothing of that."""
    path = write(tmp_path / "a.zip")
    member = members(path)[0]
    member.flag_bits = 1 << bits
    what = {0: "a.txt is encrypted", 5: "a.txt is a compressed patch", 6: "a.txt is strongly encrypted"}.get(bits)
    if what is None:
        assert open_member(path, member).read() == CONTENT["a.txt"]
        return
    with pytest.raises(NotImplementedError, match=what) as error:
        open_member(path, member)
    assert isinstance(error.value, UNREADABLE)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, 1, 93, 99])
def test_compressions_that_are_not_read(tmp_path, method):
    path = write(tmp_path / "a.zip")
    member = members(path)[0]
    member.compress_type = method
    with pytest.raises(NotImplementedError, match=f"a.txt is compressed by method {method}"):
        open_member(path, member)


@pytest.mark.parametrize("by", [-1, 1, 1000])
def test_a_stored_member_of_two_sizes(tmp_path, by):
    """Mapped into memory, it would be as long as the one says and go on with other bytes behind the other."""
    path = write(tmp_path / "a.zip")
    member = members(path)[0]
    member.file_size += by
    with pytest.raises(zipfile.BadZipFile, match=f"it is stored in 300 bytes, and claims {300 + by}"):
        open_member(path, member)


def test_a_damaged_header(tmp_path):
    path = write(tmp_path / "a.zip")
    whole, member = path.read_bytes(), members(path)[0]
    for place in range(4):  # its signature
        path.write_bytes(whole[:place] + b"?" + whole[place + 1 :])
        with pytest.raises(zipfile.BadZipFile, match="its header is damaged"):
            open_member(path, member)
    path.write_bytes(whole)
    member.header_offset = len(whole) - 29
    path.write_bytes(whole[:-29] + whole[:29])  # begins like one, and is a byte too short
    with pytest.raises(zipfile.BadZipFile, match="its header is damaged"):
        open_member(path, member)


def test_a_header_of_another_name(tmp_path):
    path = write(tmp_path / "a.zip")
    first, second, _ = members(path)
    first.header_offset = second.header_offset
    with pytest.raises(zipfile.BadZipFile, match=r"its header is of 'b/ünï\.txt'"):
        open_member(path, first)


def test_a_checksum_that_is_wrong(tmp_path):
    path = write(tmp_path / "a.zip")
    path.write_bytes(path.read_bytes().replace(b"oneone", b"onetwo", 1))
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        open_member(path, members(path)[0]).read()


CHANGES = {
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "later": lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
    "another": lambda path: path.with_suffix(".new").replace(path),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_since_its_directory_was_read(tmp_path, change):
    path = write(tmp_path / "a.zip")
    path.with_suffix(".new").write_bytes(path.read_bytes())
    # by its number alone another
    os.utime(path.with_suffix(".new"), ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    member, state = members(path)[0], FileState.of(path)
    assert open_member(path, member, state).read() == CONTENT["a.txt"]
    CHANGES[change](path)
    with pytest.raises(zipfile.BadZipFile, match="the file was changed while it was read"):
        open_member(path, member, state)
    assert open_member(path, member).read() == CONTENT["a.txt"]  # where nobody noted what it was


def test_the_state_of_a_file(tmp_path):
    path = write(tmp_path / "a.zip")
    stat = os.stat(path)
    with open(path, "rb") as file:
        assert (
            FileState.of(path)
            == FileState.of(file.fileno())
            == (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        )


def test_what_damage_raises_is_unreadable():
    for error in (
        zipfile.BadZipFile,
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
        struct.error,
        FileNotFoundError,
    ):
        assert issubclass(error, UNREADABLE)
    assert not issubclass(KeyboardInterrupt, UNREADABLE) and not issubclass(MemoryError, UNREADABLE)
