"""The client against a server of the standard library that speaks the protocol by struct, as it is specified."""

import contextlib
import http.server
import json
import pathlib
import struct
import threading

import numpy as np
import pytest

from vit_convert.serve.triton import client
from vit_convert.serve.triton.client import infer


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with what it was sent: "x" doubled, and the words of "words" backwards; model "broken" refuses."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        size = int(self.headers["Inference-Header-Content-Length"])
        inputs, offset = {}, size
        for row in json.loads(body[:size])["inputs"]:
            count = row["parameters"]["binary_data_size"]
            inputs[row["name"]] = (row, body[offset : offset + count])
            offset += count
        if "broken" in self.path:
            return self._send(400, json.dumps({"error": "unexpected shape for input 'x'"}).encode(), {})
        if (
            "empty" in self.path
        ):  # as a server whose stub has a NumPy that it does not understand, seen with Triton 2.51
            output = {"name": "y", "datatype": "FP32", "shape": [2 if "wrong" in self.path else 0, 3], "data": []}
            return self._send(200, json.dumps({"outputs": [output]}).encode(), {})
        row, blob = inputs["x"]
        doubled = b"".join(struct.pack("<f", 2 * value) for (value,) in struct.iter_unpack("<f", blob))
        words = b""
        blob = inputs["words"][1]
        while blob:
            (length,) = struct.unpack("<I", blob[:4])
            words += struct.pack("<I", length) + blob[4 : 4 + length][::-1]
            blob = blob[4 + length :]
        outputs = [
            {**row, "name": "y", "parameters": {"binary_data_size": len(doubled)}},
            {**inputs["words"][0], "name": "sdrow", "parameters": {"binary_data_size": len(words)}},
        ]
        header = json.dumps({"outputs": outputs}).encode()
        self._send(200, header + doubled + words, {"Inference-Header-Content-Length": str(len(header))})

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def url():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, contextlib.ExitStack() as stack:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        yield f"http://127.0.0.1:{server.server_port}"


def test_arrays_and_bytes(url):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = infer(url, "tiny", {"x": x, "words": [[b"cat"], [b""]]})
    np.testing.assert_array_equal(found["y"], 2 * x)
    assert found["sdrow"].tolist() == [[b"tac"], [b""]]


def test_it_is_forty_lines_of_numpy_and_the_standard_library():
    lines = pathlib.Path(client.__file__).read_text().splitlines()
    imports = {line.split()[1].partition(".")[0] for line in lines if line.startswith(("import", "from"))}
    assert len(lines) <= 40 and imports == {"json", "typing", "urllib", "numpy"}


def test_bytes_are_kept_as_they_are(url):
    """Zeros at the end of an image file too, which NumPy's own strings drop; in arrays and in lists."""
    for words in ([[b"a\0\0"]], np.array([[b"a\0\0"]], object)):
        found = infer(url, "tiny", {"x": np.zeros(1, np.float32)[:, None], "words": words})
        assert found["sdrow"].tolist() == [[b"\0\0a"]] and found["sdrow"].shape == (1, 1)


def test_a_refusal_has_the_servers_reason(url):
    with pytest.raises(ValueError, match="broken: unexpected shape for input 'x'"):
        infer(url, "broken", {"x": np.zeros((1, 1), np.float32), "words": [[b"a"]]})


def test_an_answer_without_a_byte(url):
    given = {"x": np.zeros((0, 3), np.float32), "words": [[]]}
    assert infer(url, "empty", given)["y"].shape == (0, 3)
    with pytest.raises(ValueError, match="reshape"):
        infer(url, "empty_wrong", given)
