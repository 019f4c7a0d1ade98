"""A replacement for the parts of Triton that our Python models use, without a server."""

import collections
import sys
import types
from typing import Any

from vit_convert.serve.triton.offered import Offered

COUNTED: collections.Counter[tuple[str, str]] = collections.Counter()  # by metric and model


class _Family:
    COUNTER = GAUGE = None

    def __init__(self, name: str, **about: Any):
        self._name = name

    def Metric(self, labels: dict[str, str]) -> Any:
        def increment(by: int) -> None:
            COUNTED[self._name, labels["model"]] += by

        return types.SimpleNamespace(increment=increment, set=lambda to: None)


def install_utils() -> None:
    """Puts what our Python model uses of Triton's module in its place."""
    module = types.ModuleType("triton_python_backend_utils")
    module.get_input_tensor_by_name = lambda request, name: types.SimpleNamespace(as_numpy=lambda: request[name])
    module.Tensor = lambda name, value: (name, value)
    module.TritonError = str
    module.InferenceResponse = lambda tensors, error=None: types.SimpleNamespace(tensors=dict(tensors), error=error)
    module.MetricFamily = _Family
    sys.modules[module.__name__] = module


def config_of(offered: Offered, retry_seconds: float) -> dict[str, Any]:
    """What a server would hand to the model, of its config."""
    return {
        "max_batch_size": offered.max_batch,
        "input": [{"name": tensor.name} for tensor in offered.signature.inputs],
        "output": [{"name": tensor.name} for tensor in offered.signature.outputs],
        "parameters": {"retry_seconds": {"string_value": str(retry_seconds)}},
    }
