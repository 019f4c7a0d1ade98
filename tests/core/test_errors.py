"""What a message may hold, wherever its words come from."""

import json

import pytest

from vit_convert.core.bundle import read_json
from vit_convert.core.errors import CheckpointError


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
