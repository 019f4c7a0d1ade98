"""Names of the operators of our own that a graph of the lowering `fused` or `kernels` has: the export writes them,
quantization finds them."""

ATTENTION, ADD_NORM, NORM = "VitAttention", "VitAddNorm", "VitNorm"
