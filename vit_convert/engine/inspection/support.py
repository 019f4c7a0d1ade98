"""What the parser of each TensorRT generation reads: operators, types, opsets.

Source: the operator list of each onnx-tensorrt release, the release notes, and experiments with TensorRT-RTX 1.7. An
operator in neither list is "not known": only the parser itself can tell.
"""

import dataclasses
from collections.abc import Mapping


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_READ = _words("""
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip Concat
Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu
Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool
GlobalMaxPool Greater GreaterOrEqual HardSigmoid Identity If ImageScaler InstanceNormalization IsNaN LRN LSTM
LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean Min
Mul Neg NonMaxSuppression Not Or PRelu Pad ParametricSoftplus Pow QuantizeLinear RNN RandomUniform RandomUniformLike
Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Relu Reshape Resize ReverseSequence Round ScaledTanh Scan Scatter ScatterElements ScatterND Selu
Shape Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh
ThresholdedRelu Tile TopK Transpose Unsqueeze Upsample Where Xor
""")
_NEVER = _words("""
Bernoulli BitShift Compress ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear ImageDecoder MatMulInteger
MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement
OptionalHasElement QLinearConv QLinearMatMul RandomNormal RandomNormalLike RegexFullMatch STFT SequenceAt
SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss
SplitToSequence StringConcat StringNormalizer StringSplit TfIdfVectorizer Unique
""")
# Operators that 8.6 does not read, with equivalents that it does.
_NOT_IN_8 = {
    "Gelu": "Write x / 2 · (1 + Erf(x / √2)), which it fuses: convert with target=trt8.",
    "Attention": "Write MatMul, Softmax and MatMul: convert with target=trt8.",
    "RMSNormalization": "Write it with ReduceMean, Sqrt and Div.",
    "RotaryEmbedding": "Write it with Mul, Add and Concat.",
    "Swish": "Write x · Sigmoid(x).",
    "Mish": "Write x · Tanh(Softplus(x)).",
    "BitwiseAnd": "",
    "BitwiseOr": "",
}
_FLOATS = ("float32", "float16", "float64")
_PLAIN = (*_FLOATS, "int8", "int32", "int64", "bool", "uint8")
_MODERN = (*_PLAIN, "bfloat16", "float8_e4m3fn", "int4", "float4_e2m1")
OUR_DOMAIN = "vit_convert"  # of the kernels in kernels/
PLUGIN_DOMAIN = "tensorrt.plugin"


@dataclasses.dataclass(frozen=True)
class Support:
    """One generation's parser.

    Attributes:
        name: as in `config.target`.
        opsets: the oldest and newest of ONNX's own operators.
        opset_note: if not every release of the generation reads all of these; otherwise "".
        types: of values, by their names in numpy and ml_dtypes.
        not_read: operators that it does not read, with what to write instead.
        plugins: whether nodes may name plugins.
        quantized: types that QuantizeLinear may round to.
        casts_int64: whether int64 becomes int32, and cannot be an input or output.
        has_our_plugins: whether the plugins that our lowerings name are made for it.
        strict_qdq: whether Q/DQ needs a zero point, float32 scales and float32 weights, and refuses uint8.
        fuses_quantized_attention: whether attention is fused in a graph with Q/DQ.
        one_type_norms: whether a LayerNormalization's inputs must be of one type.
        float32_attention: whether it builds `Attention` in float32.
        attention_since: the first release that reads `Attention`; "" if all do, or none.
        also_reads: operators that it reads, and of which nothing is known for the others.
        asked: whether its parser itself was asked about each operator and opset (benchmarks/gpu/ask_parser.py).
        refuses_opsets: whether it refuses a graph for the number of its opset; the others read what they know in it.
    """

    name: str
    opsets: tuple[int, int]
    types: frozenset[str]
    not_read: Mapping[str, str]
    quantized: tuple[str, ...]
    opset_note: str = ""
    plugins: bool = True
    casts_int64: bool = False
    has_our_plugins: bool = False
    strict_qdq: bool = False
    fuses_quantized_attention: bool = True
    one_type_norms: bool = False
    float32_attention: bool = True
    attention_since: str = ""
    also_reads: frozenset[str] = frozenset()
    asked: bool = False
    refuses_opsets: bool = False

    def reads(self, op: str) -> bool | None:
        """Whether it reads one of ONNX's own operators; None if unknown."""
        if op in self.not_read:
            return False
        return True if op in _READ or op in _NEWER or op in self.also_reads else None


_NEWER = {
    *("Gelu", "Attention", "Mish", "GroupNormalization", "HardSwish", "Mod", "NonZero", "OneHot", "Hardmax", "IsInf"),
    *("Reciprocal", "Trilu", "RoiAlign", "Shrink", "GridSample", "RMSNormalization", "RotaryEmbedding", "Swish"),
}
_NEVER_READ = dict.fromkeys(sorted(_NEVER), "")
# What the parser of TensorRT-RTX 1.7 said of one-node files of each operator.
_RTX_READS = _words("BlackmanWindow CastLike HammingWindow HannWindow MeanVarianceNormalization STFT TensorScatter")
_RTX_REFUSES = _words("""
AffineGrid BitCast BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im CumProd DeformConv NonZero RoiAlign
""")
_MODERN_QUANTIZED = ("int8", "float8_e4m3fn", "int4", "float4_e2m1")
_PLUGIN = "TensorRT reads it by a plugin, for which TensorRT-RTX has no library: leave it outside the engine."
_TRT10_NOTE = "10.0 and 10.1 read up to 20"

SUPPORT = {
    row.name: row
    for row in (
        Support(
            name="trt8",
            opsets=(9, 17),
            types=frozenset(_PLAIN),
            not_read={**_NEVER_READ, **_NOT_IN_8},
            quantized=("int8",),
            casts_int64=True,
            has_our_plugins=True,
            strict_qdq=True,
            refuses_opsets=True,
            fuses_quantized_attention=False,
        ),
        Support(
            name="trt10",
            opsets=(9, 24),
            types=frozenset(_MODERN),
            not_read=_NEVER_READ,
            quantized=_MODERN_QUANTIZED,
            opset_note=_TRT10_NOTE,
            attention_since="10.14",
        ),
        Support("trt11", (9, 24), frozenset(_MODERN), _NEVER_READ, _MODERN_QUANTIZED),
        Support(
            name="rtx",
            opsets=(9, 26),
            types=frozenset(_MODERN),
            not_read={
                **dict.fromkeys(sorted((_NEVER | _RTX_REFUSES) - _RTX_READS), ""),
                "NonZero": _PLUGIN,
                "RoiAlign": _PLUGIN,
            },
            also_reads=_RTX_READS,
            asked=True,
            quantized=_MODERN_QUANTIZED,
            plugins=False,
            one_type_norms=True,
            float32_attention=False,
        ),
    )
}
