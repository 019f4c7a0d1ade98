"""What the export stage is asked for, what it writes and what it removes; the exporter is played by a script."""

import contextlib
import dataclasses
import json
import types

import pytest
from stage_context import change, make_context, write_graph

from vit_convert.core.errors import ExportError, UsageError
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.core.stage_results import RuleCount
from vit_convert.export.exporter import ExportReport
from vit_convert.stages import export as module
from vit_convert.stages.export import EXPORT, export

SIGNATURE = Signature(
    (Tensor("images", "float32", ("batch", 4, 4, 3), "NHWC"),), (Output("logits", "float32", ("batch", 5)),)
)
RANGE = {"smallest": [2, 2], "optimal": [4, 4], "largest": [8, 8]}
REPORT = ExportReport(**{
    **{field.name: 0 for field in dataclasses.fields(ExportReport)}, "opset": 17, "num_nodes": 186,
    "nodes_per_block": 29,
    "rules": (RuleCount("Gelu", 4), RuleCount("Dense", 3)), "taps": ("block_00",), "pooled_token": None,
})  # fmt: skip


@pytest.fixture
def context(tmp_path, monkeypatch):
    found = make_context(tmp_path / "b")
    change(found, "checkpoint", patch_size=2, attentions=[[64, 197]])
    found.config.target = "trt8"
    found.exported = []

    def export_model(model, path, *, target, **options):
        found.exported.append((path.name, target, options))
        path.parent.mkdir(exist_ok=True)
        for file in (path, path.with_name(f"{path.name}.data")):
            file.write_text(target)
        return REPORT

    monkeypatch.setattr("vit_convert.export.exporter.export_model", export_model)
    monkeypatch.setattr("vit_convert.export.targets.target_named", lambda name, *, dynamic: f"{name} {dynamic}")
    monkeypatch.setattr("vit_convert.export.targets.lowering_named", lambda name, lowering: f"{name} {lowering}")
    monkeypatch.setattr(module, "model_of", lambda context: types.SimpleNamespace(signature=SIGNATURE, name="mine"))
    return found


def names(context):
    return sorted(path.relative_to(context.bundle.root).as_posix() for path in context.bundle.root.rglob("*.onnx*"))


@pytest.mark.parametrize(
    ("config", "more", "expected"),
    [
        ({}, {}, {"layout": "NHWC", "taps": False, "dynamic_patch": 0, "pixels": None}),
        ({"layout": "NCHW", "taps": True}, {}, {"layout": "NCHW", "taps": True, "dynamic_patch": 0, "pixels": None}),
        ({}, {"image_range": RANGE}, {"layout": "NHWC", "taps": False, "dynamic_patch": 2, "pixels": None}),
    ],
)
def test_what_the_graph_is_asked_to_be(context, config, more, expected):
    context.config.precision = "fp32"
    context.config.update(config)
    change(context, "checkpoint", **more)
    found = export(context)
    ((name, target, options),) = context.exported
    assert (name, target) == ("model.onnx", f"trt8 {bool(more)}")
    assert {key: options[key] for key in expected} == expected
    assert found.summary == "186 nodes, 29 a block, 7 substitutions, opset 17"
    assert (found.target, found.lowerings, found.lowering) == ("trt8", {}, "")
    saved = Signature.from_dict(json.loads(context.bundle.signature.read_text()))
    assert saved == SIGNATURE.of_graph(config.get("layout", "NHWC"), dynamic=bool(more))


def test_pixels_enter_by_the_preprocessings_numbers(context):
    """x / 255 less the mean over std, as one product and one sum: mean and std are those of the fixture."""
    context.config.input = "uint8"
    export(context)
    scale, offset = context.exported[0][2]["pixels"]
    assert [float(value) for value in scale] == pytest.approx([1 / 255 / std for std in (0.5, 0.25, 1.0)])
    assert [float(value) for value in offset] == pytest.approx([-1.0, -1.0, 0.0])
    assert Signature.from_dict(json.loads(context.bundle.signature.read_text())).inputs[0].dtype == "uint8"


