"""A server's replies without a server: what it would send, what it was asked, and in which order."""

import hashlib
import http.client
import io
import urllib.error

DATA = bytes(range(256)) * 40
ADDRESS = "gs://models/a b/B_16.npz"
NAME = f"B_16-{hashlib.sha256(ADDRESS.encode()).hexdigest()[:8]}.npz"


class Reply(io.BytesIO):
    """Sends what it has, of which the head may say something else."""

    def __init__(self, data=DATA, status=200, **headers):
        super().__init__(data)
        self.status, self.headers = status, http.client.HTTPMessage()
        for name, value in headers.items():
            self.headers[name.replace("_", "-")] = value


class Server:
    """Answers with a list of replies, or errors, and keeps what was asked."""

    def __init__(self):
        self.replies, self.asked, self.timeouts, self.pauses = [], [], [], []

    def __call__(self, request, timeout):
        self.asked.append((request.full_url, dict(request.header_items())))
        self.timeouts.append(timeout)
        answer = self.replies.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    @property
    def ranges(self):
        return [(headers.get("Range"), headers.get("If-range")) for _, headers in self.asked]


def whole(data=DATA, **headers):
    return Reply(data, Content_Length=str(len(data)), **headers)


def part_of(start, data=DATA, **headers):
    return Reply(data[start:], 206, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}", **headers)


def status(code, **headers):
    message = http.client.HTTPMessage()
    for name, value in headers.items():
        message[name.replace("_", "-")] = value
    return urllib.error.HTTPError("http://x", code, "said", message, None)
