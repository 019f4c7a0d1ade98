"""A client for Triton's HTTP protocol that needs only NumPy and the standard library; copy it to hosts without this
package.

Example: `infer("http://127.0.0.1:8000", "vit_b32_image", {"image": [[open("cat.jpg", "rb").read()]]})["class_names"]`
"""

import json
from typing import Any
from urllib import error, request

import numpy as np

TYPES = {"FP32": "<f4", "FP16": "<f2", "UINT8": "u1", "INT8": "i1", "INT32": "<i4", "INT64": "<i8", "BOOL": "?"}
NAMES = {np.dtype(dtype): name for name, dtype in TYPES.items()}  # lists of bytes, each preceded by its length


def infer(url: str, model: str, inputs: dict[str, Any], timeout: float = 30.0) -> dict[str, np.ndarray]:
    """Sends {input: array, or lists of bytes}, returns {output: array}; a refusal is a ValueError with its reason."""
    rows, blobs, found, key = [], [], {}, "Inference-Header-Content-Length"
    for name, given in inputs.items():
        value = np.asarray(given, getattr(given, "dtype", object))
        texts = [len(text).to_bytes(4, "little") + text for text in value.flat] if value.dtype == object else []
        blobs.append(b"".join(texts) if value.dtype == object else value.tobytes())
        about = {"shape": value.shape, "datatype": NAMES.get(value.dtype, "BYTES")}
        rows.append({"name": name, **about, "parameters": {"binary_data_size": len(blobs[-1])}})
    header = json.dumps({"inputs": rows, "parameters": {"binary_data_output": True}}).encode()
    asked = request.Request(f"{url}/v2/models/{model}/infer", header + b"".join(blobs), {key: str(len(header))})
    try:
        with request.urlopen(asked, timeout=timeout) as reply:
            body, end = reply.read(), int(reply.headers[key] or -1)  # -1: no output has a byte
    except error.HTTPError as e:
        raise ValueError(f"{model}: {json.loads(e.read() or b'{}').get('error', e)}") from e
    for row in json.loads(body[:end] if end >= 0 else body)["outputs"]:
        place, end, kind, texts = end, end + row.get("parameters", {}).get("binary_data_size", 0), row["datatype"], []
        while kind == "BYTES" and place < end:
            size = 4 + int.from_bytes(body[place : place + 4], "little")
            texts, place = [*texts, body[place + 4 : place + size]], place + size
        values = np.array(texts, object) if kind == "BYTES" else np.frombuffer(body[place:end], TYPES[kind])
        found[row["name"]] = values.reshape(row["shape"])
    return found
