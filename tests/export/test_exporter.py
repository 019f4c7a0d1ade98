"""What an export writes and says of it, on a model of two inputs and four small blocks, computed in numpy."""

import collections
import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from vit_convert.core import warm
from vit_convert.core.errors import ExportError
from vit_convert.core.model import Model
from vit_convert.core.onnx_file import BLOCKS_ALONE
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.core.stack import Stack
from vit_convert.export.exporter import export_model
from vit_convert.export.targets import TARGETS, target_named

DEPTH, WIDTH, WORDS, SIDE = 4, 6, 9, 4
STACK = Stack("block_{}/", DEPTH)
IMAGES = Tensor("images", "float32", ("batch", SIDE, SIDE, 3), "NHWC")
TOKENS = Tensor("tokens", "int32", ("batch", 5), below=WORDS)
TEXT = dataclasses.replace(TOKENS, start=0, end=1, pad=2)
NUMBERS = np.random.default_rng(0)
PARAMS = {
    "pixels": NUMBERS.standard_normal((3, WIDTH)).astype(np.float32),
    "words": NUMBERS.standard_normal((WORDS, WIDTH)).astype(np.float32),
    **{f"block_{i}/w": NUMBERS.standard_normal((WIDTH, WIDTH)).astype(np.float32) for i in range(DEPTH)},
}
FED = {
    "images": NUMBERS.uniform(-1, 1, (3, SIDE, SIDE, 3)).astype(np.float32),
    "tokens": NUMBERS.integers(0, WORDS, (3, 5)).astype(np.int32),
}
RTX = TARGETS["rtx"]


def forward(module, depth, params, tokens, images):
    """The stream behind every block."""
    x = images.mean((1, 2)) @ params["pixels"] + params["words"][tokens].mean(1)
    streams = {}
    for i in range(depth):
        x = streams[STACK.tap(i)] = x + module.tanh(x @ params[f"block_{i}/w"])
    return streams


def model(*, stacks=(STACK,), kind=None, seed=0, tokens_first=True):
    """Of which two blocks are traced where it has a stack, else all."""
    depth = STACK.traced if stacks else DEPTH
    inputs = (TOKENS, IMAGES) if tokens_first else (IMAGES, TOKENS)

    def apply(params, *inputs):
        streams = forward(jnp, depth, params, *(inputs if tokens_first else inputs[::-1]))
        return {"y": streams[STACK.tap(depth - 1)] * 2.0, **streams}

    rng = np.random.default_rng(seed)
    params = {name: array + np.float32(seed * rng.random()) for name, array in PARAMS.items()}
    taps, beyond = [STACK.tap(i) for i in range(depth)], [f"block_{i}/w" for i in range(depth, DEPTH)]
    return Model(
        signature=Signature(inputs, (Output("y", "float32", ("batch", WIDTH)),)),
        params=params,
        taps=[STACK.tap(i) for i in range(DEPTH)],
        apply=apply,
        traced_shapes={name: array.shape for name, array in PARAMS.items() if name not in beyond},
        traced_taps=taps,
        run=None,
        stacks=stacks,
        kind=kind,
    )


def right(found, images=FED["images"]):
    """What a model gives and every stream of it, in float64."""
    params = {name: array.astype(np.float64) for name, array in found.params.items()}
    streams = forward(np, DEPTH, params, FED["tokens"], images.astype(np.float64))
    return {"y": 2 * streams["block_03"], **streams}


def run(path, images=FED["images"]):
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images, "tokens": FED["tokens"]})))


