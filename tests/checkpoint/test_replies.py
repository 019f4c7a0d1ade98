"""What is asked of a server and made of its replies, one by one, with replies of the test's own instead of a server."""

import hashlib
import http.client
import json
import ssl
import urllib.error

import pytest
from replies import ADDRESS, DATA, NAME, Reply, part_of, status, whole

from vit_convert.checkpoint.fetch import fetch, is_address, local_name, url_of
from vit_convert.core.errors import CheckpointError


@pytest.fixture
def part(tmp_path):
    return tmp_path / f"{NAME}.part"


def remember(part, version):
    part.with_name(f"{part.name}.json").write_text(json.dumps({"version": version}))


# --- names and addresses ----------------------------------------------------------------------------------------------


def test_what_is_an_address():
    assert all(is_address(f"{kind}://a/b.npz") for kind in ("gs", "http", "https"))
    assert not any(map(is_address, ("a.npz", "s3://a/b", "gs:/a", "/gs://a", "GS://a")))


@pytest.mark.parametrize(
    ("address", "stem", "ending"),
    [
        ("gs://m/x/ViT-B_16.npz", "ViT-B_16", ".npz"),
        ("https://h/x/a%20b.tar.npz?download=1#x", "a b.tar", ".npz"),
        ("gs://b/R26%2BViT-B_32.npz", "R26+ViT-B_32", ".npz"),
        ("https://h/file", "file", ""),
    ],
)
def test_names_hold_eight_digits_of_the_addresss_hash(address, stem, ending):
    assert local_name(address) == f"{stem}-{hashlib.sha256(address.encode()).hexdigest()[:8]}{ending}"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "https://storage.googleapis.com/m/a%20b+c/x.npz"),
        ("localhost:8000", "http://localhost:8000/m/a%20b+c/x.npz"),
        ("http://h:1/", "http://h:1/m/a%20b+c/x.npz"),
        ("https://mirror//", "https://mirror/m/a%20b+c/x.npz"),
    ],
)
def test_where_a_bucket_is_asked(monkeypatch, host, url):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
    assert url_of("gs://m/a b+c/x.npz") == url
    assert url_of("https://h/a b") == "https://h/a b"  # as it is


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_the_first_request(server, tmp_path):
    server.replies = [whole()]
    assert fetch(ADDRESS, tmp_path) == tmp_path / NAME and (tmp_path / NAME).read_bytes() == DATA
    ((url, headers),) = server.asked
    assert url == "https://storage.googleapis.com/models/a%20b/B_16.npz"
    assert headers == {"Accept-encoding": "identity", "User-agent": "vit_convert"}  # compressed, no size would be right
    assert (server.timeouts, server.pauses) == ([60], [])
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("version", ['"etag"', ""])
def test_a_part_is_continued(server, tmp_path, part, version):
    part.write_bytes(DATA[:1000])
    if version:
        remember(part, version)
    server.replies = [part_of(1000)]
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA
    assert server.ranges == [("bytes=1000-", version or None)]


def test_a_part_without_a_byte_is_none(server, tmp_path, part):
    part.touch()
    remember(part, '"etag"')
    server.replies = [whole()]
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA
    assert server.ranges == [(None, None)]


def test_a_damaged_memory_is_none(server, tmp_path, part):
    part.write_bytes(DATA[:10])
    part.with_name(f"{part.name}.json").write_text("{")
    server.replies = [part_of(10)]
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA
    assert server.ranges == [("bytes=10-", None)]


@pytest.mark.parametrize(
    ("headers", "version"),
    [
        ({"ETag": '"a"', "Last_Modified": "Mon"}, '"a"'),
        ({"ETag": 'W/"a"', "Last_Modified": "Mon"}, "Mon"),  # If-Range takes no weak tag
        ({"Last_Modified": "Mon"}, "Mon"),
        ({}, None),
    ],
)
@pytest.mark.parametrize("first", ["whole", "part"])
def test_what_a_part_is_of_is_remembered(server, tmp_path, headers, version, first, part):
    if first == "whole":
        broken = Reply(DATA[:500], Content_Length=str(len(DATA)), **headers)
    else:
        part.write_bytes(DATA[:100])
        broken = Reply(DATA[100:500], 206, Content_Range=f"bytes 100-{len(DATA) - 1}/{len(DATA)}", **headers)
    server.replies = [broken, part_of(500)]
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA
    assert server.ranges[1] == ("bytes=500-", version)
    assert server.pauses == [0]  # what brings something is followed at once


# --- replies ----------------------------------------------------------------------------------------------------------


