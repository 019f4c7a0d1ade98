"""What a traced function keeps: its inputs with their types, its outputs in their order, and parameters by their
names."""

import logging

import numpy as np
import onnx_ir as ir
import pytest
from export_graphs import run

from vit_convert.core.errors import ExportError
from vit_convert.core.signature import Tensor
from vit_convert.export import trace as module
from vit_convert.export import weights
from vit_convert.export.trace import trace

SHAPES = {"table/kernel": (7, 4), "scale": (4,)}
INPUTS = (Tensor("images", "float32", ("batch", 2, 4)), Tensor("tokens", "int32", ("batch", 3)))
PARAMS = {
    name: np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()
}


def apply(leaves, images, tokens):
    scaled = images * leaves["scale"]
    return {"sum": scaled.sum((1, 2)), "rows": leaves["table/kernel"][tokens], "unasked": scaled}


@pytest.fixture(scope="module")
def traced():
    return trace(apply, SHAPES, INPUTS, ["rows", "sum"], 18)


def test_inputs_outputs_and_parameters(traced):
    graph = traced.graph
    assert traced.opset_imports[""] == 18
    # parameters are no inputs: they have names and shapes, and no values yet
    assert [(value.name, value.dtype, list(value.shape)[1:]) for value in graph.inputs] == [
        ("images", ir.DataType.FLOAT, [2, 4]),
        ("tokens", ir.DataType.INT32, [3]),
    ]
    assert [value.name for value in graph.outputs] == ["rows", "sum"]
    named = {name: value for name, value in graph.initializers.items() if name in SHAPES}
    assert {name: tuple(value.shape.numpy()) for name, value in named.items()} == SHAPES
    assert all(value.const_value is None and value.dtype == ir.DataType.FLOAT for value in named.values())


def test_it_computes_the_function(traced):
    weights.describe(traced)
    weights.bind(traced, PARAMS)
    images = np.random.default_rng(0).standard_normal((5, 2, 4)).astype(np.float32)
    tokens = np.array([[0, 6, 3]] * 5, np.int32)
    rows, total = run(traced, {"images": images, "tokens": tokens})
    np.testing.assert_array_equal(rows, PARAMS["table/kernel"][tokens])
    np.testing.assert_allclose(total, (images * PARAMS["scale"]).sum((1, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("error", [ValueError("why not"), SystemExit(3)])
def test_what_a_function_raises_is_said(error):
    def fails(leaves, images):
        raise error

    with pytest.raises(ExportError, match=rf"jax2onnx could not trace the model: {type(error).__name__}") as caught:
        trace(fails, {}, INPUTS[:1], ["sum"], 18)
    assert "jax2onnx lists the supported ones" in caught.value.fix
    assert caught.value.__cause__ is not None


def test_an_interrupt_passes():
    def interrupted(leaves, images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(interrupted, {}, INPUTS[:1], ["sum"], 18)


def test_plugins_are_registered_once_and_without_examples(monkeypatch):
    """jax2onnx's own discovery would compile random models, and tell of them."""
    from jax2onnx.plugins import plugin_system

    imported, log = [], logging.getLogger("jax2onnx")
    monkeypatch.setattr(plugin_system, "_already_imported_plugins", False)
    monkeypatch.setattr(plugin_system, "_import_tree", lambda folder, name: imported.append((folder.name, name)))
    monkeypatch.setattr(log, "level", log.level)
    log.setLevel(logging.WARNING)
    for _ in range(2):
        module.load_plugins()
    assert imported == [("jax", "jax2onnx.plugins.jax"), ("flax", "jax2onnx.plugins.flax")]
    assert log.level == logging.ERROR and plugin_system._already_imported_plugins


def test_they_are_registered_before_anything_is_traced(monkeypatch):
    def stop():
        raise KeyboardInterrupt("before")

    monkeypatch.setattr(module, "load_plugins", stop)
    with pytest.raises(KeyboardInterrupt, match="before"):
        trace(apply, SHAPES, INPUTS, ["sum"], 18)
