"""Which graphs the quantize stage writes, what it says of their accuracy, and of what fp16 cannot hold."""

import json
import types

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from stage_context import change, forward, make_context, normalized, pixels, write_graph

from vit_convert.core.check_results import GraphCheck, LargestActivation, LoweredGraph
from vit_convert.core.errors import CheckError, UsageError
from vit_convert.stages import quantize as module
from vit_convert.stages.check import EXTREMES, check_precision
from vit_convert.stages.quantize import QUANTIZE, _largest_by_block, _lowered, _verdict, lower


@pytest.fixture
def context(tmp_path):
    found = make_context(tmp_path / "b")
    write_graph(found.bundle.onnx())
    return found


def ask(context, precision, target="rtx", **engine):
    context.config.precision, context.config.target = precision, target
    context.config.engine.update(engine)


@pytest.mark.parametrize(
    ("precision", "target", "engine", "graphs", "wanted"),
    [
        ("fp32", "rtx", {}, [], False),
        ("fp32,fp16", "rtx", {}, ["fp16"], True),
        ("fp32,fp16,int8", "trt10", {}, ["fp16", "int8"], True),
        ("fp32", "trt8", {}, [], False),
        ("fp32,fp16", "trt8", {}, [], True),  # a flag: no graph, and what it has to hold is measured
        ("fp32,fp16,int8", "trt8", {}, ["int8"], True),
        ("fp32,fp16,int8", "trt8", {"calibrator": True}, [], True),
        ("fp32,bf16", "trt11", {}, ["bf16"], True),
    ],
)
def test_which_graphs_are_written(context, precision, target, engine, graphs, wanted):
    ask(context, precision, target, **engine)
    assert sorted(_lowered(context)) == sorted(graphs)
    assert QUANTIZE.needed(context) is wanted
    names = [path.name for path in QUANTIZE.outputs(context)]
    assert sorted(names) == sorted(f"model.{name}.onnx{end}" for name in graphs for end in ("", ".data"))


def check(top1=None, passed=True, cosine=0.999):
    return GraphCheck.from_dict({"passed": passed, "cosine": cosine, **({} if top1 is None else {"top1": top1})})


@pytest.mark.parametrize(
    ("checks", "of_fp32", "against", "accurate", "drop", "text"),
    [
        ({"fp16": 80.0, "int8": 79.5}, 90.0, "fp16", True, 0.5,
         "int8 loses 0.50 points of top-1 against fp16 (79.50 % against 80.00 %), allowed 1"),
        ({"fp16": 80.0, "int8": 79.0}, 90.0, "fp16", True, 1.0,
         "int8 loses 1.00 points of top-1 against fp16 (79.00 % against 80.00 %), allowed 1"),
        ({"fp16": 80.0, "int8": 78.9}, 90.0, "fp16", False, 1.1,
         "int8 loses 1.10 points of top-1 against fp16 (78.90 % against 80.00 %), allowed 1"),
        ({"int8": 85.0}, 84.0, "fp32", True, -1.0,
         "int8 loses -1.00 points of top-1 against fp32 (85.00 % against 84.00 %), allowed 1"),
        ({"int8": 85.0}, None, "fp32", None, None,
         "int8: cosine to JAX 0.99900; without labelled images its accuracy is unknown"),
        ({"fp16": 80.0, "int8": None}, 90.0, "fp16", None, None,
         "int8: cosine to JAX 0.99900; without labelled images its accuracy is unknown"),
    ],
)  # fmt: skip
def test_what_a_lower_precision_costs(context, checks, of_fp32, against, accurate, drop, text):
    change(context, "check", passed=True, **({} if of_fp32 is None else {"top1": of_fp32}))
    found = _verdict(context, "int8", {name: check(top1) for name, top1 in checks.items()})
    assert (found.against, found.accurate, found.drop_points, found.text) == (against, accurate, drop, text)
    assert found.allowed_points == (None if drop is None else 1.0)
    assert found.top1 == (None if drop is None else checks["int8"])


def test_four_digits_of_a_loss_are_kept(context):
    change(context, "check", passed=True)
    found = _verdict(context, "int8", {"fp16": check(80.0), "int8": check(79.666666)})
    assert found.drop_points == 0.3333


def test_a_tower_has_no_accuracy_of_its_own(context):
    """Labelled images may be there all the same: with classes they judge the pair."""
    change(context, "check", passed=True)
    change(context, "checkpoint", pair={"family": "clip"})
    found = _verdict(context, "int8", {"int8": check()})
    assert (found.accurate, found.text) == (None, "int8: cosine to JAX 0.99900; its accuracy is that of both towers")


def test_one_that_missed_is_not_accurate_whatever_is_not_known(context):
    change(context, "check", passed=True)
    found = _verdict(context, "int8", {"int8": check(passed=False, cosine=0.5)})
    assert (found.accurate, found.text) == (False, "int8: cosine to JAX 0.50000")