def close(found, expected):
    """At 1e-5 of the scale: float32 sums of six products, four blocks in a row."""
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("stacks", [(STACK,), ()])
@pytest.mark.parametrize("taps", [False, True])
def test_what_the_report_says(tmp_path, stacks, taps):
    path, given = tmp_path / "model.onnx", model(stacks=stacks)
    report = export_model(given, path, target=RTX, taps=taps)
    written = ir.load(path)
    nodes = list(written.graph)
    assert (report.opset, written.opset_imports[""]) == (RTX.opset, RTX.opset)
    assert report.num_nodes == len(nodes) < report.nodes_traced + (DEPTH - 2) * 10
    assert report.num_shapes == sum(node.op_type == "Shape" for node in nodes)
    blocks = collections.Counter(node.name.split("/")[0] for node in nodes if node.name.startswith("block_"))
    assert report.nodes_per_block == (max(blocks.values()) if stacks else 0)
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert report.taps == ("block_00", "block_01", "block_02", "block_03") and report.pooled_token is None
    assert [rule.rule for rule in report.rules[: len(RTX.rules)]] == [rule.__name__ for rule in RTX.rules]
    assert (BLOCKS_ALONE in written.metadata_props) == bool(stacks)
    found = run(path)
    assert [*found] == (["y", *report.taps] if taps else ["y"])
    for name, values in found.items():
        close(values, right(given)[name])


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_images_alone_are_turned(tmp_path, tokens_first, layout):
    given = model(tokens_first=tokens_first)
    export_model(given, tmp_path / "model.onnx", target=RTX, layout=layout)
    graph = ir.load(tmp_path / "model.onnx").graph
    order = ["tokens", "images"] if tokens_first else ["images", "tokens"]
    assert [value.name for value in graph.inputs] == order
    turned = FED["images"] if layout == "NHWC" else np.ascontiguousarray(FED["images"].transpose(0, 3, 1, 2))
    close(run(tmp_path / "model.onnx", turned)["y"], right(given)["y"])


def test_a_model_without_images_has_no_layout(tmp_path):
    given = dataclasses.replace(
        model(),
        signature=Signature((TOKENS,), (Output("y", "float32", ("batch", WIDTH)),)),
        apply=lambda params, tokens: {"y": params["words"][tokens].mean(1)},
        traced_shapes={"words": (WORDS, WIDTH)},
        traced_taps=[],
        taps=[],
        stacks=(),
    )
    scale = np.ones(3, np.float32)
    export_model(given, tmp_path / "model.onnx", target=RTX, layout="NCHW", pixels=(scale, scale))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    close(session.run(None, {"tokens": FED["tokens"]})[0], PARAMS["words"][FED["tokens"]].astype(np.float64).mean(1))


@pytest.mark.parametrize(("inputs", "table"), [((IMAGES,), None), ((TOKENS,), None), ((TOKENS,), "words")])
def test_images_of_any_size_need_images_and_a_table_of_places(tmp_path, inputs, table):
    given = dataclasses.replace(model(), signature=Signature(inputs, model().signature.outputs), position_table=table)
    with pytest.raises(ExportError, match="no position table") as error:
        export_model(given, tmp_path / "model.onnx", target=RTX, dynamic_patch=2)
    assert error.value.fix == "Give one size." and not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(("inputs", "table"), [((IMAGES,), "words"), ((TEXT,), None)])
def test_texts_of_any_length_need_texts_and_a_table_of_places(tmp_path, inputs, table):
    given = dataclasses.replace(model(), signature=Signature(inputs, model().signature.outputs), position_table=table)
    with pytest.raises(ExportError, match="takes no text with a position table, so its length is fixed"):
        export_model(given, tmp_path / "model.onnx", target=RTX, dynamic_length=True)
    assert not (tmp_path / "model.onnx").exists()


