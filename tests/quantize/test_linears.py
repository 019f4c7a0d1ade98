"""Linears are found by what they are in the graph, whatever their layers are called, and are named so that people can
mean them."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper

from vit_convert.core.errors import UsageError
from vit_convert.core.onnx_file import BLOCKS_ALONE
from vit_convert.core.ort_options import session_options
from vit_convert.quantize.calibrate import Calibration
from vit_convert.quantize.graph import linear_layers, names_by_node, node_blocks
from vit_convert.quantize.half_precision import to_fp16
from vit_convert.quantize.placement import place
from vit_convert.quantize.qdq import quantize
from vit_convert.quantize.sensitivity import candidates

WIDTH, TOKENS = 8, 6


class Graph:
    """Writes a graph whose layers are called as the test says; `images` is float [batch, TOKENS, WIDTH]."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def op(self, op_type, *inputs, **attributes):
        output = f"value_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op_type, list(inputs), [output], name=f"node_{len(self.nodes)}", **attributes)
        )
        return output

    def weight(self, name, *shape):
        self.weights.setdefault(name, self.rng.standard_normal(shape).astype(np.float32))
        return name

    def linear(self, x, name):
        return self.op("MatMul", x, self.weight(name, WIDTH, WIDTH))

    def model(self, output, shape=("batch", TOKENS, WIDTH)):
        self.nodes[-1].output[0] = "logits"
        assert output.startswith("value_")
        images = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, list(shape))
        logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None)
        tensors = [onnx.numpy_helper.from_array(value, name) for name, value in self.weights.items()]
        graph = helper.make_graph(self.nodes, "g", [images], [logits], tensors)
        return ir.from_proto(
            onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
        )


def chain(*names):
    graph, x = Graph(), "images"
    for name in names:
        x = graph.op("Relu", graph.linear(x, name))
    return graph.model(x)


def names(model, **patterns):
    return [site.name for site in place(model, **patterns).sites]


def test_between_first_and_last_whatever_they_are_called():
    assert names(chain("patchify/kernel", "stage_0_fc1/kernel", "глубже/kernel", "w3", "classifier/weight")) == [
        "stage_0_fc1/stage_0_fc1",
        "глубже/глубже",
        "w3/w3",
    ]


@pytest.mark.parametrize(("layers", "expected"), [(["a/w", "b/w"], ["a/a"]), (["only/w"], ["only/only"])])
def test_a_model_without_any_between(layers, expected):
    """Two linears: the last keeps its precision; one: it is what there is."""
    assert names(chain(*layers)) == expected


def test_blocks_that_a_few_layers_are_called_after_do_not_leave_the_others_out():
    assert names(chain("stem/w", "block_0/fc/w", "neck/w", "block_1/fc/w", "head/w")) == [
        "block_00/fc",
        "neck/neck",
        "block_01/fc",
    ]


def test_a_graph_that_says_so_is_quantized_in_its_blocks_alone():
    model = chain("stem/w", "block_0/fc/w", "pre_logits/w", "head/w")
    model.metadata_props[BLOCKS_ALONE] = "alone"
    assert names(model) == ["block_00/fc"]
    assert names(model, quantize_only=["pre_logits"]) == ["pre_logits/pre_logits"]


def test_layers_of_one_name_in_one_block_are_told_apart():
    inner = ["layers_0/blocks_0/attn/out/kernel", "layers_0/blocks_1/attn/out/kernel", "layers_0/merge/kernel"]
    model = chain("stem/w", *inner, "layers_1/blocks_0/attn/out/kernel", "head/w")
    expected = ["block_00/blocks_0/attn/out", "block_00/blocks_1/attn/out", "block_00/merge", "block_01/out"]
    assert names(model) == expected
    for name in expected:
        assert names(model, quantize_only=[name]) == [name]
    assert [unit.name for unit in candidates(model, {}, attention=False)] == expected
    assert names(model, quantize_only=["block_00"]) == expected[:3]


def test_a_list_of_matrices_is_a_layer_each():
    model = chain("stem", "ws/0", "ws/1", "ws/2", "head")
    assert names(model) == ["ws/0", "ws/1", "ws/2"]
    assert names(model, keep_fp16=["ws/1"]) == ["ws/0", "ws/2"]
    assert names(model, quantize_only=["*"]) == ["stem/stem", "ws/0", "ws/1", "ws/2", "head/head"]


