"""What inspection says, word for word: commands of trtexec, groups of findings, fusions, and memory of small graphs."""

import dataclasses

import pytest
from test_findings import graph, node

from vit_convert.core.config import default_config
from vit_convert.engine.inspection.command import _few, _fusion_lines, _of_file, _verdict
from vit_convert.engine.inspection.estimate import Memory, estimate
from vit_convert.engine.inspection.findings import REFUSED, UNKNOWN, Finding
from vit_convert.engine.inspection.fusions import Fusion
from vit_convert.engine.inspection.onnx_wire import Value
from vit_convert.engine.inspection.trtexec import Asked, trtexec_line

SHAPES = {"x": ((1, 4), (8, 4), (16, 4)), "m": ((1,), (8,), (16,))}
PROFILE = "--minShapes=x:1x4,m:1 --optShapes=x:8x4,m:8 --maxShapes=x:16x4,m:16"


@pytest.mark.parametrize(
    ("target", "asked", "expected"),
    [
        ("trt8", Asked("fp32"), "--memPoolSize=workspace:4096 --builderOptimizationLevel=3 --noTF32"),
        ("trt8", Asked("fp16"), "--memPoolSize=workspace:4096 --builderOptimizationLevel=3 --fp16 --noTF32"),
        ("trt8", Asked("int8"), "--memPoolSize=workspace:4096 --builderOptimizationLevel=3 --fp16 --int8 --noTF32"),
        ("trt8", Asked("fp32", 0.5, 5, tf32=True), "--memPoolSize=workspace:512 --builderOptimizationLevel=5"),
        (
            "trt10",
            Asked("int8", 1.0),
            "--memPoolSize=workspace:1024 --builderOptimizationLevel=3 --stronglyTyped --noTF32",
        ),
        (
            "trt11",
            Asked("fp16", version_compatible=True, hardware_compatible=True),
            "--memPoolSize=workspace:4096 --builderOptimizationLevel=3 --noTF32 --versionCompatible "
            "--hardwareCompatibilityLevel=ampere+",
        ),
        (
            "rtx",
            Asked("fp16", version_compatible=True, hardware_compatible=True),
            "--memPoolSize=workspace:4096 --builderOptimizationLevel=3 --noTF32",
        ),
    ],
)
def test_trtexec_word_for_word(target, asked, expected):
    tool = "tensorrt_rtx" if target == "rtx" else "trtexec"
    for shapes, profile in (({}, ""), (SHAPES, f"{PROFILE} ")):
        line = trtexec_line(target, "m.onnx", shapes, asked)
        assert line == f"{tool} --onnx=m.onnx --saveEngine=m.plan {profile}{expected} --skipInference"


def test_findings_of_one_reason_stand_together():
    found = [Finding(REFUSED, f"n{i}", "why", "Do that.", "Op") for i in range(5)]
    found[2:2] = [Finding(UNKNOWN, "graph", "opset 9"), dataclasses.replace(found[0], op="Other")]
    assert list(_few(found)) == [
        "will not build: Op: why: n0, n1, n2 and 2 more. Do that.",
        "not known: opset 9: graph",
        "will not build: Other: why: n0. Do that.",
    ]
    assert list(_few(found[-3:])) == ["will not build: Op: why: n2, n3, n4. Do that."]
    assert list(_few([])) == []


def test_fusions_are_counted_by_kind():
    rows = [Fusion("attention", "a", True, "yes"), Fusion("GELU", "g", True, "yes")]
    rows += [Fusion("attention", name, False, why) for name, why in (("b", "width"), ("c", "width"), ("d", "type"))]
    assert list(_fusion_lines(rows)) == [
        "attention: 1 of 4 expected to fuse; not: width; not: type",
        "GELU: 1 of 1 expected to fuse",
    ]


def test_a_workspace_is_held_against_the_largest_value():
    memory = Memory(weights=1, activations=1000, largest=100, largest_name="a", building=4)
    assert _verdict(memory, 100) == "enough for that" and _verdict(memory, 99).startswith("less than that")


@pytest.mark.parametrize(
    ("inputs", "sizes", "shapes"),
    [
        ({"x": ("n", 4, 4)}, {"n": 16}, {"x": ([1, 4, 4], [8, 4, 4], [16, 4, 4])}),
        ({"x": ("n", 4), "m": (7,)}, {"n": 16}, {"x": ([1, 4], [8, 4], [16, 4])}),
        ({"x": (2, 4)}, {}, {}),
        ({"x": ("n", "side", 4)}, {"n": 16}, None),  # nothing tells the side
        ({"x": ("n", "side"), "m": ("n", 3)}, {"n": 16}, None),
        ({"x": None}, {}, None),  # the file does not say
    ],
)
def test_shapes_of_a_file_come_of_the_configs_batch(tmp_path, monkeypatch, inputs, sizes, shapes):
    config = default_config()
    config.batch.min, config.batch.opt, config.batch.max = 1, 8, 16
    values = {name: Value("float32", shape) for name, shape in inputs.items()}
    made = graph(node("Relu"), inputs=[*inputs], **values)
    monkeypatch.setattr("vit_convert.engine.inspection.command.read_graph", lambda path: made)
    found = _of_file(str(tmp_path / "m.onnx"), ["rtx"], config)
    assert (found.name, found.targets, found.sizes, found.shapes) == ("m.onnx", ["rtx"], sizes, shapes)


def floats(*names, dtype="float32", sides=(8,)):
    return {name: Value(dtype, sides) for name in names}


def test_views_take_no_memory_of_their_own():
    """A value, a view of it, and one made from the view: two of 32 bytes live at once, a third beside both views."""
    nodes = [node("Relu", "x", "a"), node("Reshape", "a s", "b"), node("Identity", "b", "c"), node("Sqrt", "c", "d")]
    found = estimate(graph(*nodes, inputs=["x"], outputs=["d"], **floats(*"xabcd")), {})
    assert (found.activations, found.largest, found.largest_name) == (64, 32, "a")
    again = estimate(graph(*nodes, node("Add", "b d", "y"), inputs=["x"], outputs=["y"], **floats(*"xabcdy")), {})
    assert again.activations == 96  # a, through its view, d and y
    kept = estimate(graph(*nodes, inputs=["x"], outputs=["d", "a"], **floats(*"xabcd")), {})
    assert kept.activations == 64


def test_a_flag_halves_float32_alone():
    for dtype, share in (("float32", 2), ("float64", 1), ("int64", 1), ("uint8", 1), ("float16", 1), ("bfloat16", 1)):
        made = graph(node("Relu", "x", "y"), inputs=["x"], weights=["w"], **floats("x", "y", "w", dtype=dtype))
        whole, half = estimate(made, {}), estimate(made, {}, half=True)
        assert (half.weights, half.activations) == (whole.weights // share, whole.activations // share)
        assert half.building == whole.building == 4 * whole.weights  # read as they are stored


def test_the_first_of_the_largest_is_named():
    sides = {"x": 2, "a": 4, "b": 9, "c": 9, "d": 3}
    values = {name: Value("float32", (count,)) for name, count in sides.items()}
    nodes = [node("Relu", x, y) for x, y in ("xa", "ab", "bc", "cd")]
    found = estimate(graph(*nodes, inputs=["x"], outputs=["d"], **values), {})
    assert (found.largest, found.largest_name, found.activations) == (36, "b", 72)
