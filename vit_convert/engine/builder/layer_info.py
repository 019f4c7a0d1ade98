"""An engine's layers, as TensorRT's inspector shows them, and whether attention runs as one fused kernel."""

import collections
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from vit_convert.engine.runtime.engine import Engine

Layers = Mapping[str, Any]  # the inspector's JSON, {"Layers": […]}

# TensorRT's fused attention kernels (Myelin's _gemm_mha_v2_*, _gemv_mha_v1, and on Hopper mha0, mha1, …; fmha_* of the
# hand-written ones), and ours, mangled or not. ONNX node names often hold "mha" too, so "mha" within a name proves
# nothing.
FUSED_KERNEL = re.compile(r"gem[mv]_mha|fmha|^mha\d+\b|vit.*(attention|stream|windows)_kernel", re.IGNORECASE)
# "CaskConvolution", "CaskGemmMatrixMultiply", "gemm", "conv"
_PRODUCT = re.compile(r"conv|gemm|matrix", re.IGNORECASE)
# "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32_…", "ampere_int8_…", "…_imma_…"
_INT8_KERNEL = re.compile(r"(^|_)i8|int8|imma", re.IGNORECASE)
OTHER_PROFILE = "[profile "  # in the names of the layers of an engine's second and later profiles
# If Myelin hides a subgraph (8.6), the inspector shows a single node for all of it.
_HIDDEN = "ForeignNode["
# "Half", "Row major linear FP16 format", "Float", "Int8", …: the wording changed with every major version
_TYPES = (
    ("fp8", r"fp8|e4m3"),
    ("int8", r"int8"),
    ("bf16", r"bf16|bfloat16"),
    ("fp16", r"half|fp16|float16"),
    ("fp32", r"float|fp32"),
)


@dataclasses.dataclass(frozen=True)
class FusedAttention:
    """Fused attention kernels of one engine.

    Attributes:
        count: how many, one for each attention that was fused.
        precisions: how many in each precision ({"fp16": 12}), by the type of the first operand.
    """

    count: int
    precisions: dict[str, int]

    def describe(self, num_blocks: int) -> str:
        """ "yes, fp16, 12 of 12", "in part, fp16, 4 of 12" or "no, 0 of 12"."""
        verdict = "no" if not self.count else "yes" if self.count >= num_blocks else "in part"
        return ", ".join([verdict, *self.precisions, f"{self.count} of {num_blocks}"])


def fused_attention(layer_info: Layers) -> FusedAttention | None:
    """Finds the fused attention kernels in an engine's layer information.

    Args:
        layer_info: the inspector's JSON, {"Layers": [...]}, for an engine built with detailed verbosity.

    Returns:
        The count, or None if the inspector hides the kernels (TensorRT 8.6 shows a whole transformer as one node).
    """
    entries = layer_info["Layers"]
    # str: built without detailed verbosity
    if any(isinstance(entry, str) or _HIDDEN in entry["Name"] for entry in entries):
        return None
    return count_fused((f"{entry.get('TacticName', '')} {entry['Name']}", _first_type(entry)) for entry in entries)


def count_fused(kernels: Iterable[tuple[str, str]]) -> FusedAttention:
    """Counts the fused attention kernels among kernels.

    Args:
        kernels: (name, words that hold the data type) of each kernel, from the inspector or from a profiled run.
    """
    precisions = collections.Counter(_precision(words) for name, words in kernels if FUSED_KERNEL.search(name))
    return FusedAttention(sum(precisions.values()), dict(precisions))


def count_int8(layer_info: Layers) -> int:
    """Counts the matrix products and convolutions that run in int8, for one profile and as far as the inspector shows
    them.

    Args:
        layer_info: the inspector's JSON, {"Layers": [...]}.
    """
    entries = [
        entry for entry in layer_info["Layers"] if not isinstance(entry, str) and OTHER_PROFILE not in entry["Name"]
    ]
    return sum(bool(_PRODUCT.search(entry.get("LayerType", ""))) and _runs_in_int8(entry) for entry in entries)


def _runs_in_int8(entry: Mapping[str, Any]) -> bool:
    # 8.6 gives operands of dynamic shape no type ("N/A due to dynamic shapes"), but their weights and kernels have one.
    types = (_precision(_first_type(entry)), (entry.get("Weights") or {}).get("Type", "").lower())
    return "int8" in types or bool(_INT8_KERNEL.search(entry.get("TacticName", "")))


def engine_layers(engine: Engine) -> tuple[Layers | None, str]:
    """Asks TensorRT's inspector for an engine's layers.

    Args:
        engine: loaded.

    Returns:
        The inspector's JSON and "", or None and the reason.
    """
    try:  # 8.6 does not escape control characters in names
        return json.loads(engine.information, strict=False), ""
    except ValueError as e:
        return None, f"TensorRT's inspector does not tell ({e})"


def _first_type(entry: Mapping[str, Any]) -> str:
    operands = entry.get("Inputs") or [{}]
    # 11 split "Format/Datatype" in two
    return " ".join(str(value) for key, value in operands[0].items() if "datatype" in key.lower())


def _precision(words: str) -> str:
    return next((precision for precision, pattern in _TYPES if re.search(pattern, words, re.IGNORECASE)), "unknown")
