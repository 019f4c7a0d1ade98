"""Which precisions a TensorRT can build, and which types of a parsed network honour them; TensorRT's network is stood
in for."""

import collections
import types

import pytest

from vit_convert.core.errors import BuildError
from vit_convert.engine.backend.cuda import Gpu
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.builder.network import ParsedGraph
from vit_convert.engine.builder.precision import (
    TypeCounts,
    builds_strongly_typed,
    count_types,
    require_precision,
    require_types,
    set_ranges,
    set_weak_precision,
)
from vit_convert.engine.builder.request import BuildRequest

KINDS = types.SimpleNamespace(
    CONSTANT=0,
    MATRIX_MULTIPLY=1,
    CONVOLUTION=2,
    EINSUM=3,
    ATTENTION_INPUT=4,
    QUANTIZE=5,
    DEQUANTIZE=6,
    SOFTMAX=7,
    SHUFFLE=8,
)
WEAK_KINDS = types.SimpleNamespace(**{name: kind for name, kind in vars(KINDS).items() if name != "ATTENTION_INPUT"})
FLAGS = types.SimpleNamespace(
    FP16="FP16", INT8="INT8", OBEY_PRECISION_CONSTRAINTS="OBEY", PREFER_PRECISION_CONSTRAINTS="PREFER"
)
TRT8 = types.SimpleNamespace(
    __name__="tensorrt",
    LayerType=WEAK_KINDS,
    BuilderFlag=FLAGS,
    DataType=types.SimpleNamespace(FLOAT="fp32", INT8="int8"),
    IInt8EntropyCalibrator2=object,
    NetworkDefinitionCreationFlag=types.SimpleNamespace(EXPLICIT_BATCH=0),
)
TRT10 = types.SimpleNamespace(
    __name__="tensorrt",
    LayerType=KINDS,
    BuilderFlag=FLAGS,
    DataType=types.SimpleNamespace(FLOAT="fp32", BF16="bf16"),
    IInt8EntropyCalibrator2=object,
    NetworkDefinitionCreationFlag=types.SimpleNamespace(EXPLICIT_BATCH=0, STRONGLY_TYPED=1),
)
RTX = types.SimpleNamespace(
    __name__="tensorrt_rtx",
    LayerType=KINDS,
    BuilderFlag=types.SimpleNamespace(),
    DataType=types.SimpleNamespace(FLOAT="fp32", BF16="bf16"),
    NetworkDefinitionCreationFlag=types.SimpleNamespace(STRONGLY_TYPED=0),
)
EIGHT = Backend("tensorrt", "8.6.0", TRT8, Gpu("NVIDIA P40", "sm61", 24 << 30, "0", "12"), None)
TEN = Backend("tensorrt", "10.1.0", TRT10, None, None)
RTX_1 = Backend("rtx", "1.7", RTX, None, None)