@pytest.fixture
def stages(context, monkeypatch):
    """What writing and checking each precision comes to: its check, or the error of one that missed."""
    written = []

    def stages(**checks):
        def check_precision(context, precision):
            found = checks[precision]
            if not found.passed:
                error = CheckError(f"{precision} missed")
                error.result = found
                raise error
            return found

        def write(context, precision, activations):
            written.append(precision)
            return LoweredGraph(num_casts=len(precision))

        monkeypatch.setattr(module, "check_precision", check_precision)
        monkeypatch.setattr(module, "_write_graph", write)
        return written

    change(context, "check", passed=True, top1=90.0)
    return stages


def test_each_is_written_and_checked(context, stages):
    ask(context, "fp32,fp16,int8")
    written = stages(fp16=check(90.0, cosine=0.9999), int8=check(89.5, cosine=0.99))
    found = lower(context)
    assert sorted(written) == ["fp16", "int8"] and found.max_abs_activation is None
    assert {name: row.num_casts for name, row in found.checks.items()} == {"fp16": 4, "int8": 4}
    assert [*found.verdicts] == ["int8"] and found.verdicts["int8"].drop_points == 0.5
    assert {*found.summary.split("; ")} == {
        "fp16: cosine 0.999900, top-1 90.00 %", "int8: cosine 0.990000, top-1 89.50 %",
    }  # fmt: skip


def test_one_that_misses_does_not_hide_the_others(context, stages):
    ask(context, "fp32,fp16,int8")
    written = stages(fp16=check(10.0, passed=False, cosine=0.1), int8=check(89.5, cosine=0.99))
    with pytest.raises(CheckError, match="fp16 missed") as caught:
        lower(context)
    assert sorted(written) == ["fp16", "int8"]
    assert {name: row.passed for name, row in caught.value.result.checks.items()} == {"fp16": False, "int8": True}
    stages(fp16=check(passed=False), int8=check(passed=False))
    with pytest.raises(CheckError, match=f"{_lowered(context)[0]} missed"):  # the first that did
        lower(context)


def test_smoothing_is_checked_before_anything_is_quantized(context, stages):
    context.config.calibration.smooth = 0.5
    ask(context, "fp32,int8")
    written = stages(smooth=check(passed=False), int8=check(), fp16=check())
    with pytest.raises(CheckError, match="smooth missed"):
        lower(context)
    assert written == []
    ask(context, "fp32,fp16")
    stages(fp16=check(90.0))
    assert [*lower(context).checks] == ["fp16"]  # nothing is quantized: nothing was smoothed


def refer(context, scale=1.0):
    images = normalized(pixels(3)).astype(np.float32) * np.float32(scale)
    np.savez(context.bundle.reference, images=images)
    return images


@pytest.mark.parametrize(
    ("scale", "keep", "said", "to_keep"),
    [
        (1, (), "", ""),
        (1e6, (), "outside, w: up to", "('block_00', 'w')"),
        (1e6, ("w",), "outside: up to", "('w', 'block_00')"),
        (1, ("w",), "", ""),
    ],
)
def test_what_a_flag_of_fp16_has_to_hold(context, stages, scale, keep, said, to_keep):
    """The mean of each colour and the product behind it, which its weight names a block of, by a forward pass in
    float64; fp16 ends at 65504."""
    largest = {name: np.abs(value).max() for name, value in forward(refer(context, scale)).items()}
    ask(context, "fp32,fp16", "trt8")
    context.config.keep_fp32 = keep
    stages()
    found = lower(context)
    assert {block: (row.tensor, row.max_abs) for block, row in found.max_abs_activation.items()} == {
        "outside": ("block_00", pytest.approx(largest["block_00"], rel=1e-6)),
        "w": ("logits", pytest.approx(largest["logits"], rel=1e-5)),  # a sum of three products, in float32
    }
    assert found.summary == f"fp16 has to hold {max(row.max_abs for row in found.max_abs_activation.values()):.3g}"
    events = map(json.loads, context.bundle.events.read_text().splitlines()) if context.bundle.events.exists() else ()
    warnings = [event["text"] for event in events if event["event"] == "warning"]
    assert len(warnings) == bool(said)
    for text in warnings:
        tensor = "block_00" if keep or largest["block_00"] > largest["logits"] else "logits"
        assert text.startswith(f"{said} {largest[tensor]:.3g} ({tensor}), fp16 holds 65504")
        assert text.endswith(f'build with --config.keep_fp32="{to_keep}"')


def test_a_block_that_is_not_there_cannot_stay(context, stages):
    refer(context)
    ask(context, "fp32,fp16", "trt8")
    context.config.keep_fp32 = ("block_07",)
    stages()
    with pytest.raises(UsageError, match="block_07"):
        lower(context)


