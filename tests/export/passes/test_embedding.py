"""The beginning of a graph, on a few nodes: sizes that vary and pixels that are normalised inside, against NumPy."""

import numpy as np
import onnx_ir as ir
import pytest
from export_graphs import computed, described, ops

from vit_convert.core.errors import ExportError
from vit_convert.export.passes.dynamic_image_size import make_dynamic
from vit_convert.export.passes.uint8_input import take_pixels
from vit_convert.export.weights import bind

RNG = np.random.default_rng(6)
PATCH, WIDTH = 2, 4
GRID = (2, 3)
TOLERANCE = 1e-5  # of float32 sums of a dozen products


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


PARAMS = {
    "kernel": normal(WIDTH, 3, PATCH, PATCH),
    "bias": normal(WIDTH),
    "pos_embedding": normal(1, 6, WIDTH),
    "cls": normal(1, 1, WIDTH),
}
WEIGHTS = "float[4, 3, 2, 2] kernel, float[4] bias, float[1, 6, 4] pos_embedding"


def patches(images: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Each patch's product with the kernel: [batch, rows, columns, width] in float64."""
    batch, height, width, _ = images.shape
    found = np.zeros((batch, height // PATCH, width // PATCH, len(bias)))
    for i, row, column in np.ndindex(*found.shape[:3]):
        patch = images[i, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)].astype(np.float64)
        found[i, row, column] = np.einsum("hwc,nchw->n", patch, kernel.astype(np.float64)) + bias
    return found


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


# --- sizes that vary ------------------------------------------------------------------------------------------------

EMBEDDING = f"""g (float[n, 4, 6, 3] x, {WEIGHTS}, float[1, 1, 4] cls) => (float[n, 7, 4] y)
    <int64[3] flat = {{0, 6, 4}}, int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[4] heads = {{0, 7, 2, 2}},
    int64[3] merged = {{0, 7, 4}}, int64[3] turned = {{0, 4, 7}}, float half = {{0.5}}> {{
    p = Transpose <perm = [0, 3, 1, 2]> (x) c = Conv <strides = [2, 2]> (p, kernel, bias) q = Transpose <perm = [0,
    2, 3, 1]> (c)
    r = Reshape (q, flat) t = Add (r, pos_embedding)
    s = Shape (t) b = Gather <axis = 0> (s, zero) token_shape = Concat <axis = 0> (b, one, one) token = Expand (cls,
    token_shape)
    z = Concat <axis = 1> (token, t) h = Reshape (z, heads) a = Mul (h, half) y = Reshape (a, merged) }}"""


def embedding(edit: tuple[str, str] = ("", "")) -> ir.Model:
    assert edit[0] in EMBEDDING
    return described(EMBEDDING.replace(*edit), "kernel", "bias", "pos_embedding", "cls")


def resampled(table: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The table at another size, corners on corners, one axis at a time by np.interp."""
    grid = table.reshape(*GRID, WIDTH).astype(np.float64)
    for axis, size in ((0, rows), (1, columns)):
        old = grid.shape[axis]
        at = np.linspace(0, old - 1, size) if size > 1 else np.zeros(1)
        grid = np.apply_along_axis(lambda line, at=at, old=old: np.interp(at, np.arange(old), line), axis, grid)
    return grid


@pytest.mark.parametrize("size", [(4, 6), (8, 6), (2, 10), (6, 4), (4, 2)])
@pytest.mark.parametrize("nchw", [False, True])
def test_every_size(size, nchw):
    model = (
        embedding(
            (
                "p = Transpose <perm = [0, 3, 1, 2]> (x) c = Conv <strides = [2, 2]> (p,",
                "c = Conv <strides = [2, 2]> (x,",
            )
        )
        if (nchw)
        else embedding()
    )
    if nchw:
        model.graph.inputs[0].shape = ir.Shape(["n", 3, 4, 6])
    make_dynamic(model, GRID, "pos_embedding", "x")
    assert [str(dim) for dim in model.graph.inputs[0].shape] == (
        ["batch", "3", "height", "width"] if nchw else ["batch", "height", "width", "3"]
    )
    for batch in (1, 3):
        x = normal(batch, *size, 3)
        tokens = patches(x, PARAMS["kernel"], PARAMS["bias"])
        tokens = (tokens + resampled(PARAMS["pos_embedding"], *tokens.shape[1:3])).reshape(batch, -1, WIDTH)
        expected = np.concatenate([np.broadcast_to(PARAMS["cls"], (batch, 1, WIDTH)), tokens], 1) * 0.5
        got = computed(model, PARAMS, np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if nchw else x)[0]
        assert_close(got, expected)


def test_the_form_of_a_dynamic_graph():
    model = embedding()
    before = ops(model)
    make_dynamic(model, GRID, "pos_embedding", "x")
    after = ops(model)
    assert sorted(after) == sorted([*before, "Shape", "Gather", "Concat", "Resize"])
    order = [op for op in after if op in ("Conv", "Resize", "Add", "Transpose")]
    # the table is added before the patches are laid out
    assert order == ["Transpose", "Conv", "Resize", "Add", "Transpose"]
    shapes = {
        value.name: [str(dim) for dim in value.shape]
        for node in model.graph
        for value in node.outputs
        if value.shape is not None
    }
    assert shapes["c"] == ["batch", "4", "rows", "columns"] and shapes["r"] == ["batch", "patches", "4"]
    assert shapes["z"] == ["batch", "tokens", "4"]
    assert shapes["a"] == ["batch", "tokens", "2", "2"]  # and what follows is found anew
    constants = [node.inputs[1].const_value.numpy().tolist() for node in model.graph if node.op_type == "Reshape"]
    assert constants == [[0, -1, 4], [0, 0, 2, 2], [0, 0, 4]]
    resize = next(node for node in model.graph if node.op_type == "Resize")
    assert list(resize.inputs[0].shape) == [1, WIDTH, *GRID] and resize.inputs[0].name == "pos_embedding"


def test_a_reshape_of_other_axes_states_its_sizes():
    """Only an axis of tokens that stays where it is becomes a copy; 4 rows of 7 are not 7 tokens."""
    model = embedding(
        (
            "a = Mul (h, half) y = Reshape (a, merged)",
            "a = Mul (h, half) w = Reshape (a, turned) y = Reshape (w, merged)",
        )
    )
    make_dynamic(model, GRID, "pos_embedding", "x")
    constants = [node.inputs[1].const_value.numpy().tolist() for node in model.graph if node.op_type == "Reshape"]
    assert [0, 4, 7] in constants and [0, 7, 4] in constants


def test_a_shape_that_is_computed_stays():
    model = embedding(("y = Reshape (a, merged)", "like = Shape (z) y = Reshape (a, like)"))
    make_dynamic(model, GRID, "pos_embedding", "x")
    x = normal(2, 6, 4, 3)
    assert computed(model, PARAMS, x)[0].shape == (2, 7, 4)
    assert computed(model, PARAMS, normal(2, 8, 6, 3))[0].shape == (2, 13, 4)


CUT = "h = Reshape (z, heads) a = Mul (h, half) y = Reshape (a, merged)"


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ("y = Slice (z, one, seven, one)", slice(1, None)),  # all behind the class token, however many there are
        ("y = Slice (z, one, seven, one, one)", slice(1, None)),
        ("y = Slice (z, one, three, one)", slice(1, 3)),  # says how many it wants
    ],
)
def test_what_is_cut_off_behind_a_class_token(cut, kept):
    model = embedding_with(cut)
    make_dynamic(model, GRID, "pos_embedding", "x")
    x = normal(2, 8, 6, 3)
    tokens = patches(x, PARAMS["kernel"], PARAMS["bias"])
    tokens = (tokens + resampled(PARAMS["pos_embedding"], 4, 3)).reshape(2, 12, WIDTH)
    expected = np.concatenate([np.broadcast_to(PARAMS["cls"], (2, 1, WIDTH)), tokens], 1)
    assert_close(computed(model, PARAMS, x)[0], expected[:, kept])


@pytest.mark.parametrize(
    "cut",
    [
        "y = Slice (z, corner, far)",  # of every axis
        "e = Add (one, three) y = Slice (z, one, e, one)",  # an end that is computed
        "e = Sub (three, one) f = Sub (e, one) y = Slice (z, one, seven, f)",  # an axis that is
        "y = Slice (z, zero, three, two)",  # channels
    ],
)
def test_what_cuts_off_something_else_stays(cut):
    model = embedding_with(cut)
    before = [value.name for value in model.graph.node("cut").inputs]
    make_dynamic(model, GRID, "pos_embedding", "x")
    assert [value.name for value in model.graph.node("cut").inputs] == before


def embedding_with(cut: str) -> ir.Model:
    text = EMBEDDING.replace(CUT, cut).replace("(float[n, 7, 4] y)", "(float[n, m, c] y)")
    text = text.replace(
        "float half",
        "int64[1] seven = {7}, int64[1] three = {3}, int64[1] two = {2}, int64[3] corner = {0, 1, 0}, "
        "int64[3] far = {99, 7, 4}, float half",
    )
    model = described(text, "kernel", "bias", "pos_embedding", "cls")
    next(node for node in model.graph if node.op_type == "Slice").name = "cut"
    return model


@pytest.mark.parametrize(
    "edit",
    [
        ("t = Add (r, pos_embedding)", "t = Mul (r, pos_embedding)"),
        ("t = Add (r, pos_embedding)", "rr = Relu (r) t = Add (rr, pos_embedding)"),
        ("r = Reshape (q, flat)", "qq = Relu (q) r = Reshape (qq, flat)"),
        (
            "c = Conv <strides = [2, 2]> (p, kernel, bias)",
            "k = Neg (kernel) c0 = Conv <strides = [2, 2]> (p, k, bias) c = Relu (c0)",
        ),
    ],
)
def test_a_graph_that_adds_no_table_to_patches_is_refused(edit):
    with pytest.raises(
        ExportError, match="does not add a position table to the patches of a convolution, so its image size is fixed"
    ):
        make_dynamic(embedding(edit), GRID, "pos_embedding", "x")


def test_a_table_that_is_added_to_rows_and_columns_is_refused():
    """Whatever stands in the place of the Reshape."""
    text = EMBEDDING.replace("float[1, 6, 4] pos_embedding", "float[2, 3, 4] pos_embedding")
    text = text.replace(
        "r = Reshape (q, flat) t = Add (r, pos_embedding)",
        "r = Relu (q) u = Add (r, pos_embedding) t = Reshape (u, flat)",
    )
    model = described(text, "kernel", "bias", "pos_embedding", "cls")
    with pytest.raises(ExportError, match="does not add a position table"):
        make_dynamic(model, GRID, "pos_embedding", "x")


def test_another_weight_that_is_added_is_no_table():
    model = described(EMBEDDING, "kernel", "bias", "pos_embedding", "cls", names={"pos_embedding": "offsets"})
    with pytest.raises(ExportError, match="does not add a position table"):
        make_dynamic(model, GRID, "pos_embedding", "x")


# --- pixels ---------------------------------------------------------------------------------------------------------

SCALE, OFFSET = np.float32([0.02, 0.017, 0.025]), np.float32([-2.1, -2.0, -1.8])
STEM = f"""g (float[n, 4, 6, 3] x, {WEIGHTS}) => (float[n, 4, 2, 3] y) {{
    p = Transpose <perm = [0, 3, 1, 2]> (x) y = Conv <strides = [2, 2]> (p, kernel, bias) }}"""


def stem(edit: tuple[str, str] = ("", ""), *, nchw: bool = False) -> ir.Model:
    text = STEM.replace(", float[1, 6, 4] pos_embedding", "")
    if nchw:
        text = text.replace("float[n, 4, 6, 3] x", "float[n, 3, 4, 6] x").replace(
            "Transpose <perm = [0, 3, 1, 2]>", "Identity"
        )
    assert edit[0] in text
    text = text.replace(*edit)
    if "bias" in text.partition("=>")[2]:
        return described(text, "kernel", "bias")
    return described(text.replace(", float[4] bias", ""), "kernel")


def pixels() -> np.ndarray:
    """The ends of the range are where a wrong constant shows most."""
    x = RNG.integers(0, 256, (3, 4, 6, 3), np.uint8)
    x[0], x[1, :2] = 0, 255
    return x


def normalized(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) * SCALE.astype(np.float64) + OFFSET.astype(np.float64)


@pytest.mark.parametrize("nchw", [False, True])
@pytest.mark.parametrize(
    "edit",
    [
        ("", ""),
        ("strides = [2, 2]", "strides = [2, 2], pads = [0, 0, 0, 0]"),
        ("strides = [2, 2]", 'strides = [2, 2], auto_pad = "NOTSET"'),
        ("strides = [2, 2]", 'strides = [2, 2], auto_pad = "VALID"'),
        ("kernel, bias)", "kernel)"),
    ],
)
def test_pixels_are_normalised_in_the_weights(edit, nchw):
    model, x = stem(edit, nchw=nchw), pixels()
    assert take_pixels(model, "x", SCALE, OFFSET)
    assert model.graph.inputs[0].dtype == ir.DataType.UINT8
    assert ops(model) == ["Cast", "Sub", *(["Transpose"] if not nchw else []), "Conv"]
    conv = next(node for node in model.graph if node.op_type == "Conv")
    assert [value.name for value in conv.inputs[1:]] == ["kernel", "bias"]
    assert set(model.graph.initializers) - {"centre"} == {"kernel", "bias"}
    # where pixels are exact in fp16, and the kernel's sum is small
    assert model.graph[1].inputs[1].const_value.numpy() == 128
    with_bias = edit[1] != "kernel)"
    params = PARAMS if with_bias else {"kernel": PARAMS["kernel"]}
    expected = patches(normalized(x), PARAMS["kernel"], PARAMS["bias"] if with_bias else np.zeros(WIDTH)).transpose(
        0, 3, 1, 2
    )
    assert_close(computed(model, params, np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if nchw else x)[0], expected)


def test_a_scoped_kernel_gets_a_bias_of_its_scope():
    model = described(
        STEM.replace(f", {WEIGHTS}", ", float[4, 3, 2, 2] kernel").replace(", bias)", ")"),
        "kernel",
        names={"kernel": "stem/kernel"},
    )
    assert take_pixels(model, "x", SCALE, OFFSET)
    assert {"stem/kernel", "stem/bias"} <= set(model.graph.initializers)


def test_a_kernel_that_others_read_stays_for_them():
    model = described(
        STEM.replace(", float[1, 6, 4] pos_embedding", "")
        .replace("=> (float[n, 4, 2, 3] y)", "=> (float[n, 4, 2, 3] y, float[4, 3, 2, 2] z, float[4] w)")
        .replace("bias) }", "bias) z = Neg (kernel) w = Neg (bias) }"),
        "kernel",
        "bias",
    )
    x = pixels()
    assert take_pixels(model, "x", SCALE, OFFSET)
    y, z, w = computed(model, PARAMS, x)
    assert_close(y, patches(normalized(x), PARAMS["kernel"], PARAMS["bias"]).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(z, -PARAMS["kernel"])
    np.testing.assert_array_equal(w, -PARAMS["bias"])


@pytest.mark.parametrize("nchw", [False, True])
@pytest.mark.parametrize(
    "edit",
    [
        ("strides = [2, 2]", "strides = [2, 2], pads = [0, 0, 0, 1]"),  # zeros that are no pixels
        ("strides = [2, 2]", 'strides = [2, 2], auto_pad = "SAME_UPPER"'),
        ("y = Conv <strides = [2, 2]> (p,", "r = Relu (p) y = Conv <strides = [2, 2]> (r,"),
        (
            "y = Conv <strides = [2, 2]> (p, kernel, bias)",  # read twice
            "c = Conv <strides = [2, 2]> (p, kernel, bias) d = Neg (p) e = Conv <strides = [2, 2]> (d, kernel, bias) "
            "y = Add (c, e)",
        ),
    ],
)
def test_pixels_are_normalised_before_anything_else(edit, nchw):
    model, plain, x = stem(edit, nchw=nchw), stem(edit, nchw=nchw), pixels()
    bind(plain, PARAMS)
    turn = (0, 3, 1, 2) if nchw else (0, 1, 2, 3)
    expected = computed(plain, PARAMS, np.ascontiguousarray(normalized(x).astype(np.float32).transpose(turn)))[0]
    assert not take_pixels(model, "x", SCALE, OFFSET)
    assert ops(model)[:3] == ["Cast", "Mul", "Add"] and model.graph.inputs[0].dtype == ir.DataType.UINT8
    assert_close(computed(model, PARAMS, np.ascontiguousarray(x.transpose(turn)))[0], expected)


def test_a_convolution_over_other_channels_is_not_folded_into():
    """Of the height, say: scale and offset are of colours."""
    text = STEM.replace(", float[1, 6, 4] pos_embedding", "").replace("perm = [0, 3, 1, 2]", "perm = [0, 1, 2, 3]")
    text = text.replace("float[n, 4, 6, 3] x", "float[n, 5, 6, 3] x").replace(
        "float[4, 3, 2, 2] kernel", "float[4, 5, 2, 2] kernel"
    )
    text = text.replace("float[n, 4, 2, 3] y", "float[n, 4, 3, 1] y")
    model = described(text, "kernel", "bias")
    assert not take_pixels(model, "x", SCALE, OFFSET)
    assert ops(model)[:3] == ["Cast", "Mul", "Add"]


def test_a_kernel_that_is_computed_is_not_folded_into():
    model = stem(("y = Conv <strides = [2, 2]> (p, kernel,", "k = Neg (kernel) y = Conv <strides = [2, 2]> (p, k,"))
    assert not take_pixels(model, "x", SCALE, OFFSET)
    model = stem(
        ("y = Conv <strides = [2, 2]> (p, kernel, bias)", "b = Neg (bias) y = Conv <strides = [2, 2]> (p, kernel, b)")
    )
    assert not take_pixels(model, "x", SCALE, OFFSET)
