"""A two-block ViT as ONNX, in the forms that export makes: fused or separate QKV, LayerNorm and GELU as operators or in
primitives."""

import dataclasses
import math
import pathlib

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
from onnx import TensorProto, helper

GRID, PATCH, WIDTH, HEADS, HIDDEN, CLASSES = 4, 8, 64, 2, 128, 10
TOKENS = GRID * GRID + 1


@dataclasses.dataclass
class TinyViT:
    """Writes the graph node by node.

    Attributes:
        opset: 17 spells GELU out, since Gelu came with 20.
        layernorm: "op", "two_pass" (E[(x-μ)²]) or "fast_variance" (E[x²]-μ², what Flax computes).
        fused_qkv: one MatMul [D, 3D] and Split, or three MatMuls.
        outliers: add this to a few channels of every block's output bias: a residual stream with massive channels.
        blocks: depth.
        width: D; head dimension stays 32.
    """

    opset: int = 20
    layernorm: str = "op"
    fused_qkv: bool = True
    outliers: float = 0.0
    blocks: int = 2
    width: int = WIDTH
    scale_scores: bool = False

    def __post_init__(self):
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.hidden = 2 * self.width
        self.heads = self.width // 32

    def weight(self, name: str, value) -> str:
        self.weights[name] = np.asarray(value)
        return name

    def op(self, op_type: str, inputs: list[str], output: str, **attributes) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=f"{output}/{op_type}", **attributes))
        return output

    def scalar(self, value: float) -> str:
        return self.weight(f"const_{value:.6g}", np.float32(value))

    def linear(self, x: str, scope: str, fan_in: int, fan_out: int, bias: np.ndarray | None = None) -> str:
        kernel = self.weight(f"{scope}/kernel", self.rng.normal(0, fan_in**-0.5, (fan_in, fan_out)).astype(np.float32))
        bias = self.rng.normal(0, 0.05, fan_out) if bias is None else bias
        product = self.op("MatMul", [x, kernel], f"{scope}/MatMul")
        return self.op("Add", [product, self.weight(f"{scope}/bias", bias.astype(np.float32))], f"{scope}/Add")

    def norm(self, x: str, scope: str) -> str:
        scale = self.weight(f"{scope}/scale", self.rng.uniform(0.8, 1.2, self.width).astype(np.float32))
        bias = self.weight(f"{scope}/bias", self.rng.normal(0, 0.1, self.width).astype(np.float32))
        if self.layernorm == "op":
            return self.op("LayerNormalization", [x, scale, bias], f"{scope}/out", axis=-1, epsilon=1e-6, stash_type=1)
        mean = self.op("ReduceMean", [x], f"{scope}/mean", axes=[-1])
        centred = self.op("Sub", [x, mean], f"{scope}/centred")
        if self.layernorm == "two_pass":
            square = self.op("Mul", [centred, centred], f"{scope}/square")
            variance = self.op("ReduceMean", [square], f"{scope}/variance", axes=[-1])
        else:
            square = self.op("Mul", [x, x], f"{scope}/square")
            of_square = self.op("ReduceMean", [square], f"{scope}/mean_of_square", axes=[-1])
            square_of = self.op("Mul", [mean, mean], f"{scope}/square_of_mean")
            difference = self.op("Sub", [of_square, square_of], f"{scope}/difference")
            variance = self.op("Max", [difference, self.scalar(0.0)], f"{scope}/variance")
        shifted = self.op("Add", [variance, self.scalar(1e-6)], f"{scope}/shifted")
        normalized = self.op("Div", [centred, self.op("Sqrt", [shifted], f"{scope}/deviation")], f"{scope}/normalized")
        return self.op("Add", [self.op("Mul", [normalized, scale], f"{scope}/scaled"), bias], f"{scope}/out")

    def gelu(self, x: str, scope: str) -> str:
        if self.opset >= 20:
            return self.op("Gelu", [x], f"{scope}/gelu", approximate="tanh")
        erf = self.op(
            "Erf", [self.op("Mul", [x, self.scalar(math.sqrt(0.5))], f"{scope}/gelu_arg")], f"{scope}/gelu_erf"
        )
        half = self.op("Mul", [x, self.scalar(0.5)], f"{scope}/gelu_half")
        return self.op("Mul", [half, self.op("Add", [erf, self.scalar(1.0)], f"{scope}/gelu_plus")], f"{scope}/gelu")

    def attention(self, x: str, scope: str) -> str:
        if self.fused_qkv:
            qkv = self.linear(x, f"{scope}/qkv", self.width, 3 * self.width)
            parts = [f"{scope}/{p}/part" for p in ("query", "key", "value")]
            extra = {"num_outputs": 3} if self.opset >= 18 else {}
            self.nodes.append(helper.make_node("Split", [qkv], parts, name=f"{scope}/Split", axis=-1, **extra))
        else:
            parts = [self.linear(x, f"{scope}/{p}", self.width, self.width) for p in ("query", "key", "value")]
        shape = self.weight("heads_shape", np.array([0, TOKENS, self.heads, 32], np.int64))
        q, k, v = (
            self.op("Transpose", [self.op("Reshape", [part, shape], f"{scope}/{n}4")], f"{scope}/{n}h", perm=perm)
            for part, n, perm in zip(parts, "qkv", ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]))
        )
        scale = self.scalar(32**-0.5)
        if not self.scale_scores:
            q = self.op("Mul", [q, scale], f"{scope}/q_scaled")
        scores = self.op("MatMul", [q, k], f"{scope}/scores")
        if self.scale_scores:
            scores = self.op("Mul", [scores, scale], f"{scope}/scores_scaled")
        attended = self.op(
            "MatMul", [self.op("Softmax", [scores], f"{scope}/softmax", axis=-1), v], f"{scope}/attended"
        )
        merged = self.op("Transpose", [attended], f"{scope}/merged4", perm=[0, 2, 1, 3])
        merged = self.op(
            "Reshape",
            [merged, self.weight("merged_shape", np.array([0, TOKENS, self.width], np.int64))],
            f"{scope}/merged",
        )
        return self.linear(merged, f"{scope}/out", self.width, self.width)

    def save(self, path: pathlib.Path) -> pathlib.Path:
        """Writes `path` with its weights in `path.data`."""
        x = self.op("Transpose", ["images"], "nchw", perm=[0, 3, 1, 2])
        self.weight("embedding/kernel", self.rng.normal(0, 1 / 14, (self.width, 3, PATCH, PATCH)).astype(np.float32))
        self.weight("embedding/bias", np.zeros(self.width, np.float32))
        x = self.op(
            "Conv",
            [x, "embedding/kernel", "embedding/bias"],
            "embedding/Conv",
            strides=[PATCH, PATCH],
            kernel_shape=[PATCH, PATCH],
        )
        x = self.op("Reshape", [x, self.weight("flat_shape", np.array([0, self.width, GRID * GRID], np.int64))], "flat")
        x = self.op("Transpose", [x], "patches", perm=[0, 2, 1])
        batch = self.op("Shape", ["images"], "batch", start=0, end=1)
        ones = self.weight("ones", np.array([1, 1], np.int64))
        cls_shape = self.op("Concat", [batch, ones], "cls_shape", axis=0)
        cls = self.op(
            "Expand",
            [self.weight("cls", self.rng.normal(0, 0.5, (1, 1, self.width)).astype(np.float32)), cls_shape],
            "cls_expanded",
        )
        x = self.op("Concat", [cls, x], "tokens", axis=1)
        position = self.weight("pos_embedding", self.rng.normal(0, 0.5, (1, TOKENS, self.width)).astype(np.float32))
        x = self.op("Add", [x, position], "embedded")
        for i in range(self.blocks):
            scope = f"Transformer/encoderblock_{i}"
            y = self.attention(self.norm(x, f"{scope}/LayerNorm_0"), f"{scope}/MultiHeadDotProductAttention_0")
            x = self.op("Add", [x, y], f"{scope}/residual")
            y = self.linear(
                self.norm(x, f"{scope}/LayerNorm_1"), f"{scope}/MlpBlock_0/Dense_0", self.width, self.hidden
            )
            bias = np.zeros(self.width)
            bias[:3] = self.outliers
            y = self.linear(
                self.gelu(y, f"{scope}/MlpBlock_0"), f"{scope}/MlpBlock_0/Dense_1", self.hidden, self.width, bias
            )
            x = self.op("Add", [x, y], f"{scope}/output")
        x = self.norm(x, "Transformer/encoder_norm")
        x = self.op("Gather", [x, self.weight("first", np.int64(0))], "pooled", axis=1)
        logits = self.linear(x, "head", self.width, CLASSES)
        self.nodes[-1].output[0] = "logits"
        assert logits == "head/Add"
        side = GRID * PATCH
        model = helper.make_model(
            helper.make_graph(
                self.nodes,
                "tiny_vit",
                [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", side, side, 3])],
                [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
                [onnx.numpy_helper.from_array(value, name) for name, value in self.weights.items()],
            ),
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=9,
        )
        if self.opset >= 18:
            model = _axes_as_inputs(model)
        model = onnx.shape_inference.infer_shapes(model)
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=256)
        onnx.checker.check_model(path)
        return path


def _axes_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """ReduceMean's axes became an input with opset 18."""
    for node in model.graph.node:
        if node.op_type == "ReduceMean":
            node.ClearField("attribute")
            node.input.append("axes")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1], np.int64), "axes"))
    return model


def run(path: pathlib.Path, images: np.ndarray, outputs: list[str] | None = None) -> list[np.ndarray]:
    """Runs a graph in onnxruntime on float32 images; pairs unfused, since integer kernels saturate on some
    processors."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(
        outputs, {"images": images}
    )


def unfused(path: pathlib.Path) -> onnxruntime.InferenceSession:
    """A session that computes the graph as it stands: fusions round elsewhere, and near a quantizer's edge that is a
    whole step."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def normalize(images: np.ndarray) -> np.ndarray:
    """uint8 → [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1
