"""A bundle in Triton's Python backend: its engine while that works, otherwise the checked graph; a metric says
which."""

import json
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.core.errors import ConvertError
from vit_convert.core.host import give_memory_back
from vit_convert.serve.session import FallbackSession
from vit_convert.serve.triton.models.batches import answer_together
from vit_convert.serve.triton.models.common import backend_utils, parameters

BUNDLE = "bundle"  # beside model.py
_RETRY_SECONDS = 60.0


class TritonPythonModel:
    """The class named in `1/model.py` of a repository; Triton calls its three methods, one call at a time."""

    @property
    def runs_on(self) -> str:
        """What the next request will run on: "tensorrt", "rtx" or "onnxruntime"."""
        return (self._fresh or self._session).runs_on

    def initialize(self, args: Mapping[str, str]) -> None:
        """Opens the bundle in the model's version folder."""
        config, given = json.loads(args["model_config"]), parameters(args)
        self._folder = pathlib.Path(args["model_repository"]) / args["model_version"] / BUNDLE
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        self._most = max(1, config["max_batch_size"])
        self._retry_seconds = float(given.get("retry_seconds", _RETRY_SECONDS))
        self._metrics = _Metrics(args["model_name"], args["model_version"])
        self._session = FallbackSession(str(self._folder))
        self._fresh: FallbackSession | None = None
        self._waiting: threading.Thread | None = None
        self._retrying = False
        self._closed = threading.Event()
        self._metrics.runs_on(self._session.runs_on)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers the requests that Triton combined."""
        self._take_fresh()
        return answer_together(requests, self._inputs, self._run, self._most)

    def finalize(self) -> None:
        """Releases the engine's memory."""
        self._closed.set()
        if self._waiting is not None:
            self._waiting.join()
        self._take_fresh()
        self._session.close()

    def _take_fresh(self) -> None:
        """Switches to an engine that works again; between two runs, nothing uses the session that it replaces."""
        fresh, self._fresh = self._fresh, None
        if fresh is not None:
            self._retrying = False
            self._session.close()
            self._session = fresh
            give_memory_back(collect=False)  # of the fallback graph, which may be a gigabyte
            self._metrics.runs_on(fresh.runs_on)

    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        session, before = self._session, self._session.runs_on
        found = session.run(dict(inputs))
        if session.runs_on != before:
            self._metrics.engine_failed()
            self._metrics.runs_on(session.runs_on)
            self._retry_later()
        self._metrics.images.increment(len(next(iter(found.values()))))
        return {name: found[name] for name in self._outputs}

    def _retry_later(self) -> None:
        """Loads the engine again after a while: what stopped it (memory, a driver problem) may be over."""
        if self._retry_seconds > 0 and not self._retrying:
            self._retrying = True  # until `_take_fresh`: the thread itself may live a little longer
            self._waiting = threading.Thread(target=self._retry, daemon=True)
            self._waiting.start()

    def _retry(self) -> None:
        while not self._closed.wait(self._retry_seconds):
            try:
                fresh = FallbackSession(str(self._folder))
            except ConvertError:
                continue
            if fresh.runs_on == "onnxruntime":
                fresh.close()
                continue
            self._fresh = fresh
            return


class _Metrics:
    """The metrics that `:8002/metrics` shows in addition to Triton's own."""

    def __init__(self, model: str, version: str):
        utils = backend_utils()

        def family(name: str, text: str, kind: Any) -> Any:
            return utils.MetricFamily(name=name, description=text, kind=kind)

        self._labels = {"model": model, "version": version}
        counter, gauge = utils.MetricFamily.COUNTER, utils.MetricFamily.GAUGE
        self._families = [
            family("vit_convert_images_total", "Images computed", counter),
            family(
                "vit_convert_engine_failures_total", "Times that the engine failed and onnxruntime took over", counter
            ),
            family("vit_convert_runs_on", "1 for what the model runs on now", gauge),
        ]
        self.images = self._families[0].Metric(labels=self._labels)
        self._failures = self._families[1].Metric(labels=self._labels)
        names = ("tensorrt", "rtx", "onnxruntime")
        self._gauges = {name: self._families[2].Metric(labels={**self._labels, "runs_on": name}) for name in names}

    def engine_failed(self) -> None:
        self._failures.increment(1)

    def runs_on(self, name: str) -> None:
        for known, gauge in self._gauges.items():
            gauge.set(1 if known == name else 0)