def test_scopes_are_the_blocks_of_a_model_without():
    model = chain("stem/w", "encoder/mlp/fc1/kernel", "encoder/mlp/fc2/kernel", "head/w")
    assert names(model) == ["encoder/mlp/fc1", "encoder/mlp/fc2"]
    assert names(model, keep_fp32=["encoder/mlp/fc2"]) == names(model, keep_fp16=["*/fc2"]) == ["encoder/mlp/fc1"]
    assert list(node_blocks(model.graph).values()) == [
        s for s in ("stem", "encoder/mlp", "encoder/mlp", "head") for _ in "ab"
    ]
    with pytest.raises(
        UsageError, match=r"keep_fp32: 'encoder/mlp/fc3' matches no block, layer or node\. Did you mean encoder/mlp/fc"
    ):
        place(model, keep_fp32=["encoder/mlp/fc3"])


def test_one_weight_read_twice_has_one_name():
    model = chain("stem/w", "tied/w", "tied/w", "head/w")
    assert names(model) == ["tied/tied", "tied/tied"]
    assert [len(unit.sites) for unit in candidates(model, {}, attention=False)] == [2]


def test_what_is_no_linear():
    """A product of two activations, one of a constant alone, three-dimensional weights and a transposed Gemm stay as
    they are."""
    graph = Graph()
    x = graph.linear("images", "stem/w")
    probe = graph.op("MatMul", graph.weight("probe", 1, WIDTH), graph.weight("query/w", WIDTH, WIDTH))
    x = graph.op("MatMul", graph.op("MatMul", x, graph.op("Transpose", x, perm=[0, 2, 1])), x)
    x = graph.op("MatMul", graph.op("Add", x, probe), graph.weight("experts/w", 1, WIDTH, WIDTH))
    x = graph.linear(graph.op("ReduceMax", graph.linear(x, "mid/w"), keepdims=0), "mixed/w")
    x = graph.op("Gemm", x, graph.weight("turned/w", WIDTH, WIDTH), transB=1)
    assert names(graph.model(graph.linear(x, "head/w"))) == ["mid/mid", "mixed/mixed"]


def test_gemms_and_convolutions_of_any_kernel_are_linears():
    graph = Graph()
    x = graph.op("Conv", "images", graph.weight("patches/kernel", 4, 3, 2, 2), strides=[2, 2])
    x = graph.op("Conv", x, graph.weight("local/kernel", 4, 1, 3, 3), group=4, pads=[1, 1, 1, 1])
    x = graph.op("Conv", graph.op("Relu", x), graph.weight("wide/kernel", WIDTH, 4, 3, 3), pads=[1, 1, 1, 1])
    x = graph.op("Flatten", graph.op("GlobalAveragePool", x))
    x = graph.op("Gemm", x, graph.weight("fc/kernel", WIDTH, WIDTH))
    model = graph.model(graph.op("Gemm", x, graph.weight("head/kernel", WIDTH, 5)), ("batch", 3, 8, 8))
    placement = place(model)
    assert [site.name for site in placement.sites] == ["local/local", "wide/wide", "fc/fc"]
    # the patch embedding is a linear that stays, whatever the patterns are
    assert [site.name for site in place(model, quantize_only=["*"]).sites] == [
        "local/local",
        "wide/wide",
        "fc/fc",
        "head/head",
    ]

    images = np.random.default_rng(1).uniform(-1, 1, (2, 3, 8, 8)).astype(np.float32)
    ranges = {tensor: float(np.abs(run(model, images, tensor)).max()) for tensor in placement.tensors()}
    calibration = Calibration(ranges, ranges, "minmax", 1, {})
    for precision in ("int8", "fp8"):
        quantized = quantize(model, calibration, placement.sites, target="rtx", precision=precision)
        plain, close = (run(each, images) for each in (model, quantized))
        # 8 bits (fp8: 4 digits of each value) three times
        assert np.abs(plain - close).max() < 0.1 * np.abs(plain).max()
        assert np.abs(plain - close).max() > 0


def run(model, images, tensor="logits"):
    proto = ir.to_proto(model)
    if tensor != "logits":
        proto.graph.output.append(onnx.ValueInfoProto(name=tensor))
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), session_options(onnxruntime), providers=["CPUExecutionProvider"]
    )
    return session.run([tensor], {"images": images})[0]


def test_attention_is_found_without_names():
    graph = Graph()
    x = graph.linear("images", "stem/w")
    q, k, v = (graph.linear(x, f"mixer/{name}/kernel") for name in "abc")
    weights = graph.op("Softmax", graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 2, 1])))
    x = graph.linear(graph.op("MatMul", weights, v), "mixer/d/kernel")
    model = graph.model(graph.linear(x, "head/w"))
    found = place(model, attention=True)
    assert found.declined == {"mixer": "head dimension 8: TensorRT fuses INT8 attention for 16 or 32 or 64"}
    assert [site.name for site in found.sites] == ["mixer/a", "mixer/b", "mixer/c", "mixer/d"]


