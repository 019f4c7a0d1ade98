"""Replaces Triton's onnxruntime backend in a server without it: the same config.pbtxt and model.onnx, on the CPU.

A "Python-based backend": a folder named `onnxruntime` in --backend-directory whose model.py names this class serves
every model that says `backend: "onnxruntime"`. `python -m vit_convert.serve.triton --serve` makes one for a server from
a Python package; NVIDIA's containers have the real one.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.core.ort_options import session_options
from vit_convert.serve.triton.models.batches import answer_together
from vit_convert.serve.triton.models.common import backend_utils, parameters

_THREADS = "intra_op_thread_count"


class TritonPythonModel:
    """The class named in the backend's `model.py`."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Opens the graph of the model's version folder."""
        import onnxruntime

        config, given = json.loads(args["model_config"]), parameters(args)
        path = (
            pathlib.Path(args["model_repository"])
            / args["model_version"]
            / (config.get("default_model_filename") or "model.onnx")
        )
        path = path / "model.onnx" if path.is_dir() else path  # a graph with separate weights is a folder
        options = session_options(onnxruntime)
        options.intra_op_num_threads = int(given.get(_THREADS, 0))
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        self._most = max(1, config["max_batch_size"])
        graph = {tensor.name for tensor in (*self._session.get_inputs(), *self._session.get_outputs())}
        if missing := {*self._inputs, *self._outputs} - graph:
            raise backend_utils().TritonModelException(
                f"config.pbtxt names {sorted(missing)}; {path.name} has {sorted(graph)}"
            )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers the requests that Triton combined."""
        return answer_together(requests, self._inputs, self._run, self._most)

    def finalize(self) -> None:
        """Releases the graph."""
        del self._session

    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs))))
