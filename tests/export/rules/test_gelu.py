"""GELU in the spellings of JAX code."""

import itertools

import numpy as np
import pytest
from export_graphs import declined, graph, ops, rewrite, run

from vit_convert.export.rules.gelu import ErfGelu, TanhGelu, TanhGeluToExp, TanhGeluToPower
from vit_convert.export.rules.rule import apply_rule

CONSTANTS = ", ".join(
    f"float {name} = {{{value}}}"
    for name, value in {
        "half": 0.5,
        "one": 1,
        "three": 3,
        "c": 0.044715,
        "s": 0.7978845608,
        "r": 1.41421356,
        "i": 0.70710678,
    }.items()
)
CUBES = ["xx = Mul (x, x) cube = Mul (xx, x)", "xx = Mul (x, x) cube = Mul (x, xx)", "cube = Pow (x, three)"]
HALVES = [
    "h = Mul (share, half) y = Mul (x, h)",
    "h = Mul (half, x) y = Mul (h, share)",
    "h = Mul (share, x) y = Mul (half, h)",
    "h = Mul (half, share) y = Mul (h, x)",
    "h = Mul (x, half) y = Mul (share, h)",
    "h = Mul (x, share) y = Mul (h, half)",
]


def text(body: str) -> str:
    return f"g (float[n, 7] x) => (float[n, 7] y) <{CONSTANTS}> {{ {body} }}"


def tanh(cube: str = CUBES[0], half: str = HALVES[0], order: str = "x, cubic") -> str:
    return text(
        f"{cube} cubic = Mul (c, cube) sum = Add ({order}) z = Mul (s, sum) t = Tanh (z) share = Add (one, t) {half}"
    )


def erf(inner: str = "Div (x, r)", half: str = HALVES[0]) -> str:
    return text(f"z = {inner} e = Erf (z) share = Add (e, one) {half}")


@pytest.mark.parametrize(("cube", "half", "order"), itertools.product(CUBES, HALVES, ["x, cubic", "cubic, x"]))
def test_tanh(cube, half, order):
    model, count = rewrite(tanh(cube, half, order), TanhGelu())
    assert count.applied == 1
    assert ops(model) == ["Gelu"]
    assert model.graph[0].attributes["approximate"].as_string() == "tanh"


def erfc(half: str = HALVES[0], inverse: str = "i") -> str:
    return text(f"m = Neg (x) z = Mul (m, {inverse}) e = Erf (z) share = Sub (one, e) {half}")


@pytest.mark.parametrize("half", HALVES)
def test_erfc(half):
    model, count = rewrite(erfc(half), ErfGelu())
    assert count.applied == 1
    assert ops(model) == ["Gelu"]


def test_erfc_of_another_argument_is_declined():
    assert "the inner scale is 1.0" in declined(erfc(inverse="one"), ErfGelu())


@pytest.mark.parametrize(("cube", "half"), itertools.product(CUBES, HALVES))
def test_tanh_to_exp(cube, half):
    model, count = rewrite(tanh(cube, half), TanhGeluToExp(), 17)
    assert count.applied == 1
    assert ops(model) == ["Mul", "Mul", "Add", "Mul", "Exp", "Add", "Div"]


@pytest.mark.parametrize(("cube", "half"), itertools.product(CUBES, HALVES))
def test_tanh_to_power(cube, half):
    """All spellings end in the one that TensorRT 8.6 knows; what is spelt so is left alone."""
    model, count = rewrite(tanh(cube, half), TanhGeluToPower(), 17)
    assert count.applied == (0 if (cube, half) == (CUBES[2], HALVES[3]) else 1)
    assert ops(model) == ["Pow", "Mul", "Add", "Mul", "Tanh", "Add", "Mul", "Mul"]
    product, x = model.graph[-1].inputs
    assert x is model.graph.inputs[0] and product is model.graph[-2].outputs[0]


@pytest.mark.parametrize(("inner", "half"), itertools.product(["Div (x, r)", "Mul (x, i)", "Mul (i, x)"], HALVES))
def test_erf(inner, half):
    model, count = rewrite(erf(inner, half), ErfGelu())
    assert count.applied == 1
    assert ops(model) == ["Gelu"]


@pytest.mark.parametrize("opset", [17, 19])
def test_no_operator_before_opset_20(opset):
    assert declined(tanh(), TanhGelu(), opset) == f"opset {opset} has no Gelu"
    assert declined(erf(), ErfGelu(), opset) == f"opset {opset} has no Gelu"


@pytest.mark.parametrize(
    ("constant", "other", "reason"),
    [
        ("c = {0.044715}", "c = {0.035677}", "the cubic coefficient"),
        ("s = {0.7978845608}", "s = {0.8}", "the inner scale"),
        ("one = {1}", "one = {2}", "the addend"),
        ("half = {0.5}", "half = {0.25}", "the outer scale"),
    ],
)
def test_another_constant_is_declined(constant, other, reason):
    for rule in (TanhGelu(), TanhGeluToExp(), TanhGeluToPower()):
        assert reason in declined(tanh().replace(f"float {constant}", f"float {other}"), rule)


@pytest.mark.parametrize(
    ("constant", "other", "reason"),
    [("one = {1}", "one = {2}", "the addend is 2"), ("half = {0.5}", "half = {0.25}", "the outer scale is 0.25")],
)
def test_another_constant_around_erf_is_declined(constant, other, reason):
    for text in (erf(), erfc()):
        assert reason in declined(text.replace(f"float {constant}", f"float {other}"), ErfGelu())


@pytest.mark.parametrize("rule", [TanhGelu(), TanhGeluToExp(), TanhGeluToPower()])
def test_another_power_is_declined(rule):
    assert "the power is 2" in declined(tanh(CUBES[2]).replace("three = {3}", "three = {2}"), rule)


def test_constants_as_float16_rounds_them_are_declined():
    """They are 4e-5 and 1.5e-4 off, which shows in the logits; the spelling of float32 is 6e-8 off."""
    assert "the cubic coefficient is 0.0447" in declined(
        tanh().replace("c = {0.044715}", "c = {0.04470825}"), TanhGelu()
    )
    assert "the inner scale is 0.7978" in declined(tanh().replace("s = {0.7978845608}", "s = {0.7978516}"), TanhGelu())


def test_large_values_saturate():
    """Where exp(−2z) overflows the quotient is 0, and where it vanishes x: as 0.5 x (1 + tanh z) is."""
    model = graph(tanh(), 17)
    assert apply_rule(TanhGeluToExp(), model).applied == 1
    x = np.array([[-1e4, -90, -12, 0, 12, 90, 1e4]], np.float32)
    np.testing.assert_allclose(run(model, {"x": x})[0], np.maximum(x, 0), rtol=1e-6, atol=1e-30)


def test_quick_gelu_does_not_match():
    body = "z = Mul (x, r) g = Sigmoid (z) y = Mul (x, g)"
    assert declined(text(body), TanhGelu()) == ""
    assert declined(text(body), ErfGelu()) == ""


@pytest.mark.parametrize(
    ("inner", "reason"), [("Div (x, one)", "the divisor is 1.0"), ("Mul (x, one)", "the inner scale is 1.0")]
)
def test_another_argument_of_erf_is_declined(inner, reason):
    assert reason in declined(erf(inner), ErfGelu())
