"""What a message may hold, wherever its words come from."""

import json

import pytest

from vit_convert.core import errors
from vit_convert.core.bundle import read_json
from vit_convert.core.errors import CheckpointError, nearest


def test_what_a_terminal_would_obey_or_no_file_can_hold_is_spelt_out():
    """A name in somebody's file, and one that is no UTF-8 on the disk."""
    error = CheckpointError("a\x1b[2J\r\x07: ü ÷ 日本\nsecond line \udc80", fix="Rename \x00.")
    assert str(error) == "a\\x1b[2J\\r\\x07: ü ÷ 日本\nsecond line \\udc80"
    assert error.fix == "Rename \\x00."
    str(error).encode()


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", '"text"', "{", "[" * 100_000, '{"a":' * 100_000, b"\xff\xfe{}"]
)
def test_json_that_is_no_object_is_damaged(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_json(path, {"the": "default"}) == {"the": "default"}
    path.write_text(json.dumps({"a": [1]}))
    assert read_json(path) == {"a": [1]}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ConvertError", 1),
        ("UsageError", 2),
        ("CheckpointError", 3),
        ("ExportError", 4),
        ("CheckError", 5),
        ("CalibrationError", 6),
        ("BuildError", 7),
        ("UnbuildableError", 7),
        ("BenchmarkError", 8),
    ],
)
def test_scripts_tell_failures_by_these_codes(name, code):
    """As docs/troubleshooting.md lists them."""
    error = getattr(errors, name)("what")
    assert isinstance(error, errors.ConvertError) and error.exit_code == code
    assert (str(error), error.fix, error.result) == ("what", "", None)
    assert getattr(errors, name)("what", result={"passed": False}).result == {"passed": False}


def test_what_is_ended_is_no_failure():
    import signal

    # as shells have it
    assert errors.INTERRUPTED == 128 + signal.SIGINT and issubclass(errors.Terminated, KeyboardInterrupt)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("abcdefgh", " Did you mean abcdefgh, abcdefgx, abcdefxx?"),  # the best first, three at most
        ("mnop", " Did you mean mnxy?"),  # half of the letters
        ("stuv", ""),  # a quarter of them
        ("", ""),
    ],
)
def test_names_that_are_near(word, hint):
    assert nearest(word, iter(["mnxy", "abcdexxx", "abcdefxx", "abcdefgh", "abcdefgx", "sxyz"])) == hint
    assert nearest(word, []) == ""