def test_a_server_that_sends_the_whole_again(server, tmp_path, part):
    """It knows no ranges, or has another version by now."""
    part.write_bytes(b"old" * 100)
    server.replies = [whole()]
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA


def test_a_part_from_the_first_byte_on(server, tmp_path, part):
    part.write_bytes(b"x" * 10)
    server.replies = [Reply(DATA, 206, Content_Range=f"bytes 0-{len(DATA) - 1}/{len(DATA)}")]
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("start", [9, 11, 1])
def test_a_part_from_elsewhere_is_not_taken(server, tmp_path, part, start):
    part.write_bytes(DATA[:10])
    server.replies = [part_of(start) for _ in range(3)]
    with pytest.raises(
        CheckpointError, match=rf"stopped at 10 bytes \(bytes from {start} on were sent, but from 10 on requested\)"
    ):
        fetch(ADDRESS, tmp_path)
    assert part.read_bytes() == DATA[:10]


@pytest.mark.parametrize("said", ["", "bytes 10-", "bytes */99", "items 10-99/100", "bytes 10-99"])
def test_a_part_of_which_nobody_says_where_it_begins(server, tmp_path, part, said):
    part.write_bytes(DATA[:10])
    server.replies = [Reply(DATA[10:], 206, Content_Range=said) for _ in range(3)]
    with pytest.raises(CheckpointError) as error:
        fetch(ADDRESS, tmp_path)
    assert f"stopped at 10 bytes (the server sent a part without saying which ({said}))" in str(error.value)
    assert part.read_bytes() == DATA[:10]


def test_a_part_of_a_file_whose_size_nobody_tells(server, tmp_path, part):
    part.write_bytes(DATA[:10])
    server.replies = [Reply(DATA[10:], 206, Content_Range=f"bytes 10-{len(DATA) - 1}/*")]
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("length", ["", "many", "-1"])
def test_a_whole_whose_size_nobody_tells(server, tmp_path, length):
    server.replies = [Reply(DATA, **({"Content_Length": length} if length else {}))]
    asked = []
    assert fetch(ADDRESS, tmp_path, accepts=lambda size: asked.append(size) or True).read_bytes() == DATA
    assert asked == [len(DATA)]  # once it is there


def test_a_size_that_is_not_wanted(server, tmp_path):
    server.replies = [whole()]
    with pytest.raises(CheckpointError) as error:
        fetch(ADDRESS, tmp_path, accepts=lambda size: False)
    url = url_of(ADDRESS)
    assert str(error.value) == f"{ADDRESS}: {len(DATA)} bytes at {url}, which is not the size of the published file"
    assert "#sha256=" in error.value.fix and not list(tmp_path.iterdir())


@pytest.mark.parametrize("have", [len(DATA), len(DATA) + 7])
def test_nothing_is_there_from_that_byte_on(server, tmp_path, part, have):
    part.write_bytes((DATA + bytes(7))[:have])
    server.replies = [status(416, Content_Range=f"bytes */{len(DATA)}"), whole()]
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA
    assert len(server.asked) == (1 if have == len(DATA) else 2)


def test_nothing_is_there_at_all(server, tmp_path):
    server.replies = [status(416, Content_Range="bytes */0")]
    with pytest.raises(CheckpointError, match="the server answers 416"):
        fetch(ADDRESS, tmp_path)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_statuses_that_pass(server, tmp_path, code):
    server.replies = [status(code), status(code), whole()]
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA
    assert server.pauses == [1.0, 1.0]
    server.replies = [status(code)] * 3
    with pytest.raises(CheckpointError, match=rf"stopped at 0 bytes \(the server answers {code}\)") as error:
        fetch("gs://models/other.npz", tmp_path)
    assert error.value.fix.startswith("Run again to continue. Put ") and server.replies == []


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 501])
def test_statuses_that_do_not(server, tmp_path, code):
    server.replies = [status(code)]
    with pytest.raises(CheckpointError) as error:
        fetch(ADDRESS, tmp_path)
    assert str(error.value) == f"{ADDRESS}: the server answers {code}" and "gsutil ls" in error.value.fix
    assert not list(tmp_path.iterdir()) and len(server.asked) == 1


@pytest.mark.parametrize("code", [404, 403, 503])
def test_a_part_is_kept_whatever_the_status(server, tmp_path, part, code):
    part.write_bytes(DATA[:10])
    server.replies = [status(code) for _ in range(3)]
    with pytest.raises(CheckpointError, match=f"the server answers {code}"):
        fetch(ADDRESS, tmp_path)
    assert part.read_bytes() == DATA[:10] and len(server.asked) == (3 if code == 503 else 1)


