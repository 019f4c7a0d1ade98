"""GroupNorms as nodes of our kernels, on graphs of a few nodes: form, what is left alone, numbers against NumPy."""

import numpy as np
import pytest
from export_graphs import computed, described, ops

from vit_convert.core.errors import ExportError
from vit_convert.export.passes.cleanup import clean
from vit_convert.export.passes.group_norms import GROUP_NORMS_TO_KERNELS, fits

CHANNELS, SIDE, EPSILON = 64, 3, 0.1  # large enough to show
VALUES = CHANNELS * SIDE * SIDE // 32
SHAPE = f"float[n, {CHANNELS}, {SIDE}, {SIDE}]"
PARAMETERS = ("scale", "bias", "scale2", "bias2")


def norm(source, result, scale="scale", bias="bias", epsilon=EPSILON):
    """GroupNorm as it is traced."""
    return f"""
    {result}g = Reshape ({source}, groups)
    {result}n = LayerNormalization <axis = -1, epsilon = {epsilon}> ({result}g, ones, zeros)
    {result}r = Reshape ({result}n, pixels)
    {result}m = Mul ({result}r, {scale}) {result} = Add ({result}m, {bias})"""


ALONE = norm("x", "a") + " y = Relu (a)"
ADDED = norm("x", "a") + " s = Add (a, z) y = Relu (s)"
TWO = norm("z", "b", "scale2", "bias2") + norm("x", "a") + " s = Add (b, a) y = Relu (s)"


def graph(body, edit=("", ""), outputs=f"{SHAPE} y"):
    weights = ", ".join(f"float[1, {CHANNELS}, 1, 1] {name}" for name in PARAMETERS)
    numbers = {"ones": [1.0] * VALUES, "zeros": [0.0] * VALUES}
    constants = ", ".join(f"float[{VALUES}] {name} = {{{', '.join(map(str, row))}}}" for name, row in numbers.items())
    constants += f", int64[3] groups = {{0, 32, {VALUES}}}, int64[4] pixels = {{0, {CHANNELS}, {SIDE}, {SIDE}}}"
    text = f"g ({SHAPE} x, {SHAPE} z, {weights}) => ({outputs}) <{constants}> {{ {body} }}"
    assert edit[0] in text
    model = described(text.replace(*edit), *PARAMETERS, opset=17)
    for i, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{i}"
    return model


def by_hand(x, scale, bias):
    groups = x.astype(np.float64).reshape(len(x), 32, -1)
    centred = groups - groups.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
    return normal.reshape(x.shape) * scale + bias


def given():
    rng = np.random.default_rng(0)
    x, z = (rng.standard_normal((2, CHANNELS, SIDE, SIDE)).astype(np.float32) + 1 for _ in range(2))
    return x, z, {name: rng.standard_normal((1, CHANNELS, 1, 1)).astype(np.float32) for name in PARAMETERS}


@pytest.mark.parametrize("body, name", [(ALONE, "VitGroupNorm"), (ADDED, "VitAddGroupNorm"), (TWO, "VitTwoGroupNorms")])
@pytest.mark.parametrize("turned", [False, True])
def test_form_and_numbers(body, name, turned):
    """The operands of what is added may come in either order."""
    body = body.replace("Add (a, z)", "Add (z, a)").replace("Add (b, a)", "Add (a, b)") if turned else body
    model = graph(body)
    assert GROUP_NORMS_TO_KERNELS(model).places == 1
    clean(model)
    assert ops(model) == [name]
    node = next(iter(model.graph))
    assert node.name.startswith("Relu") and node.attributes["groups"].as_int() == 32
    x, z, params = given()
    total = by_hand(x, params["scale"], params["bias"])
    total += {"VitGroupNorm": 0, "VitAddGroupNorm": z}.get(name, 0)
    if name == "VitTwoGroupNorms":
        total += by_hand(z, params["scale2"], params["bias2"])
    (got,) = computed(model, params, x, z)
    np.testing.assert_allclose(got, np.maximum(total, 0), rtol=0, atol=1e-5)  # float32 sums of 18 values


@pytest.mark.parametrize(
    "edit, kept",
    [
        (("y = Relu (a)", "y = Identity (a)"), "no ReLU"),
        (("ones = {1.0", "ones = {2.0"), "a scale of each place"),
        (("zeros = {0.0", "zeros = {0.5"), "a bias of each place"),
        (("axis = -1", "axis = 1"), "another axis"),
        (("Mul (ar, scale)", "Mul (ar, ar)"), "no scale of the channels"),
        (("Mul (ar, scale)", "Mul (ar, z)"), "a scale that is computed"),
        (("pixels = {0, 64, 3, 3}", "pixels = {0, 64, 9, 1}"), "another shape behind it"),
        (("am = Mul", "am = Div"), "another operator"),
        (("{0, 32, 18}", "{0, 16, 36}"), "16 groups"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_left_alone(edit, kept):
    with pytest.raises(ExportError, match="no GroupNorm over 32 groups"):
        GROUP_NORMS_TO_KERNELS(graph(ALONE, edit))


def test_channels_that_there_are_kernels_for():
    found = [channels for channels in range(0, 2400) if fits(channels)]
    assert found == [32, 64, 128, *range(256, 2049, 256)]


def test_what_something_else_reads_is_left_alone():
    for other in ("an", "ar", "am", "a"):
        body = norm("x", "a") + f" y = Relu (a) w = Neg ({other})"
        shape = f"float[n, 32, {VALUES}]" if other == "an" else SHAPE
        with pytest.raises(ExportError, match="no GroupNorm"):
            GROUP_NORMS_TO_KERNELS(graph(body, outputs=f"{SHAPE} y, {shape} w"))


def test_residual_with_another_epsilon_or_reader_is_added_as_it_is():
    two = norm("z", "b", "scale2", "bias2", epsilon=0.5) + norm("x", "a") + " s = Add (b, a) y = Relu (s)"
    for model in (graph(two), graph(TWO + " w = Neg (b)", outputs=f"{SHAPE} y, {SHAPE} w")):
        assert GROUP_NORMS_TO_KERNELS(model).places == 1
        clean(model)
        assert sorted({*ops(model)} - {"Reshape", "Mul", "Add", "Neg"}) == ["LayerNormalization", "VitAddGroupNorm"]


def test_a_relu_that_is_an_output_keeps_its_name():
    model = graph(norm("x", "a") + " w = Relu (a) y = Neg (w)", outputs=f"{SHAPE} w, {SHAPE} y")
    assert GROUP_NORMS_TO_KERNELS(model).places == 1
    assert [value.name for value in model.graph.outputs] == ["w", "y"]
