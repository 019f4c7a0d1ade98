"""Engines that no conversion of ours made: checked by themselves, against each other, and against their graph."""

import onnx
import pytest
import simulated_gpu
from block_engine import RANGE
from engine_graphs import block

from vit_convert.engine import __main__ as command
from vit_convert.engine.__main__ import main


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
