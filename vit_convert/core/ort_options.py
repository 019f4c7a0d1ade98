"""How all our onnxruntime sessions are opened, so that a check gives the same result on every machine; does not need
onnx."""

from typing import Any

from vit_convert.core.errors import UsageError

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
# In order of preference, with options: CUDA's float32 products default to TF32, but the graph was proved in float32.
PROVIDERS: dict[str, dict[str, str]] = {CUDA: {"use_tf32": "0"}, CPU: {}}


def session_options(onnxruntime: Any) -> Any:
    """Options that make a quantized graph compute the same on every machine; all our sessions start from them.

    Q/DQ pairs are computed as written: rounded to integers, scaled, and multiplied in float32. That equals TensorRT's
    32-bit sums up to the order of rounding. Fused pairs would become integer kernels, which depend on the processor: on
    x86 without VNNI (AVX2, the first AVX-512) they add pairs of products in 16 bits, which saturate at 32 767 where two
    products may reach 32 258 + 32 258. `session.x64quantprecision` avoids that for constant weights only, but not in
    attention, where both factors are computed. FP8 must not be fused either: onnxruntime takes it for INT8, and the
    graph becomes invalid. Nor may onnxruntime drop a Relu before a pair, as it does when the zero point is the type's
    smallest value: it mistakes FP8's zero for that, and lets negative values pass.

    Args:
        onnxruntime: the module.

    Returns:
        onnxruntime.SessionOptions.

    Source: onnxruntime/core/session/onnxruntime_session_options_config_keys.h; docs "Quantize ONNX models", "S8S8 on
    x86-64".
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("optimization.disable_specified_optimizers", "ReluQuantRewrite;ClipQuantRewrite")
    return options


def providers_for(onnxruntime: Any, device: str) -> list[tuple[str, dict[str, str]]]:
    """The providers for a session that may run on a GPU.

    Args:
        onnxruntime: the module.
        device: "cpu", "cuda", or "auto" for CUDA if this onnxruntime has it.

    Returns:
        (name, options) of each provider, the preferred one first.

    Raises:
        UsageError: device is "cuda", and this onnxruntime has no CUDA.

    Example:
        >>> import onnxruntime
        >>> providers_for(onnxruntime, "cpu")
        [('CPUExecutionProvider', {})]
    """
    has_cuda = CUDA in onnxruntime.get_available_providers()
    if device == "cuda" and not has_cuda:
        raise UsageError(
            f"device cuda: onnxruntime {onnxruntime.__version__} has no {CUDA}",
            fix="pip install onnxruntime-gpu in place of onnxruntime, or use the device cpu.",
        )
    names = [CUDA, CPU] if has_cuda and device != "cpu" else [CPU]
    if CUDA in names:
        onnxruntime.preload_dlls()  # CUDA's libraries may come from Python packages, where the loader does not look
    return [(name, PROVIDERS[name]) for name in names]


def device_of(session: Any) -> str:
    """Where a session runs, "cuda" or "cpu": onnxruntime drops a provider that does not load (because a library is
    missing) with no more than a line in its log."""
    return "cuda" if CUDA in session.get_providers() else "cpu"