def test_lowerings_are_written_and_those_not_asked_for_removed(context):
    context.config.precision = "fp32"
    context.config.lowerings = ("matmul", "primitives")
    found = export(context)
    assert {name: row.num_nodes for name, row in found.lowerings.items()} == {"matmul": 186, "primitives": 186}
    assert found.summary.endswith("; also as matmul, primitives")
    assert [row[:2] for row in context.exported[1:]] == [
        ("matmul.onnx", "trt8 matmul"),
        ("primitives.onnx", "trt8 primitives"),
    ]
    (context.bundle.lowerings / "mine.txt").write_text("a user's")
    context.config.lowerings = ("primitives",)
    export(context)
    assert names(context) == [
        "lowerings/primitives.onnx",
        "lowerings/primitives.onnx.data",
        "model.onnx",
        "model.onnx.data",
    ]
    assert (context.bundle.lowerings / "mine.txt").exists()
    outputs = {path.relative_to(context.bundle.root).as_posix() for path in EXPORT.outputs(context)}
    assert outputs == {*names(context), "signature.json"}


@pytest.mark.parametrize(
    ("precision", "target", "attentions", "more", "advised"),
    [
        ("fp16", "trt8", [[64, 197]], {}, ("plugin",)),
        ("fp32", "trt8", [[64, 197]], {}, ()),  # it is for fp16
        ("fp16", "trt10", [[64, 197]], {}, ()),  # it is TensorRT 8's
        ("fp16", "trt8", [], {}, ()),  # nothing that it computes
        ("fp16", "trt8", [[64, 197], [20, 197]], {}, ()),  # one that it has no kernel for
        ("fp16", "trt8", [[64, 197]], {"image_range": RANGE}, ()),
        ("fp16", "trt8", [[64, 50]], {"group_norms": [64, 2048]}, ("groupnorm", "plugin")),
        ("fp16", "trt8", [[80, 50]], {"group_norms": [64]}, ("groupnorm",)),
        ("fp16", "trt8", [[64, 50]], {"group_norms": [64, 96]}, ("plugin",)),  # 3 channels a group: no kernel
        ("fp16", "trt10", [[64, 50]], {"group_norms": [64]}, ()),
        ("fp16", "trt8", [[64, 50]], {"group_norms": [64], "image_range": RANGE}, ()),
    ],
)
def test_lowerings_are_advised_where_they_fit_all_that_they_compute(
    context, precision, target, attentions, more, advised
):
    context.config.precision, context.config.target = precision, target
    change(context, "checkpoint", attentions=attentions, **more)
    assert module._advised(context) == advised
    inputs = EXPORT.inputs(context)
    assert inputs[:4] == [target, "NHWC", False, "float32"] and inputs[4] == list(advised)


def test_a_hybrid_is_written_for_our_kernels_and_for_a_host_without_them(context):
    context.config.precision = "fp16"
    change(context, "checkpoint", attentions=[[64, 50]], group_norms=[64, 256])
    found = export(context)
    assert found.lowering == "groupnorm" and list(found.lowerings) == ["groupnorm", "plugin"]
    context.config.engine.lowering = "groupnorm"  # by name: nothing to give way to
    assert list(export(context).lowerings) == ["groupnorm"]


def test_names_of_blocks_are_looked_up_at_once(context):
    write_graph(context.bundle.onnx())
    module._require_names(context)  # none are given
    context.config.keep_fp16 = ("block_07",)
    with pytest.raises(UsageError, match="block_07"):
        module._require_names(context)


@pytest.mark.parametrize("own", [True, False])
def test_an_error_of_a_users_own_model_is_the_exports(context, monkeypatch, own):
    def fails(*arguments, **options):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("vit_convert.export.exporter.export_model", fails)
    context.config.model = (lambda: None) if own else None
    expected = (
        pytest.raises(ExportError, match=r"config\.model: model\.onnx of mine")
        if own
        else pytest.raises(ZeroDivisionError)
    )
    with expected, contextlib.nullcontext():
        export(context)