def attending(tokens, size=16, mask=False, first="stem/w"):
    """One attention of one head without its reordering, and the names of its tensors."""
    graph = Graph()
    x = graph.linear("images", first)
    q, k, v = (graph.op("MatMul", x, graph.weight(f"mixer/{name}/kernel", WIDTH, size)) for name in "qkv")
    turned = graph.op("Transpose", k, perm=[0, 2, 1])
    scores = graph.op("MatMul", q, turned)
    before = graph.op("Add", scores, graph.weight("mixer/mask", 1, 1)) if mask else scores
    weights = graph.op("Softmax", before)
    attended = graph.op("MatMul", weights, v)
    x = graph.op("MatMul", attended, graph.weight("mixer/out/kernel", size, WIDTH))
    names = {"q": q, "k": turned, "v": v, "scores": scores, "weights": weights, "attended": attended, "out": x}
    return graph.model(graph.linear(x, "head/w"), ("batch", tokens, WIDTH)), names


@pytest.mark.parametrize("mask", [False, True])
def test_each_product_of_an_attention_reads_two_pairs(mask):
    model, name = attending(6, mask=mask)
    found = place(model, attention=True)
    assert found.declined == {}
    sites = [(site.kind, site.tensor, site.node, site.weight, site.amax) for site in found.sites if site.weight is None]
    assert sites == [
        ("scaled_q", name["q"], name["scores"], None, None),
        ("k", name["k"], name["scores"], None, None),
        ("softmax", name["weights"], name["attended"], None, 1.0),  # no value lies beyond
        ("v", name["v"], name["attended"], None, None),
        ("attended", name["attended"], name["out"], None, None),
    ]
    assert [site.tensor for site in found.sites if site.name == "mixer/out"] == [name["attended"]]


def test_an_attention_outside_the_blocks_is_called_after_its_node():
    """Where some layers stand in blocks and this one does not: the name says which one a message means."""
    model, _ = attending(513, first="block_0/fc/w")
    (softmax,) = [node for node in model.graph if node.op_type == "Softmax"]
    assert list(place(model, attention=True).declined) == [softmax.name] != [""]
    found = place(attending(6, first="block_0/fc/w")[0], attention=True)
    assert {site.block for site in found.sites if site.weight is None} == {softmax.name}


@pytest.mark.parametrize(
    ("tokens", "size", "said"),
    [
        (512, 16, None),  # what TensorRT fuses: up to 512 tokens, heads of 16, 32 or 64
        (513, 16, "tokens 513: TensorRT fuses INT8 attention for at most 512"),
        (1, 16, None),
        *((6, size, None) for size in (32, 64)),
        *(
            (6, size, f"head dimension {size}: TensorRT fuses INT8 attention for 16 or 32 or 64")
            for size in (8, 17, 48, 128)
        ),
        ("tokens", 16, None),  # not known before it runs
    ],
)
def test_attention_that_tensorrt_fuses(tokens, size, said):
    found = place(attending(tokens, size)[0], attention=True)
    assert found.declined == ({"mixer": said} if said else {})
    assert any(site.kind == "softmax" for site in found.sites) == (said is None)


def test_patterns_mean_the_same_layers_once_others_are_quantized():
    """The fp16 pass reads the graph behind the pairs: a layer must not lose its name, nor get another's, when its
    neighbour has a pair."""
    layers = ["stem/w", "layers_0/blocks_0/out/kernel", "layers_0/blocks_1/out/kernel", "head/w"]
    model, keep = chain(*layers), ["block_00/blocks_1/out"]
    placement = place(model, keep_fp32=keep)
    assert [site.name for site in placement.sites] == ["block_00/blocks_0/out"]
    ranges = dict.fromkeys(placement.tensors(), 4.0)
    quantized = quantize(model, Calibration(ranges, ranges, "minmax", 1, {}), placement.sites, target="rtx")
    assert [layer.name for layer in linear_layers(quantized.graph).values()] == [
        layer.name for layer in linear_layers(model.graph).values()
    ]
    islands = to_fp16(quantized, keep_fp32=keep).islands
    assert list(islands.values()).count("keep_fp32") == 1
    for target in ("trt8", "rtx"):
        model.opset_imports[""] = 17 if target == "trt8" else 20
        paired = quantize(model, Calibration(ranges, ranges, "minmax", 1, {}), placement.sites, target=target)
        blocks = node_blocks(paired.graph)
        assert set(blocks.values()) == {None, "block_00"}
        assert all(names_by_node(paired.graph, blocks).values())
