"""A bf16 graph checked where nothing computes in bf16: the same roundings on float32, against NumPy with ml_dtypes."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_vit import TinyViT

from vit_convert.core.onnx_file import open_session, run_session, save_onnx
from vit_convert.quantize.half_precision import to_bf16
from vit_convert.quantize.widen import widen

GRAPH = """<ir_version: 10, opset_import: ["" : 22]>
g (float[N, 16] images) => (float[N, 4] logits) <float[16, 8] w, float[8] b, float[8, 4] v> {
    x = MatMul(images, w)
    y = Add(x, b)
    r = Identity(y)
    z = Relu(r)
    logits = MatMul(z, v)
}"""


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {"w": rng.standard_normal((16, 8)), "b": rng.standard_normal(8), "v": rng.standard_normal((8, 4))}


def test_every_result_is_rounded(tmp_path, weights):
    proto = onnx.parser.parse_model(GRAPH)
    for name, value in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    model = to_bf16(ir.from_proto(proto)).model
    save_onnx(model, tmp_path / "bf16.onnx")
    save_onnx(widen(model), tmp_path / "wide.onnx")
    types = {t.data_type for t in onnx.load(tmp_path / "wide.onnx").graph.initializer}
    assert types == {onnx.TensorProto.FLOAT}

    images = np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32)
    w, b, v = (rounded(weights[name].astype(np.float32)) for name in "wbv")
    x = rounded(rounded(images) @ w)
    y = rounded(x + b)
    logits = rounded(np.maximum(y, 0) @ v)
    got = run_session(open_session(tmp_path / "wide.onnx", ["x", "y"]), images)
    # A float32 sum in another order may round to the neighbour: one unit in the last place of bf16's 8 bits, in few
    # values.
    for name, wanted in (("x", x), ("y", y), ("logits", logits)):
        assert np.abs(got[name] - wanted).max() <= 2**-7 * np.abs(wanted).max()
        assert np.mean(got[name] == wanted) > 0.8
        assert np.array_equal(got[name], rounded(got[name]))
    exact = np.maximum(images @ weights["w"] + weights["b"], 0) @ weights["v"]
    assert np.abs(got["logits"] - exact).max() > 2**-9 * np.abs(exact).max()  # as bf16 does, and float32 does not


COUNTED = """<ir_version: 10, opset_import: ["" : 22]>
g (float[N, 16] images) => (float[N, 8] logits, int64[N, 8] levels) <float[16, 8] w> {
    x = MatMul(images, w)
    levels = Cast <to = 7> (x)
    back = Cast <to = 1> (levels)
    logits = Add(x, back)
}"""


def test_casts_to_other_types_stay(tmp_path, weights):
    proto = onnx.parser.parse_model(COUNTED)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights["w"].astype(np.float32), "w"))
    model = to_bf16(ir.from_proto(proto)).model
    save_onnx(widen(model), tmp_path / "wide.onnx")
    images = 3 * np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32)
    got = run_session(open_session(tmp_path / "wide.onnx", ["x"]), images)
    assert got["levels"].dtype == np.int64 and np.array_equal(got["levels"], np.trunc(got["x"]))
    assert np.abs(got["levels"]).max() >= 3
    assert np.array_equal(got["logits"], rounded(got["x"] + rounded(got["levels"].astype(np.float32))))


def test_every_value_has_its_type_and_shape(tmp_path):
    """The check of a graph makes inner values outputs by them."""
    model = to_bf16(ir.load(TinyViT().save(tmp_path / "model.onnx"))).model
    shapes = {value.name: value.shape for node in model.graph for value in node.outputs}
    for node in (wide := widen(model)).graph:
        for value in node.outputs:
            assert value.dtype is not None and value.shape is not None, value.name
            if node.op_type == "Cast" and value.name.endswith("/narrow"):
                assert value.dtype == ir.DataType.BFLOAT16 and value.shape == shapes[value.name.removesuffix("/narrow")]
            else:
                assert value.dtype != ir.DataType.BFLOAT16
    assert {value.name for node in wide.graph for value in node.outputs} >= {*shapes}


def test_the_given_model_is_left_alone(tmp_path):
    model = to_bf16(ir.load(TinyViT().save(tmp_path / "model.onnx"))).model
    before = ir.to_proto(model).SerializeToString()
    save_onnx(widen(model), tmp_path / "wide.onnx")
    assert ir.to_proto(model).SerializeToString() == before


def test_a_wrong_bf16_graph_is_seen(tmp_path):
    """One weight of a block negated: what the check is for."""
    model = to_bf16(ir.load(TinyViT().save(tmp_path / "model.onnx"))).model
    save_onnx(widen(model), tmp_path / "right.onnx")
    weight = next(v for v in model.graph.initializers.values() if v.dtype == ir.DataType.BFLOAT16 and len(v.shape) == 2)
    weight.const_value = ir.tensor(-weight.const_value.numpy(), dtype=ir.DataType.BFLOAT16, name=weight.name)
    save_onnx(widen(model), tmp_path / "wrong.onnx")
    session = open_session(tmp_path / "right.onnx")
    shape = [2 if not isinstance(side, int) else side for side in session.get_inputs()[0].shape]
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    right, wrong = (
        next(iter(run_session(open_session(tmp_path / f"{name}.onnx"), images).values())) for name in ("right", "wrong")
    )
    assert np.abs(right - wrong).max() > 0.01 * np.abs(right).max()
