"""What our models in Triton's Python backend have in common."""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.core.errors import ConvertError


def backend_utils() -> Any:
    """Triton's module for Python models, which exists only within its stub process."""
    return importlib.import_module("triton_python_backend_utils")


def parameters(args: Mapping[str, str]) -> dict[str, str]:
    """The free parameters of a model's config.

    Args:
        args: what Triton gives to `initialize`.
    """
    config = json.loads(args["model_config"])
    return {key: value["string_value"] for key, value in config.get("parameters", {}).items()}


def array_of(request: Any, name: str) -> np.ndarray:
    """One input of a request."""
    return backend_utils().get_input_tensor_by_name(request, name).as_numpy()


def answer(outputs: Mapping[str, np.ndarray]) -> Any:
    """A response that holds these outputs."""
    utils = backend_utils()
    return utils.InferenceResponse([utils.Tensor(name, value) for name, value in outputs.items()])


def refusal(error: Exception) -> Any:
    """A response that says why there is no answer."""
    utils = backend_utils()
    fix = f". {error.fix}" if isinstance(error, ConvertError) and error.fix else ""
    return utils.InferenceResponse([], utils.TritonError(f"{error}{fix}"))


def each(requests: Sequence[Any], compute: Callable[[Any], Mapping[str, np.ndarray]]) -> list[Any]:
    """Answers requests one by one, so that a bad one does not affect the others."""
    responses = []
    for request in requests:
        try:
            responses.append(answer(compute(request)))
        except Exception as e:  # whatever happens, Triton wants one response for each request
            responses.append(refusal(e))
    return responses