@pytest.fixture
def written(context, monkeypatch):
    """Writes a precision's graph; what it was made of, by whom."""

    def written(precision, lowering=""):
        made, amax = [], {"logits": 2.0}

        def typed(name):
            def change(model, **options):
                made.append((name, *sorted(options)))
                return types.SimpleNamespace(
                    model=model, overflowing={"w": 7e4}, islands=("w",), num_casts=3, num_subnormal=1
                )

            return change

        def quantize(model, calibration, sites, *, target, precision):
            made.append(("quantize", calibration, target, precision, [site.name for site in sites]))
            return model

        sites = [types.SimpleNamespace(name="head")]
        monkeypatch.setattr("vit_convert.quantize.half_precision.to_bf16", typed("bf16"))
        monkeypatch.setattr("vit_convert.quantize.half_precision.to_fp16", typed("fp16"))
        monkeypatch.setattr("vit_convert.quantize.qdq.quantize", quantize)
        monkeypatch.setattr("vit_convert.quantize.calibrate.Calibration.load", lambda path: path.name)
        monkeypatch.setattr(module, "_place", lambda context, model, precision: types.SimpleNamespace(sites=sites))
        monkeypatch.setattr(module, "unquantized", lambda context: lowering)
        monkeypatch.setattr(
            module, "_write_ranges", lambda context, lowering: made.append(("ranges", lowering)) or LoweredGraph()
        )
        blocks = {"w": LargestActivation(tensor="logits", max_abs=2.0)}
        found = module._write_graph(context, "".join(list(precision)), lambda graph: (amax, blocks))
        return found, made

    return written


@pytest.mark.parametrize(
    ("precision", "steps"),
    [
        ("fp16", [("fp16", "amax", "keep_fp32")]),
        ("bf16", [("bf16", "keep_fp32")]),
        ("int8", [("quantize", "calibration.json", "rtx", "int8", ["head"]), ("fp16", "amax", "keep_fp32")]),
        ("fp8", [("quantize", "calibration.json", "rtx", "fp8", ["head"]), ("fp16", "amax", "keep_fp32")]),
    ],
)
def test_how_a_graph_is_made(context, written, precision, steps):
    ask(context, f"fp32,{precision}")
    found, made = written(precision)
    assert made == steps and context.bundle.onnx(precision).exists()
    assert found.quantized == (("head",) if precision in ("int8", "fp8") else None) or found.quantized == ()
    assert (found.fp32_islands, found.num_casts, found.num_subnormal) == (("w",), 3, 1)
    assert found.max_abs_activation["w"].max_abs == 2.0
    assert "w: |w| reaches 7e+04, beyond fp16; it stays fp32" in context.bundle.events.read_text()


def test_tensorrt_8_gets_pairs_and_no_types(context, written):
    ask(context, "fp32,int8", "trt8")
    found, made = written("int8")
    assert [step[0] for step in made] == ["quantize"] and found.num_casts is None
    assert written("int8", lowering="fused")[1] == [("ranges", "fused")]
    assert written("fp16", lowering="fused")[1] == []  # whose graph is another's affair


def test_what_a_plan_limits(context, monkeypatch):
    asked = []
    monkeypatch.setattr("vit_convert.quantize.placement.place", lambda model, **options: asked.append(options))
    monkeypatch.setattr("vit_convert.quantize.precision_plan.read_plan", lambda path, precision: [path.name, precision])
    monkeypatch.setattr(module, "limits", lambda context, precision: {"keep_fp16": [precision], "quantize_only": []})
    ask(context, "fp32,int8")
    module._place(context, "model", "int8")
    context.config.plan.file = "plan.json"
    module._place(context, "model", "int8")
    context.config.plan.file, context.config.precision, context.config.calibration.attention = "", "auto", True
    module._place(context, "model", "int8")
    chosen = {"keep_fp16": ["int8"], "attention": False}
    assert asked == [
        {**chosen, "quantize_only": []}, {**chosen, "quantize_only": ["plan.json", "int8"]},
        {**chosen, "attention": True, "quantize_only": ["precision_plan.json", "int8"]},
    ]  # fmt: skip


def test_ranges_are_written_as_pairs_to_be_checked(context, monkeypatch):
    write_graph(context.bundle.lowering("fused.int8"))
    asked, site = [], types.SimpleNamespace(name="head")
    ranges = types.SimpleNamespace(thresholds={"x": 1.0})
    monkeypatch.setattr(
        "vit_convert.quantize.calibrate.Calibration.load", lambda path: asked.append(path.name) or ranges
    )
    monkeypatch.setattr(
        "vit_convert.quantize.ranged.sites_with_ranges", lambda model, found: asked.append(found) or [site]
    )
    monkeypatch.setattr("vit_convert.quantize.qdq.quantize",
                        lambda model, ranges, sites, *, target: asked.append((sites, target)) or model)  # fmt: skip
    found = module._write_ranges(context, "fused")
    assert asked == ["fused.ranges.json", {"x": 1.0}, ([site], "trt8")] and found.quantized == ("head",)
    assert context.bundle.onnx("int8").exists()


