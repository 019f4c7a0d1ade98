"""What each generation of TensorRT reads, one row each, so that no other code depends on its version."""

import dataclasses

from vit_convert.core.errors import UsageError, nearest


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The graphs that one TensorRT generation reads.

    Attributes:
        name: what `config.target` calls it.
        opset: ONNX opset that graphs are written in; a newer one would not help a vision transformer.
        max_opset: the newest opset that its parser reads; 0 for any that we write.
        precision_by_flag: whether fp16 is a builder flag on the fp32 graph, instead of a typed graph.
        precisions: what engines can compute in.
        stores_quantized_weights: whether it reads weights stored in int8 or fp8; else they are fp32 with a Q/DQ pair.
        fp16_lowering: the lowering (export/targets.py) that is fastest for fp16, if the model fits it; "" for none.
        norm_lowering: the same for models with GroupNorms; it needs our kernels, and `fp16_lowering` does without.
        int8_lowerings: the lowerings that int8 engines can be built from with ranges instead of Q/DQ.
        computes_text_ranges: whether an engine for texts of several lengths gives what its graph gives.
        cache_version: the version to write into a calibration cache on a host without this TensorRT, namely the last of
            its generation; "" if it reads no calibration cache.
    """

    name: str
    opset: int
    precisions: tuple[str, ...]
    max_opset: int = 0
    precision_by_flag: bool = False
    stores_quantized_weights: bool = True
    fp16_lowering: str = ""
    norm_lowering: str = ""
    int8_lowerings: tuple[str, ...] = ()
    computes_text_ranges: bool = True
    cache_version: str = ""

    def builds_from_lowerings(self, precision: str) -> bool:
        """Whether this precision may be built from any lowering of the fp32 graph (TensorRT 8 fp16 only)."""
        return self.precision_by_flag and precision == "fp16"

    def has_graph(self, precision: str) -> bool:
        """Whether a precision has a graph of its own besides model.onnx."""
        return precision != "fp32" and not self.builds_from_lowerings(precision)


_MODERN_OPSET = 20  # the first with Gelu, yet old enough for TensorRT 10.0; nothing later helps a ViT
_ALL = ("fp32", "fp16", "bf16", "int8", "fp8")

_ROWS = (
    # TensorRT compares the first line of a cache with its own version.
    Dialect(
        "trt8",
        17,
        ("fp32", "fp16", "int8"),
        max_opset=17,
        precision_by_flag=True,
        stores_quantized_weights=False,
        fp16_lowering="plugin",
        norm_lowering="groupnorm",
        int8_lowerings=("fused",),
        computes_text_ranges=False,  # measured with 8.6: off by up to 0.18 of scale in batches of more than one
        cache_version="8.6.1",
    ),
    Dialect("trt10", _MODERN_OPSET, _ALL, cache_version="10.16.1"),
    Dialect("trt11", _MODERN_OPSET, _ALL),
    Dialect("rtx", _MODERN_OPSET, _ALL),
)
DIALECTS = {row.name: row for row in _ROWS}


def dialect_named(name: str) -> Dialect:
    """Looks a dialect up.

    Args:
        name: for example "trt8".

    Raises:
        UsageError: no dialect has that name.

    Example:
        >>> dialect_named("trt8").precision_by_flag
        True
    """
    if name not in DIALECTS:
        raise UsageError(f"target={name!r}: not one of {', '.join(DIALECTS)}.{nearest(name, DIALECTS)}")
    return DIALECTS[name]


def dialect_of(*, rtx: bool, strongly_typed: bool, weakly_typed: bool) -> Dialect:
    """The dialect of an installed TensorRT, recognised by its features and not by its version.

    Args:
        rtx: whether it is TensorRT for RTX.
        strongly_typed: whether it can build a network in exactly the types of its graph.
        weakly_typed: whether precision can be a builder flag.
    """
    if rtx:
        return DIALECTS["rtx"]
    if not strongly_typed:
        return DIALECTS["trt8"]
    return DIALECTS["trt10" if weakly_typed else "trt11"]