def test_texts_of_any_length(tmp_path):
    params = {"words": PARAMS["words"], "places": NUMBERS.standard_normal((1, 5, WIDTH)).astype(np.float32)}
    given = Model(
        signature=Signature((TEXT,), (Output("y", "float32", ("batch", 5, WIDTH)),)),
        params=params,
        taps=[],
        apply=lambda params, tokens: {"y": jnp.tanh(params["words"][tokens] + params["places"])},
        traced_shapes={name: array.shape for name, array in params.items()},
        traced_taps=[],
        run=None,
        position_table="places",
    )
    export_model(given, tmp_path / "model.onnx", target=target_named("rtx", dynamic=True), dynamic_length=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for length in (2, 5):
        tokens = FED["tokens"][:, :length]
        expected = np.tanh(params["words"].astype(np.float64)[tokens] + params["places"][:, :length])
        close(session.run(None, {"tokens": tokens})[0], expected)


def test_images_of_any_size(tmp_path):
    """Its table rises evenly along rows and columns, and so it does at every size, corners on corners."""
    rise, kernel = NUMBERS.standard_normal((2, WIDTH)), NUMBERS.standard_normal((2, 2, 3, WIDTH)).astype(np.float32)

    def table(rows, columns):
        down, right = np.linspace(0, 1, rows)[:, None, None], np.linspace(0, 1, columns)[:, None]
        return (down * rise[0] + right * rise[1]).reshape(1, -1, WIDTH)

    def apply(params, images):
        x = jax.lax.conv_general_dilated(
            images, params["kernel"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = x.reshape(-1, 8, WIDTH) + params["table"]
        return {"y": jnp.tanh(x)}

    params = {"kernel": kernel, "table": table(4, 2).astype(np.float32)}
    given = Model(
        signature=Signature(
            (dataclasses.replace(IMAGES, shape=("batch", 8, 4, 3)),), (Output("y", "float32", ("batch", 8, WIDTH)),)
        ),
        params=params,
        taps=[],
        apply=apply,
        traced_shapes={name: array.shape for name, array in params.items()},
        traced_taps=[],
        run=None,
        position_table="table",
    )
    export_model(given, tmp_path / "model.onnx", target=target_named("rtx", dynamic=True), dynamic_patch=2)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for rows, columns in ((4, 2), (2, 6)):
        images = NUMBERS.uniform(-1, 1, (2, 2 * rows, 2 * columns, 3)).astype(np.float32)
        cells = images.reshape(2, rows, 2, columns, 2, 3).astype(np.float64)
        x = np.einsum("brpcqd,pqdw->brcw", cells, kernel).reshape(2, -1, WIDTH)
        close(session.run(None, {"images": images})[0], np.tanh(x + table(rows, columns)))


@pytest.mark.parametrize("times", [1.0, 1.5])
def test_a_block_has_as_many_nodes_as_its_stack_allows(tmp_path, times):
    given = model(stacks=(dataclasses.replace(STACK, nodes=times),))
    count = export_model(model(), tmp_path / "model.onnx", target=RTX).nodes_per_block
    fitting = dataclasses.replace(RTX, max_nodes_per_block=count / times)
    export_model(given, tmp_path / "fits.onnx", target=fitting)
    tight = dataclasses.replace(RTX, max_nodes_per_block=(count - 0.5) / times)
    with pytest.raises(ExportError, match=rf"{count} nodes in a block of block_0/…, target rtx allows {count - 0.5:g}"):
        export_model(given, tmp_path / "grew.onnx", target=tight)
    assert not (tmp_path / "grew.onnx").exists()


def test_models_of_one_kind_share_a_graph_only_where_all_is_the_same(tmp_path):
    """In a process that keeps graphs: what differs is the weights, or the constants that pixels are normalised by."""
    pixels = {name: (np.full(3, scale, np.float32), np.zeros(3, np.float32)) for name, scale in (("a", 1), ("b", 0.5))}
    images = np.random.default_rng(1).integers(0, 255, FED["images"].shape, np.uint8)
    warm.keep()
    try:
        for seed, name in ((0, "a"), (1, "a"), (0, "b"), (1, "b")):
            given = model(kind="four blocks", seed=seed)
            export_model(given, tmp_path / "model.onnx", target=RTX, pixels=pixels[name])
            close(run(tmp_path / "model.onnx", images)["y"], right(given, images * pixels[name][0][0])["y"])
            report = export_model(given, tmp_path / "taps.onnx", target=RTX, taps=True)
            assert report.taps == ("block_00", "block_01", "block_02", "block_03")
            close(run(tmp_path / "taps.onnx")["block_01"], right(given)["block_01"])
        for factor in (1.0, 3.0):  # of which it is not said what kind they are
            given = model()
            given = dataclasses.replace(
                given, apply=lambda *args, f=factor, g=given: {**g.apply(*args), "y": g.apply(*args)["y"] * f}
            )
            export_model(given, tmp_path / "model.onnx", target=RTX)
            close(run(tmp_path / "model.onnx")["y"], factor * right(given)["y"])
    finally:
        warm.keep(False)


@pytest.mark.parametrize(
    ("keep", "kind", "traces"), [(True, "k", 1), (True, None, 3), (False, "k", 3), (False, None, 3)]
)
def test_a_graph_is_traced_once_where_it_is_kept(tmp_path, keep, kind, traces):
    asked, plain = [], model()

    def apply(*args):
        asked.append(1)
        return plain.apply(*args)

    warm.keep(keep)
    try:
        found = []
        for _ in range(3):
            before = len(asked)
            export_model(dataclasses.replace(plain, apply=apply, kind=kind), tmp_path / "model.onnx", target=RTX)
            found.append(len(asked) > before)
        assert sum(found) == traces and found[0]
    finally:
        warm.keep(False)


def test_nobody_is_warned_of_weights_that_have_no_value_yet(tmp_path, caplog):
    logging.getLogger("onnx_ir").setLevel(logging.WARNING)
    export_model(model(), tmp_path / "model.onnx", target=RTX)
    assert not [record for record in caplog.records if record.name.startswith("onnx_ir")]