def node(*outputs):
    return ir.Node("", "Op", [], outputs=[ir.Value(name=name) for name in outputs])


def test_the_largest_of_each_block():
    a, b, c = node("x", "y"), node("z"), node("w")
    amax = {"x": 1.0, "y": 3.0, "z": 3.0}
    assert _largest_by_block({a: "block_00", b: "block_00", c: None}, amax) == {
        "block_00": LargestActivation(tensor="y", max_abs=3.0),  # the first of equal ones
        "outside": LargestActivation(tensor="w", max_abs=0.0),
    }


def test_what_it_depends_on(context, tmp_path):
    ask(context, "fp32,int8")
    found = [json.dumps(QUANTIZE.inputs(context))]
    context.config.plan.file = str(tmp_path / "plan.json")
    found.append(json.dumps(QUANTIZE.inputs(context)))
    for text in ("{}", '{"a": 1}'):  # by the plan's content
        (tmp_path / "plan.json").write_text(text)
        found.append(json.dumps(QUANTIZE.inputs(context)))
    context.config.keep_fp32 = ("head",)
    found.append(json.dumps(QUANTIZE.inputs(context)))
    context.config.check.int8_cosine = 0.5
    found.append(json.dumps(QUANTIZE.inputs(context)))
    context.config.target = "trt10"
    found.append(json.dumps(QUANTIZE.inputs(context)))
    assert len({*found}) == len(found)


def write_blocks(context):
    """A graph of equal blocks on images, whose middle value is a reshaped one, and its reference."""
    lines = "".join(
        f"s{i} = Mul (block_{i - 1:02d}, scale) r{i} = Reshape (s{i}, shape) block_{i:02d} = Neg (r{i})\n"
        for i in range(1, 4)
    )
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    g (float[N, 4, 4, 3] images) => (float[N, 3] logits) <int64[2] axes = {{1, 2}}, float[3] scale = {{1, 2, 3}},
        int64[2] shape = {{0, 3}}, float two = {{2}}> {{
        block_00 = ReduceMean <keepdims = 0> (images, axes)
        {lines} logits = Mul (block_03, two) }}"""
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    onnx.save(model, context.bundle.onnx())
    images = normalized(pixels(4)).astype(np.float32)
    known = {f"block_{i:02d}": images.mean((1, 2)) * (-np.float32([1, 2, 3])) ** i for i in range(4)}
    np.savez(context.bundle.reference, images=images, **known, logits=2 * known["block_03"])
    change(context, "export", taps=[*known])
    return images, known


def test_ranges_are_those_that_the_check_measured(context):
    """Only where a graph is typed by them; what moves numbers has those of what it moves, and a run of their own gives
    the same."""
    images, known = write_blocks(context)
    ask(context, "fp32")
    assert check_precision(context, "fp32").consistency_without == ("block_01", "block_02")
    assert EXTREMES not in context.scratch
    ask(context, "fp32,fp16")
    check_precision(context, "fp32")
    measured = context.scratch[EXTREMES]["model.onnx"]
    assert {"images", "s2", "block_02", "logits"} <= {*measured} and not {"r1", "r2"} & {*measured}
    amax, by_block = module.activation_ranges(context, context.bundle.onnx())
    assert amax["r2"] == amax["s2"] == pytest.approx(np.abs(known["block_02"]).max(), rel=1e-5)
    assert amax["images"] == np.abs(images).max()
    context.scratch.clear()
    assert module.activation_ranges(context, context.bundle.onnx()) == (amax, by_block)
    context.config.check.consistency = False
    check_precision(context, "fp32")
    assert EXTREMES not in context.scratch  # no run has all images


def test_a_typed_graph_is_asked_only_what_types_change(context):
    """If model.onnx was found to agree with itself; a quantized graph has other nodes."""
    write_blocks(context)
    ask(context, "fp32,fp16")
    for name in ("fp16", "int8"):
        context.bundle.onnx(name).write_bytes(context.bundle.onnx().read_bytes())
    assert check_precision(context, "fp16").consistency and check_precision(context, "fp16").consistency_like is None
    context.results.put("check", check_precision(context, "fp32"))
    found = check_precision(context, "fp16")
    assert (found.consistency, found.consistency_like, found.consistency_without) == (None, "model.onnx", None)
    assert check_precision(context, "int8").consistency and check_precision(context, "fp32").consistency
    change(context, "check", passed=False)
    assert check_precision(context, "fp16").consistency
    context.config.check.consistency = False
    assert check_precision(context, "fp16").consistency_like is None
