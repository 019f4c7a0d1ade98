"""Engines that no conversion of ours made: checked by themselves, against each other, and against their graph."""

import types

import numpy as np
import onnx
import pytest
import simulated_gpu
from block_engine import RANGE
from engine_graphs import block

from vit_convert.engine import __main__ as command
from vit_convert.engine.__main__ import main
from vit_convert.engine.foreign import _image_size, _signature


@pytest.fixture
def plan(gpu, tmp_path, monkeypatch):
    """Writes a plan without a sidecar; its graph is tmp_path/model.onnx."""
    monkeypatch.setattr(command, "load_backend", lambda name, **_: gpu[0])
    graph = block(tmp_path / "model.onnx")

    def make(name="one", **options):
        path = simulated_gpu.write_plan(tmp_path / f"{name}.plan", graph, [RANGE], **options)
        (tmp_path / f"{name}.plan.json").unlink()
        return path

    return make


def verify(*words):
    return main(["engine", "verify", *words])


def test_a_right_engine(plan, tmp_path, capsys):
    words = [f"--plan={plan()},{plan('two')}", f"--onnx={tmp_path / 'model.onnx'}", "--precision=fp32"]
    assert verify(*words) == 0
    said = capsys.readouterr().out
    assert said.count("passed") == 10 and "its graph" in said and "the first build" in said  # 4 each, and one more each


@pytest.mark.parametrize(
    ("options", "said"),
    [({"error": 1.0}, "(its graph)"), ({"by_place": 1.0}, "(identical rows)")],
    ids=["error", "by place"],
)
def test_a_wrong_engine(plan, tmp_path, capsys, options, said):
    assert verify(f"--plan={plan(**options)}", f"--onnx={tmp_path / 'model.onnx'}", "--precision=fp32") == 5
    assert said in capsys.readouterr().err


def test_two_builds_that_differ(plan, capsys):
    assert verify(f"--plan={plan()},{plan('two', error=1.0)}", "--precision=fp32") == 5
    assert "two.plan: " in (said := capsys.readouterr().err) and "(the first build)" in said


def test_mistakes_of_usage(plan, tmp_path, capsys):
    assert verify(f"--plan={tmp_path}/none.plan") == 2
    assert "none.plan: there is no such file" in capsys.readouterr().err
    assert verify(str(tmp_path), f"--plan={plan()}") == 2
    assert main(["engine", "verify", f"--onnx={tmp_path}/model.onnx"]) == 2
    assert "belong to verify without a bundle" in capsys.readouterr().err


def test_a_graph_of_another_model(plan, tmp_path, capsys):
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Relu", ["x"], ["y"])],
            "other",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 2])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 2])],
        )
    )
    onnx.save(model, tmp_path / "other.onnx")
    assert verify(f"--plan={plan()}", f"--onnx={tmp_path / 'other.onnx'}") == 8
    assert "other.onnx: onnxruntime:" in capsys.readouterr().err


def engine_of(optimal, **others):
    """An engine whose first input has this optimal shape in its last profile."""
    spec = [types.SimpleNamespace(name="x", dtype=np.dtype(np.float32), shape=(-1, *optimal[1:]))]
    spec += [types.SimpleNamespace(name=n, dtype=np.dtype(np.int32), shape=shape) for n, shape in others.items()]
    ranges = [types.SimpleNamespace(optimal=(1, 2, 2, 3)), types.SimpleNamespace(optimal=optimal)]
    outputs = [types.SimpleNamespace(name="y", dtype=np.dtype(np.float16))]
    return types.SimpleNamespace(inputs=spec, outputs=outputs, leading=spec[0], ranges=ranges)


@pytest.mark.parametrize(
    ("optimal", "layout", "size"),
    [
        ((4, 8, 12, 3), "NHWC", (8, 12)),
        ((4, 3, 8, 12), "NCHW", (8, 12)),
        ((4, 3, 8, 3), "NHWC", (3, 8)),  # as it is here, where both fit
        ((4, 8, 12, 4), "", ()),
        ((4, 3), "", ()),
        ((4, 3, 8), "", ()),
        ((4, 2, 8, 12, 3), "", ()),
    ],
)
def test_what_an_engine_takes_is_told_by_its_shape(optimal, layout, size):
    found = _signature(engine_of(optimal, mask=(-1, 7)))
    assert [(t.name, t.dtype, t.shape, t.layout) for t in found.inputs] == [
        ("x", "float32", ("batch", *optimal[1:]), layout),
        ("mask", "int32", ("batch", 7), ""),
    ]
    assert [(t.name, t.dtype) for t in found.outputs] == [("y", "float16")]
    assert _image_size(engine_of(optimal)) == size
