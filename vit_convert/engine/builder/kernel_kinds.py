"""The kinds of kernels, judged by their names."""

import collections
import re
from collections.abc import Iterable

from vit_convert.core.engine_results import KernelKind
from vit_convert.engine.builder.layer_info import FUSED_KERNEL, OTHER_PROFILE, Layers

_SHOWN = 3  # number of names per kind
# In this order. Myelin, TensorRT's compiler for what lies between products, composes a kernel's name from its
# operators: __myl_AddCasMulMeaSubMul_0x… adds, casts, multiplies and takes a mean.
_KINDS = (
    ("fused attention", FUSED_KERNEL),
    ("copy", re.compile(r"copy|permut|transpos|reformat|shuffle|concat|slice|gather|memcpy|memset", re.IGNORECASE)),
    ("normalisation", re.compile(r"norm|softmax|reduce|__myl\w*(Mea|Sum|Max|Red|Exp)", re.IGNORECASE)),
    ("product", re.compile(r"gem[mv]|xmma|cutlass|conv|nvjet|wgmma|cublas|matrix|MatMul|_Mat|_Fc", re.IGNORECASE)),
    ("elementwise", re.compile(r"elementwise|pointwise|pwgen|gelu|tanh|__myl|kgen", re.IGNORECASE)),
)


def kernel_kinds(names: Iterable[str]) -> tuple[KernelKind, ...]:
    """Counts kernels by kind, the most frequent kind first.

    Args:
        names: of the kernels that one run launches, each as often as it is launched.

    Example:
        >>> names = ["fmha_v2_fp16", "sm80_xmma_gemm_f16", "sm80_xmma_gemm_f16"]
        >>> [(row.kind, row.count) for row in kernel_kinds(names)]
        [('product', 2), ('fused attention', 1)]
    """
    found: dict[str, collections.Counter[str]] = {}
    for name in names:
        kind = next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")
        found.setdefault(kind, collections.Counter())[name] += 1
    rows = [
        KernelKind(kind=kind, count=counts.total(), names=tuple(name for name, _ in counts.most_common(_SHOWN)))
        for kind, counts in found.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.count))


def kinds_of_layers(layers: Layers) -> tuple[KernelKind, ...]:
    """The same for an engine's layers in its first profile, as the inspector shows them."""
    entries = [entry for entry in layers["Layers"] if not isinstance(entry, str) and OTHER_PROFILE not in entry["Name"]]
    return kernel_kinds(
        f"{entry.get('TacticName') or entry.get('LayerType', '')} {entry['Name']}".strip() for entry in entries
    )
