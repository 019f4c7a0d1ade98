"""Tensors on one side of zero, quantized less their middle: the numbers against NumPy's integers, the form, and when it
is done."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from outliers import CHECKPOINTS, DIGITS
from tiny_vit import TinyViT, normalize, unfused

from vit_convert.convert import convert
from vit_convert.core.config import default_config
from vit_convert.core.onnx_file import save_onnx
from vit_convert.quantize.calibrate import Calibration, calibrate
from vit_convert.quantize.guard import Cost, Guard, Shift, product_errors
from vit_convert.quantize.placement import Site, place
from vit_convert.quantize.qdq import quantize
from vit_convert.quantize.sensitivity import candidates, switched
from vit_convert.quantize.shift import shiftable

K, N = 16, 5
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(K, N)).astype(np.float32)
BIAS = RNG.normal(size=N).astype(np.float32)
OFFSET, THRESHOLD = 2.5, 2.75


def model(text: str, **arrays: np.ndarray) -> ir.Model:
    """A graph of x [n, 16], with weights by their names."""
    found = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[n, {K}] x) => (float[n, {N}] y) {{ {text} }}'
    )
    values = {value.name: value for node in found.graph for value in node.inputs if value is not None}
    for name, array in arrays.items():
        values[name].const_value = ir.tensor(array, name=name)
        values[name].shape, values[name].type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
        found.graph.register_initializer(values[name])
    return found


def shifted(found: ir.Model, tensor="g", node="p", weight="w", **options) -> ir.Model:
    calibration = Calibration({tensor: 5.25}, {}, "entropy", 1, {}, shifts={tensor: Shift(OFFSET, THRESHOLD, 0.0)})
    return quantize(found, calibration, [Site("block_00", "fc2", tensor, node, weight)], target="trt8", **options)


def run(found: ir.Model, x: np.ndarray) -> np.ndarray:
    return unfused(ir.to_proto(found).SerializeToString()).run(None, {"x": x})[0]


def in_integers(g: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """What INT8 hardware computes: whole numbers times whole numbers, two scales, and a bias that takes the constant
    back."""
    scale, scales = THRESHOLD / 127, np.abs(WEIGHT).max(0).astype(np.float64) / 127
    numbers = np.clip(np.rint((g - OFFSET) / scale), -127, 127).astype(np.int32)
    weights = np.rint(WEIGHT / scales).astype(np.int32)
    return numbers @ weights * scale * scales + OFFSET * weights.sum(0) * scales + bias


def ops(found: ir.Model) -> list[str]:
    return [node.op_type for node in found.graph]


X = RNG.normal(scale=2.0, size=(40, K)).astype(np.float32)
POSITIVE = np.clip(X, 0, None)


@pytest.mark.parametrize(
    ("text", "arrays", "bias", "node", "adds"),
    [
        ("g = Relu(x) p = MatMul(g, w) y = Add(p, b)", {"b": BIAS}, BIAS, "p", 1),
        ("g = Relu(x) p = MatMul(g, w) y = Add(b, p)", {"b": BIAS.reshape(1, N)}, BIAS, "p", 1),
        ("g = Relu(x) y = MatMul(g, w)", {}, 0.0, "y", 1),
        ("g = Relu(x) y = Gemm(g, w, b)", {"b": BIAS}, BIAS, "y", 0),  # its own bias takes it back
        ("g = Relu(x) y = Gemm(g, w)", {}, 0.0, "y", 1),
        # whose bias others read, too
        ("g = Relu(x) p = MatMul(g, w) q = Add(p, b) y = Add(q, b)", {"b": BIAS}, 2 * BIAS, "p", 3),
    ],
)
def test_products_of_a_shifted_tensor(text, arrays, bias, node, adds):
    plain = model(text, w=WEIGHT, **arrays)
    assert shiftable(plain, [Site("block_00", "fc2", "g", node, "w")]) == (set(), {"g"})
    found = shifted(plain, node=node)
    got = run(found, X)
    assert ops(found).count("Sub") == 1 and ops(found).count("Add") == adds
    # float32 against float64, of values up to 50 before the constant is taken back; a step is 0.05
    np.testing.assert_allclose(got, in_integers(POSITIVE, bias), atol=2e-4)
    assert "Sub" not in ops(plain)  # the given graph is left as it is
    np.testing.assert_array_equal(run(plain, X), run(model(text, w=WEIGHT, **arrays), X))


@pytest.mark.parametrize("bias", [BIAS, None])
def test_a_convolution_over_points(bias):
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[n, {K}, 2, 3] x) => (float[n, {N}, 2, 3] y)
        {{ g = Relu(x) y = Conv(g, w{", b" if bias is not None else ""}) }}"""
    found = ir.from_onnx_text(text)
    values = {value.name: value for node in found.graph for value in node.inputs if value is not None}
    for name, array in {"w": WEIGHT.T.reshape(N, K, 1, 1), **({"b": bias} if bias is not None else {})}.items():
        values[name].const_value = ir.tensor(np.ascontiguousarray(array), name=name)
        values[name].shape, values[name].type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
        found.graph.register_initializer(values[name])
    x = RNG.normal(scale=2.0, size=(3, K, 2, 3)).astype(np.float32)
    got = run(shifted(found, node="y"), x)
    rows = np.clip(x, 0, None).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(got.transpose(0, 2, 3, 1), in_integers(rows, 0.0 if bias is None else bias), atol=2e-4)