FAILURES = [
    (urllib.error.URLError("no route to host"), "no route to host"),
    (TimeoutError("timed out"), "timed out"),
    (ConnectionResetError("reset"), "reset"),
    (http.client.RemoteDisconnected("closed"), "closed"),
    (http.client.IncompleteRead(b""), "IncompleteRead"),
    (ssl.SSLError("bad certificate"), "bad certificate"),
    (TimeoutError(), "TimeoutError"),
]


@pytest.mark.parametrize(("failure", "said"), FAILURES)
def test_without_a_network(server, tmp_path, failure, said):
    server.replies = [failure]
    with pytest.raises(CheckpointError) as error:
        fetch(ADDRESS, tmp_path)
    assert str(error.value).startswith(f"{ADDRESS}: cannot be fetched, is there a network? (") and said in str(
        error.value
    )
    assert (
        error.value.fix.startswith(f"Put {NAME} into {tmp_path}/")
        and server.pauses == []
        and not list(tmp_path.iterdir())
    )


@pytest.mark.parametrize(("failure", "said"), FAILURES)
def test_a_network_that_breaks_down(server, tmp_path, part, failure, said):
    part.write_bytes(DATA[:10])
    server.replies = [failure] * 3
    with pytest.raises(CheckpointError) as error:
        fetch(ADDRESS, tmp_path)
    assert f"{ADDRESS}: stopped at 10 bytes (" in str(error.value) and said in str(error.value)
    assert server.pauses == [1.0, 1.0] and part.read_bytes() == DATA[:10]
    server.replies = [failure, failure, part_of(10)]
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA


def test_three_tries_that_bring_nothing_are_the_end(server, tmp_path, part):
    """In a row: a slow line that brings something each time is followed to the end."""
    pieces = [
        Reply(DATA[i : i + 1000], 206, Content_Range=f"bytes {i}-{len(DATA) - 1}/{len(DATA)}")
        for i in range(1000, 10_000, 1000)
    ]
    part.write_bytes(DATA[:1000])
    replies = []
    for piece in pieces:
        replies += [TimeoutError(), TimeoutError(), piece]
    server.replies = [*replies, part_of(10_000)]
    assert fetch(ADDRESS, tmp_path).read_bytes() == DATA
    nothing = [Reply(b"", 206, Content_Range=f"bytes 1000-{len(DATA) - 1}/{len(DATA)}") for _ in range(3)]
    (tmp_path / NAME).unlink()
    part.write_bytes(DATA[:1000])
    server.replies = nothing
    with pytest.raises(CheckpointError, match=r"stopped at 1000 bytes \(.* came\)"):
        fetch(ADDRESS, tmp_path)


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_asked_for(server, tmp_path):
    (tmp_path / NAME).write_bytes(b"123")
    assert fetch(ADDRESS, tmp_path, accepts=lambda size: size == 3) == tmp_path / NAME
    with pytest.raises(CheckpointError) as error:
        fetch(ADDRESS, tmp_path, accepts=lambda size: size == 4)
    assert str(error.value) == f"{tmp_path / NAME}: 3 bytes, which is not the size of {ADDRESS}"
    assert "Remove it" in error.value.fix
    assert not server.asked


@pytest.mark.parametrize("right", [True, False])
def test_sums(server, tmp_path, right, part):
    found = hashlib.sha256(DATA).hexdigest()
    server.replies = [whole()]
    if right:
        assert fetch(ADDRESS, tmp_path, sha256=found.upper()).read_bytes() == DATA
        return
    with pytest.raises(CheckpointError) as error:
        fetch(ADDRESS, tmp_path, sha256="00")
    assert str(error.value) == f"{ADDRESS}: sha256 {found}, expected 00; the file was removed" and error.value.fix
    assert not part.exists() and not (tmp_path / NAME).exists()


def test_how_to_bring_it_by_hand(server, tmp_path):
    server.replies = [TimeoutError(), TimeoutError()]
    with pytest.raises(CheckpointError) as error:
        fetch(ADDRESS, tmp_path / "c d", kept_as="B_16.npz")
    target = f"'{tmp_path}/c d/B_16.npz'"
    assert error.value.fix == (
        f"Put B_16.npz into {tmp_path}/c d/, or into a folder given with --checkpoints; on a machine with a network: "
        f"curl -fL -C - -o {target} {url_of(ADDRESS)} or gsutil cp '{ADDRESS}' {target}."
    )
    with pytest.raises(CheckpointError) as error:
        fetch("https://h/x.npz", tmp_path)
    assert error.value.fix.endswith(f"curl -fL -C - -o {tmp_path}/{local_name('https://h/x.npz')} https://h/x.npz.")
