"""A client of Triton's HTTP protocol in NumPy and the standard library; copy it where this package is not.

Example: `infer("http://127.0.0.1:8000", "vit_b32_image", {"image": [[open("cat.jpg", "rb").read()]]})["class_names"]`
"""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np

_TYPES = {"FP32": "<f4", "FP16": "<f2", "UINT8": "u1", "INT8": "i1", "INT32": "<i4", "INT64": "<i8", "BOOL": "?"}
_NAMES = {np.dtype(dtype): name for name, dtype in _TYPES.items()}


def infer(url: str, model: str, inputs: Mapping[str, Any], timeout: float = 30.0) -> dict[str, np.ndarray]:
    """Sends {input: array, or lists of bytes}, returns {output: array}; a refusal is a ValueError with its reason."""
    arrays = {
        name: np.asarray(value, object if isinstance(_first(value), bytes) else None) for name, value in inputs.items()
    }
    blobs = {name: _pack(value) for name, value in arrays.items()}
    rows = [{"name": name, "shape": value.shape, "datatype": _NAMES.get(value.dtype, "BYTES"),
             "parameters": {"binary_data_size": len(blobs[name])}} for name, value in arrays.items()]  # fmt: skip
    header = json.dumps({"inputs": rows, "parameters": {"binary_data_output": True}}).encode()
    request = urllib.request.Request(f"{url}/v2/models/{model}/infer", b"".join([header, *blobs.values()]))
    request.add_header("Inference-Header-Content-Length", str(len(header)))
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            body, length = response.read(), int(response.headers["Inference-Header-Content-Length"])
    except urllib.error.HTTPError as e:
        raise ValueError(f"{model}: {json.loads(e.read() or b'{}').get('error', e)}") from e
    outputs: dict[str, np.ndarray] = {}
    offset = length
    for tensor in json.loads(body[:length])["outputs"]:
        size = tensor["parameters"]["binary_data_size"]
        outputs[tensor["name"]] = _unpack(body[offset : offset + size], tensor["datatype"]).reshape(tensor["shape"])
        offset += size
    return outputs


def _first(value: Any) -> Any:
    return _first(value[0]) if isinstance(value, list | tuple) and value else value


def _pack(value: np.ndarray) -> bytes:
    if value.dtype == object:
        return b"".join(len(part).to_bytes(4, "little") + part for part in value.ravel().tolist())
    return np.ascontiguousarray(value).tobytes()


def _unpack(blob: bytes, kind: str) -> np.ndarray:
    if kind != "BYTES":
        return np.frombuffer(blob, _TYPES[kind])
    found: list[bytes] = []
    while blob:
        size = 4 + int.from_bytes(blob[:4], "little")
        found, blob = [*found, blob[4:size]], blob[size:]
    return np.array(found, object)