NORM = "g = LayerNormalization(x, s, c) p = MatMul(g, w) y = Add(p, b)"
NORM_ARRAYS = {
    "s": RNG.uniform(0.3, 0.6, K).astype(np.float32),
    "c": np.full(K, 2.5, np.float32),
    "w": WEIGHT,
    "b": BIAS,
}


def test_a_norms_bias_takes_the_constant_off_for_nothing():
    plain = model(NORM, **NORM_ARRAYS)
    assert shiftable(plain, [Site("block_00", "fc1", "g", "p", "w")]) == ({"g"}, set())
    found = shifted(plain)
    assert "Sub" not in ops(found) and ops(found).count("Add") == 1
    x = X.astype(np.float64)
    norm = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * NORM_ARRAYS["s"] + 2.5
    difference = np.abs(run(found, X) - in_integers(norm, BIAS))
    assert np.quantile(difference, 0.9) < 2e-4  # all but what float32 rounds to the next step
    assert difference.max() < 0.1


SQUARE = np.eye(K, dtype=np.float32) + RNG.normal(scale=0.05, size=(K, K)).astype(np.float32)
LINEAR = "m = MatMul(x, v) g = Add(m, c) p = MatMul(g, w) y = Add(p, b)"


@pytest.mark.parametrize("text", [LINEAR, LINEAR.replace("Add(m, c)", "Add(c, m)")])
def test_a_linears_bias_takes_it_off_for_nothing_too(text):
    arrays = {"v": SQUARE, "c": np.full(K, 2.5, np.float32), "w": WEIGHT, "b": BIAS}
    plain = model(text, **arrays)
    assert shiftable(plain, [Site("block_00", "fc1", "g", "p", "w")]) == ({"g"}, set())
    found = shifted(plain)
    assert "Sub" not in ops(found) and ops(found).count("Add") == 2
    x = X / 4  # nothing beyond the threshold, where ONNX has a -128
    difference = np.abs(run(found, x) - in_integers(x.astype(np.float64) @ SQUARE + 2.5, BIAS))
    assert np.quantile(difference, 0.9) < 2e-4  # all but what float32 rounds to the next step
    assert difference.max() < 0.1


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("m = MatMul(x, v) g = Add(m, c) p = MatMul(g, w) y = Add(p, b)", {"c": np.full(1, 2.5, np.float32)}),
        ("m = Add(x, c) g = Add(m, c) p = MatMul(g, w) y = Add(p, b)", {}),  # read elsewhere, too
        ("m = MatMul(x, v) g = Add(m, x) p = MatMul(g, w) y = Add(p, b)", {}),
        ("m = MatMul(x, v) g = Mul(m, c) p = MatMul(g, w) y = Add(p, b)", {}),
        ("g = LayerNormalization(x, s) p = MatMul(g, w) y = Add(p, b)", {}),
    ],
    ids=["of-one-number", "shared", "no-constant", "no-sum", "norm-without-bias"],
)
def test_where_no_bias_can_it_takes_a_subtraction(text, changes):
    arrays = {"v": SQUARE, "c": np.full(K, 2.5, np.float32), "w": WEIGHT, "b": BIAS, "s": NORM_ARRAYS["s"], **changes}
    plain = model(text, **{name: array for name, array in arrays.items() if f"{name})" in text or f" {name}," in text})
    assert shiftable(plain, [Site("block_00", "fc1", "g", "p", "w")]) == (set(), {"g"})
    assert ops(shifted(plain)).count("Sub") == 1


