"""From a plan's bytes to TensorRT's engine, with the settings that the runtime needs before."""

from typing import Any

from vit_convert.engine.backend.trt import Backend


def deserialise(backend: Backend, serialized: Any, *, version_compatible: bool) -> tuple[Any, Any]:
    """Loads a plan into GPU memory.

    Args:
        backend: the TensorRT that loads it.
        serialized: the plan (any buffer).
        version_compatible: whether it was built to be.

    Returns:
        The runtime, which has to outlive the engine, and the engine, or None if the plan does not load.
    """
    runtime = backend.module.Runtime(backend.logger)
    if version_compatible:
        runtime.engine_host_code_allowed = True  # such a plan brings the runtime that can read it
    return runtime, runtime.deserialize_cuda_engine(serialized)