@pytest.mark.parametrize(
    ("backend", "able"),
    [(EIGHT, {"fp32", "fp16", "int8"}), (TEN, {"fp32", "fp16", "bf16", "int8", "fp8"}), (RTX_1, None)],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_what_a_backend_can_build(backend, able, precision):
    if able is None or precision in able:
        require_precision(backend, request(precision))
    else:
        with pytest.raises(BuildError, match=rf"precision {precision}: tensorrt 8\.6\.0 cannot build it") as caught:
            require_precision(backend, request(precision))
        assert caught.value.fix == "Use fp16, or TensorRT 10 or later."


def test_a_precision_of_no_such_name():
    with pytest.raises(BuildError, match=r"precision 'fp61': unknown\. Did you mean fp16") as caught:
        require_precision(TEN, request("fp61"))
    assert caught.value.fix == "Use fp32, fp16, bf16, int8, fp8."


def test_calibration_is_for_int8_and_for_a_tensorrt_that_has_it():
    require_precision(EIGHT, request("int8", calibrator=object()))
    require_precision(TEN, request("int8", calibrator=object()))
    for precision in ("fp16", "fp8"):
        with pytest.raises(BuildError, match=f"precision {precision} with a calibrator: only int8 is calibrated"):
            require_precision(TEN, request(precision, calibrator=object()))
    with pytest.raises(BuildError, match=r"calibrator: tensorrt_rtx 1\.7 has none"):
        require_precision(RTX_1, request("int8", calibrator=object()))


def test_types_are_kept_wherever_they_can_be_but_for_calibration():
    typed = {backend.version: builds_strongly_typed(backend, request("fp16")) for backend in (EIGHT, TEN, RTX_1)}
    assert typed == {"8.6.0": False, "10.1.0": True, "1.7": True}
    assert not builds_strongly_typed(TEN, request("int8", calibrator=object()))


class Layer:
    """A layer whose tensors are given as "name:TYPE"."""

    def __init__(self, kind, outputs, inputs=(), name=""):
        self.type, self.name = kind, name
        self.tensors = [self._tensor(text) for text in outputs]
        self.fed = [self._tensor(text) for text in inputs]
        self.num_outputs, self.num_inputs = len(self.tensors), len(self.fed)
        self.precision, self.types = None, {}

    def _tensor(self, text):
        name, _, kind = text.rpartition(":")
        kind, _, shape = kind.partition("/")
        ranges = []
        tensor = types.SimpleNamespace(
            name=name, dtype=types.SimpleNamespace(name=kind), is_execution_tensor=shape != "shape", ranges=ranges
        )
        tensor.set_dynamic_range = lambda low, high: ranges.append((low, high))
        return tensor

    def get_output(self, i):  # as TensorRT's, by a number that there is
        return self.tensors[range(self.num_outputs).index(i)]

    def get_input(self, i):
        return self.fed[range(self.num_inputs).index(i)]

    def set_output_type(self, i, dtype):
        self.types[i] = dtype


def parsed(backend, *layers):
    definition = types.SimpleNamespace(num_layers=len(layers), get_layer=lambda i: layers[i])
    return ParsedGraph(backend, "fused.onnx", definition)


def request(precision, **options):
    return BuildRequest("g.onnx", precision, **options)


TYPED = (
    Layer(KINDS.CONSTANT, ["w:HALF"]),
    Layer(KINDS.MATRIX_MULTIPLY, ["a:HALF"]),
    Layer(KINDS.CONVOLUTION, ["b:FLOAT"]),
    Layer(KINDS.EINSUM, ["c:BF16"]),
    Layer(KINDS.ATTENTION_INPUT, ["d:HALF"]),
    Layer(KINDS.SOFTMAX, ["e:FLOAT", "f:INT64"]),
    Layer(KINDS.QUANTIZE, ["q:INT8"], ["a:HALF"]),
    Layer(KINDS.DEQUANTIZE, ["r:HALF"], ["q:INT8"]),
    Layer(KINDS.DEQUANTIZE, ["s:HALF"], ["p:FP8"]),
    Layer(KINDS.QUANTIZE, ["t:INT4"], ["a:HALF"]),
)


def test_types_are_counted():
    assert count_types(parsed(TEN, *TYPED)) == TypeCounts(
        collections.Counter({"fp16": 2, "fp32": 1, "bf16": 1}),
        collections.Counter({"fp16": 5, "fp32": 2, "bf16": 1}),
        collections.Counter({"int8": 2, "fp8": 1, "other": 1}),
    )
    assert count_types(parsed(TEN)) == TypeCounts()


def test_a_weak_network_calls_every_tensor_float_and_quantizes_to_int8():
    layers = (Layer(KINDS.QUANTIZE, ["q:FLOAT"], ["x:FLOAT"]), Layer(KINDS.DEQUANTIZE, ["r:FLOAT"], ["q:FLOAT"]))
    assert count_types(parsed(EIGHT, *layers, Layer(KINDS.CONVOLUTION, ["c:FLOAT"]))) == TypeCounts(
        *(collections.Counter(found) for found in ({"fp32": 1}, {"fp32": 3}, {"int8": 2}))
    )


def refusal(precision, *, products=(), floats=None, quantized=(), strongly_typed=True, has_calibrator=False):
    """What is said of a graph of these types, "" where it is built."""
    found = (products, products if floats is None else floats, quantized)
    counts = TypeCounts(*(collections.Counter(dict(part)) for part in found))
    asked = request(precision, calibrator=object() if has_calibrator else None)
    try:
        require_types(counts, asked, strongly_typed=strongly_typed, graph="g.onnx")
    except BuildError as e:
        return f"{e} | {e.fix}"
    return ""


@pytest.mark.parametrize(
    ("precision", "products", "strong", "weak"),
    [
        ("fp32", {"fp32": 3}, True, True),
        ("fp32", {"fp32": 3, "fp16": 1}, False, False),
        ("fp32", {}, True, True),
        ("fp16", {"fp16": 3}, True, True),
        ("fp16", {"fp16": 1, "fp32": 2}, True, True),  # blocks that are kept
        ("fp16", {"fp32": 3}, False, True),  # a flag lowers it
        ("fp16", {"fp16": 3, "bf16": 1}, False, False),
        ("fp16", {}, False, True),
        ("bf16", {"bf16": 3, "fp32": 1}, True, True),
        ("bf16", {"fp16": 3}, False, False),
        ("bf16", {"bf16": 3, "fp16": 1}, False, False),
    ],
)
def test_no_engine_is_silently_of_another_precision(precision, products, strong, weak):
    for strongly_typed, fits in ((True, strong), (False, weak)):
        said = refusal(precision, products=products, strongly_typed=strongly_typed)
        assert bool(said) != fits
        if said:
            found = ", ".join(f"{n} in {p}" for p, n in products.items()) or "none"
            assert said.startswith(f"g.onnx: matrix products {found}; Q/DQ nodes none; {precision} was asked for | ")
            assert f"Build from the {precision} graph" in said


def test_tensors_count_for_fp32_and_for_a_flag_and_products_for_a_typed_graph():
    floats = {"fp16": 4, "fp32": 1}
    assert refusal("fp32", products={"fp32": 1}, floats=floats)
    assert not refusal("fp16", products={"fp16": 1}, floats={**floats, "bf16": 1})
    assert refusal("fp16", products={"fp16": 1}, floats={**floats, "bf16": 1}, strongly_typed=False)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantized_engine_needs_pairs_of_its_kind_alone(precision):
    other = {"int8": "fp8", "fp8": "int8"}[precision]
    assert not refusal(precision, products={"fp16": 3}, quantized={precision: 6})
    for quantized in ({}, {other: 6}, {precision: 4, other: 2}, {precision: 4, "other": 1}):
        said = refusal(precision, products={"fp16": 3}, quantized=quantized)
        shown = str(quantized) if quantized else "none"
        assert f"Q/DQ nodes {shown}; {precision} needs only {precision} ones" in said
        assert f"Build from the {precision} graph that quantization writes." in said


def test_a_calibrator_is_for_a_graph_without_pairs():
    assert not refusal("int8", products={"fp32": 3}, has_calibrator=True)
    said = refusal("int8", products={"fp32": 3}, quantized={"int8": 2}, has_calibrator=True)
    assert "TensorRT ignores the calibrator for such a graph | Calibrate the fp32 graph, or build without" in said


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_graph_with_pairs_is_of_no_unquantized_precision(precision):
    said = refusal(precision, products={precision: 3}, quantized={"int8": 2, "fp8": 2})
    assert f"; {precision} was asked for | Build from the {precision} graph, or ask for int8 or fp8." in said


def configured(layers, precision, keep_fp32=(), fast=("fp16", "int8"), backend=EIGHT, **options):
    flags = []
    builder = types.SimpleNamespace(platform_has_fast_fp16="fp16" in fast, platform_has_fast_int8="int8" in fast)
    config = types.SimpleNamespace(set_flag=flags.append)
    word = "".join(precision)  # as words out of a file are: none of Python's own copies
    asked = request(word, keep_fp32=keep_fp32, **options)
    set_weak_precision(parsed(backend, *layers), builder, config, asked)
    return flags


@pytest.mark.parametrize(
    ("precision", "fast", "fits"),
    [
        ("fp32", (), True),
        ("fp16", ("fp16",), True),
        ("fp16", ("int8",), False),
        ("int8", ("int8",), True),
        ("int8", ("fp16",), False),
    ],
)
def test_a_gpu_has_to_be_made_for_the_precision(precision, fast, fits):
    if fits:
        assert (
            configured([], precision, fast=fast) == {"fp32": [], "fp16": ["FP16"], "int8": ["FP16", "INT8"]}[precision]
        )
        return
    with pytest.raises(BuildError, match=f"precision {precision}: NVIDIA P40 has no fast {precision}") as caught:
        configured([], precision, fast=fast)
    assert caught.value.fix == "Use fp32."


def test_only_what_computes_in_floating_point_is_kept_in_fp32():
    """A constant, a shape and integers have no precision to keep: TensorRT refuses to be told one."""
    layers = [
        Layer(KINDS.CONSTANT, ["w:FLOAT"], name="block_00/w"),
        Layer(KINDS.SHUFFLE, ["s:FLOAT/shape"], name="block_00/shape"),
        Layer(KINDS.SHUFFLE, ["i:INT32"], name="block_00/index"),
        Layer(KINDS.SOFTMAX, ["i:INT32", "p:HALF", "o:FLOAT/shape", "r:FLOAT"], name="block_00/softmax"),
        Layer(KINDS.SOFTMAX, ["z:FLOAT"], name="block_01/softmax"),
    ]
    assert configured(layers, "fp16", ["block_00"]) == ["FP16", "OBEY"]
    assert [layer.precision for layer in layers] == [None, None, None, "fp32", None]
    assert [layer.types for layer in layers] == [{}, {}, {}, {1: "fp32", 3: "fp32"}, {}]


def test_every_pattern_has_to_mean_a_layer():
    layers = [Layer(KINDS.SOFTMAX, ["p:FLOAT"], name="block_00/softmax")]
    with pytest.raises(BuildError, match="keep_fp32 a, z: no layer has such a name") as caught:
        configured(layers, "fp16", ["z", "block_00", "a"])
    assert "block_03/fc2" in caught.value.fix


def test_int8_is_preferred_where_weights_come_from_behind_shuffles_alone():
    """A shuffle of several tensors brings a weight only where all of them are constant."""
    layers = [
        Layer(KINDS.CONSTANT, ["w:FLOAT"]),
        Layer(KINDS.SHUFFLE, ["turned:FLOAT"], ["w:FLOAT"]),
        Layer(KINDS.SHUFFLE, ["mixed:FLOAT"], ["w:FLOAT", "x:FLOAT"]),
        Layer(KINDS.MATRIX_MULTIPLY, ["a:FLOAT"], ["x:FLOAT", "turned:FLOAT"]),
        Layer(KINDS.MATRIX_MULTIPLY, ["b:FLOAT"], ["x:FLOAT", "mixed:FLOAT"]),
        Layer(KINDS.MATRIX_MULTIPLY, ["c:FLOAT"], ["w:FLOAT", "x:FLOAT"]),
        Layer(KINDS.SOFTMAX, ["d:FLOAT"], ["w:FLOAT"]),  # computed, not a weight
        Layer(KINDS.MATRIX_MULTIPLY, ["e:FLOAT"], ["x:FLOAT", "d:FLOAT"]),
    ]
    layers[3].fed.append(None)  # an input that is not given
    layers[3].num_inputs += 1
    assert configured(layers, "int8", calibrator=object()) == ["FP16", "INT8", "PREFER"]
    assert [layer.precision for layer in layers] == [None, None, None, "int8", None, "int8", None, None]


def test_ranges_are_given_to_their_tensors():
    layers = [Layer(KINDS.SOFTMAX, ["a:FLOAT", "b:FLOAT"]), Layer(KINDS.SOFTMAX, ["c:FLOAT"])]
    set_ranges(parsed(EIGHT, *layers), {"b": 2.5, "c": 0.0})
    assert [tensor.ranges for layer in layers for tensor in layer.tensors] == [[], [(-2.5, 2.5)], [(-0.0, 0.0)]]
    set_ranges(parsed(EIGHT, *layers), {})
    with pytest.raises(BuildError, match=r"fused\.onnx: has no tensor d, for which there is a range"):
        set_ranges(parsed(EIGHT, *layers), {"a": 1.0, "d": 2.0})