@pytest.mark.parametrize("text", [f"{NORM.replace(' y =', ' z =')} r = ReduceMean<axes=[1]>(g) y = Add(z, r)"])
def test_another_reader_keeps_the_plain_tensor(text):
    plain = model(text, **NORM_ARRAYS)
    assert shiftable(plain, [Site("block_00", "fc1", "g", "p", "w")]) == (set(), {"g"})
    found = shifted(plain)
    assert "Sub" in ops(found)
    # a mean less the constant would be wrong by 2.5; int8 is by some steps of 0.02, times weights
    assert np.abs(run(found, X) - run(plain, X)).max() < 0.3


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("g = Relu(x) y = Gemm<alpha=0.5>(g, w, b)", WEIGHT),
        # the site stands on a tensor that the product reads behind something
        ("g = Relu(x) h = Mul(g, g) y = MatMul(h, w)", WEIGHT),
    ],
)
def test_what_cannot_take_it_back(text, weight):
    plain = model(text, w=weight, **({"b": BIAS} if "b)" in text else {}))
    assert shiftable(plain, [Site("block_00", "fc2", "g", "y", "w")]) == (set(), set())


def test_neighbours_beyond_the_edge_are_zero_and_not_the_constant():
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[n, {K}, 4, 4] x) => (float[n, {N}, h, w1] y)
        {{ g = Relu(x) y = Conv<pads=[1, 1, 1, 1]>(g, w) }}"""
    found = ir.from_onnx_text(text)
    value = next(value for node in found.graph for value in node.inputs if value is not None and value.name == "w")
    value.const_value = ir.tensor(np.ones((N, K, 1, 1), np.float32), name="w")
    value.shape, value.type = ir.Shape((N, K, 1, 1)), ir.TensorType(ir.DataType.FLOAT)
    found.graph.register_initializer(value)
    assert shiftable(found, [Site("block_00", "fc2", "g", "y", "w")]) == (set(), set())


def test_errors_of_a_shift_match_brute_force():
    rows = np.abs(RNG.normal(size=(60, K))).astype(np.float32)
    (found,) = product_errors(rows, np.ones(60), [ir.tensor(WEIGHT, name="w")], [1.5], middles=[1.25])
    total = mean = 0.0
    for row in rows.astype(np.float64):
        kept = np.clip(np.round((row - 1.25) / (1.5 / 127)), -127, 127) * (1.5 / 127)
        product = kept @ WEIGHT.astype(np.float64)
        wrong = (
            product.astype(np.float16).astype(np.float64)
            + 1.25 * WEIGHT.sum(0, dtype=np.float64)
            - row @ WEIGHT.astype(np.float64)
        )
        total += float((wrong**2).sum()) ** 4
        mean += float((row @ WEIGHT.astype(np.float64) ** 1) @ (row @ WEIGHT.astype(np.float64)))
    assert found == pytest.approx((total / 60) ** 0.25 / (mean / 60), rel=1e-2)


def test_a_product_that_fp16_cannot_hold_is_no_candidate():
    huge = np.full((K, N), 4000.0, np.float32)
    assert product_errors(
        np.full((4, K), 9.0, np.float32), np.ones(4), [ir.tensor(huge, name="w")], [5.0], middles=[4.0]
    ) == [np.inf]


def seen(x: np.ndarray) -> Cost:
    plain = model("g = Identity(x) y = MatMul(g, w)", w=WEIGHT)
    guard = Guard(plain, ["g"])
    for number, part in enumerate(np.array_split(x, 4)):
        guard.add("g", part, [number])
    return guard.cost("g", 0.6 * float(np.abs(x).max()), float(np.abs(x).max()))


def test_one_side_of_zero_gains_three_quarters_and_both_sides_nothing():
    x = RNG.uniform(-1, 1, size=(4000, K)).astype(np.float32)  # with a tenth of them, chance alone makes 15 %
    one_sided = seen(np.abs(x))
    shift = one_sided.shift(0.5)
    assert (
        shift is not None
        and shift.offset == pytest.approx(0.5, rel=0.01)
        and shift.threshold == pytest.approx(0.5, rel=0.01)
    )
    assert shift.error == pytest.approx(one_sided.cheapest / 4, rel=0.2)  # steps half as large
    both = seen(x)
    assert both.shift(0.5) is None and min(both.shifted) == pytest.approx(both.cheapest, rel=0.05)


def test_a_shift_has_to_pay_where_it_takes_a_subtraction():
    cost = Cost([1.0, 2.0], [0.5, 0.4], [0.2, 0.3], [0.8, 1.7], [0.3, 0.35])
    calibration = Calibration({"a": 2.0, "b": 2.0, "c": 2.0}, {}, "entropy", 1, {}, {"a": cost, "b": cost})
    found = calibration.shift(["a"], ["b", "c"])  # 0.3 of 0.4 is less, and not half
    assert found.shifts == {"a": Shift(0.2, 0.8, 0.3)} and found.error("a") == 0.3 and found.error("b") == 0.4
    assert found.leave_out(["a", "b"], 0.3).left_out == {"b": 0.4}
    assert found.thresholds == calibration.thresholds  # what TensorRT's cache gets


def test_it_is_kept_in_the_file(tmp_path):
    cost = Cost([1.0], [0.5], [0.2], [0.8], [0.1])
    saved = Calibration({"a": 1.0}, {"a": 1.0}, "entropy", 1, {}, {"a": cost}).shift([], ["a"])
    saved.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == saved and saved.shifts
    old = json.loads((tmp_path / "calibration.json").read_text())
    del old["shifts"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert Calibration.load(tmp_path / "old.json").shifts == {}


def test_a_switched_graph_computes_the_same(tmp_path, images):
    """It puts constants back behind the pairs, where any reader may take the plain tensor; the sums are the same but
    for float32."""
    path = TinyViT(fused_qkv=False).save(tmp_path / "model.onnx")
    plain, x = ir.load(path), normalize(images)
    placement = place(plain)
    calibration = calibrate(path, images, normalize, placement.tensors()).shift(*shiftable(plain, placement.sites))
    assert any("Gelu" in name or "mlp" in name.lower() for name in calibration.shifts)
    units = candidates(plain, {}, attention=False)
    save_onnx(switched(plain, calibration, units, target="rtx", precision="int8"), tmp_path / "switched.onnx")
    session = unfused(tmp_path / "switched.onnx")
    (exact,) = unfused(path).run(None, {"images": x})
    for chosen in (["block_01/fc2"], ["block_00/qkv", "block_01/out", "block_01/fc1"], [unit.name for unit in units]):
        sites = place(
            plain, quantize_only=[site.name for unit in units if unit.name in chosen for site in unit.sites]
        ).sites
        save_onnx(quantize(plain, calibration, sites, target="rtx"), tmp_path / "own.onnx")
        (expected,) = unfused(tmp_path / "own.onnx").run(None, {"images": x})
        (got,) = session.run(None, {"images": x, "quantized": np.array([unit.name in chosen for unit in units])})
        # values at a rounding edge may take another step
        assert np.abs(got - expected).mean() < 0.05 * np.abs(exact - expected).mean() > 0


def digits(name, **changes):
    config = default_config()
    config.name, config.checkpoint, config.engine.backend, config.precision = name, str(DIGITS), "none", "int8"
    config.calibration.data, config.calibration.num_images = str(CHECKPOINTS / "digits" / "calibration.zip"), 32
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("target", ["trt8", "trt10"])
@pytest.mark.slow
def test_the_conversion_shifts_what_gelu_gives(tmp_path, target):
    report = convert(digits("digits", target=target), tmp_path, quiet=True)
    rows = report["calibration"]["shifted"]
    assert {f"block_{i:02d}/fc2" for i in range(6)} <= {
        f"block_{row['tensor'].split('_')[1][0].zfill(2)}/fc2" for row in rows
    }
    assert all(0 < row["error"] <= row["error_symmetric"] for row in rows)
    graph = onnx.load(tmp_path / "digits" / "model.int8.onnx", load_external_data=False).graph
    # norms' biases take theirs
    assert sum(node.op_type == "Sub" and "shifted" in node.name for node in graph.node) == 6
    error = mean_error(tmp_path / "digits")
    plain = convert(digits("plain", target=target, **{"calibration.shift": False}), tmp_path, quiet=True)
    assert plain["calibration"]["shifted"] == []
    # 0.6 on 200 other digits; the smallest cosine of a few says nothing
    assert error < 0.8 * mean_error(tmp_path / "plain")


def mean_error(bundle):
    """The squared error of INT8's logits on the calibration images."""
    images = normalize(np.load(bundle / "calibration_images.npy"))
    fp32, int8 = (
        unfused(bundle / name).run(["logits"], {"images": images})[0] for name in ("model.onnx", "model.int8.onnx")
    )
    return float(((fp32 - int8) ** 2).mean())


def test_tensorrts_own_calibrator_gets_no_shift(tmp_path):
    config = digits("digits", target="trt8", **{"engine.calibrator": True})
    assert convert(config, tmp_path, until="calibrate", quiet=True)["calibration"]["shifted"] == []
