"""What the check stage judges, at which size and batch, and what it says of a miss: one graph, references bent on
purpose."""

import sys
import types

import numpy as np
import onnx_ir as ir
import pytest
import stage_context
from stage_context import CLASSES, WEIGHT, change, forward, make_context, normalized, pixels, write_graph

from vit_convert.core.check_results import Distance
from vit_convert.core.consistency import ALONE, FINITE, IDENTICAL, PERMUTED
from vit_convert.core.errors import CheckError
from vit_convert.core.onnx_file import save_onnx
from vit_convert.quantize.half_precision import to_bf16
from vit_convert.stages import check as module
from vit_convert.stages.check import ANSWERS, CHECK, check, check_precision

COUNT = 4
RANGE = {"smallest": [2, 2], "optimal": [4, 4], "largest": [8, 8]}
SIZES = {"4x4": "reference.npz", "2x2": "reference.2x2.npz", "8x4": "reference.8x4.npz"}


@pytest.fixture
def context(tmp_path):
    found = make_context(tmp_path / "b")
    write_graph(found.bundle.onnx())
    refer(found)
    return found


def refer(context, name="reference.npz", size=(4, 4), **changes):
    """Writes a reference; `changes` are added to its tensors."""
    values = normalized(pixels(COUNT, *size)).astype(np.float32)
    tensors = {key: value + np.asarray(changes.get(key, 0), np.float32) for key, value in forward(values).items()}
    np.savez(context.bundle.root / name, images=values, **tensors, unasked=np.zeros(3))


def dynamic(context, **changes):
    """Makes the model dynamic; `changes` are per size."""
    change(context, "checkpoint", image_range=RANGE)
    for size, name in SIZES.items():
        refer(context, name, tuple(map(int, size.split("x"))), **changes.get(size, {}))


def off(context, by, image=0):
    """A summand that moves one image's logits by so much, in the first class."""
    found = np.zeros((COUNT, CLASSES))
    found[image, 0] = by
    return found


def turned(cosine):
    """Summands that turn every image's logits by the angle of this cosine."""
    logits = forward(normalized(pixels(COUNT)))["logits"].astype(np.float64)
    side = np.random.default_rng(1).standard_normal(logits.shape)
    side -= (side * logits).sum(1, keepdims=True) / (logits**2).sum(1, keepdims=True) * logits
    side *= np.linalg.norm(logits, axis=1, keepdims=True) / np.linalg.norm(side, axis=1, keepdims=True)
    return side * (1 - cosine**2) ** 0.5 / cosine


def failure(context, precision="fp32", run=check_precision):
    with pytest.raises(CheckError) as caught:
        run(*((context, precision) if run is check_precision else (context,)))
    return str(caught.value), caught.value


def test_a_graph_that_is_right(context):
    found = check_precision(context, "fp32")
    assert found.precision == "fp32" and found.passed is True
    assert found.tolerance == "max_abs <= 1e-06 + 0.0001 * scale, cosine >= 0.99999"
    assert [(row.tensor, row.passed, row.batch in (1, 3, 4)) for row in found.blocks] == [
        ("block_00", True, True),
        ("logits", True, True),
    ]
    assert found.sizes == {"4x4": Distance.part_of(found)}
    # float32 sums of 16 pixels and 3 colours: some 1e-7 of the scale
    assert found.max_rel < 1e-6 and found.cosine > 0.9999999 and found.top1 is None
    assert found.summary.startswith(f"max abs {found.max_abs:.2g} ({found.max_rel:.2g} of scale), cosine 1.0000000")
    assert not found.summary.endswith("bf16") and "top-1" not in found.summary


def test_a_miss_names_the_worst_and_the_first(context):
    scale = np.abs(forward(normalized(pixels(COUNT)))["logits"]).max()
    refer(context, block_00=np.eye(COUNT, 3) * 0.01, logits=off(context, 1.0, image=3))
    message, error = failure(context)
    assert message.startswith("model.onnx: logits differs from JAX by 1 (")
    assert f"at batch {COUNT} of 4x4; needed max_abs <= 1e-06 + 0.0001 * scale" in message and message.endswith(
        "First to miss: block_00."
    )
    assert error.exit_code == 5 and "docs/checks.md" in error.fix and "config.precision=auto" not in error.fix
    assert error.result.passed is False and [row.passed for row in error.result.blocks] == [False, False]
    assert error.result.max_abs == pytest.approx(1.0, rel=1e-5) and 0.5 / scale < error.result.max_rel < 2 / scale


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8", "smooth"])
def test_inside_a_lower_precision_is_reported_and_not_judged(context, precision):
    write_graph(context.bundle.onnx(precision))
    refer(context, block_00=np.eye(COUNT, 3))
    if precision == "smooth":  # computes in fp32
        assert "First to miss: block_00" in failure(context, precision)[0]
        return
    found = check_precision(context, precision)
    assert found.passed is True and [row.passed for row in found.blocks] == [None, True]
    check = context.config.check
    assert found.tolerance == f"cosine >= {check.fp16_cosine if precision == 'fp16' else check.int8_cosine:g}"


@pytest.mark.parametrize(
    ("precision", "cosine", "passes"),
    [
        ("fp16", 0.9995, True),
        ("fp16", 0.998, False),
        ("int8", 0.985, True),
        ("int8", 0.975, False),
        ("fp8", 0.975, False),
    ],
)
def test_each_precision_has_its_own_cosine(context, precision, cosine, passes):
    write_graph(context.bundle.onnx(precision))
    refer(context, logits=turned(cosine))
    if passes:
        assert check_precision(context, precision).cosine == pytest.approx(cosine, abs=1e-5)
        return
    message, error = failure(context, precision)
    assert message.startswith(f"model.{precision}.onnx: logits differs") and f"cosine {cosine:.6f}"[:13] in message
    assert ("config.precision=auto" in error.fix) == (precision in ("int8", "fp8"))
    assert ("config.calibration.max_error below 0.001" in error.fix) == (precision == "int8")


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        (
            {},
            "Try config.calibration.max_error below 0.001, which leaves more products in fp16; "
            "then config.precision=auto, which leaves the layers in fp16 that cost most.",
        ),
        (
            {"calibration.method": "minmax", "calibration.attention": True},
            "Try config.calibration.method=entropy instead of minmax; then config.calibration.attention=False; then "
            "config.precision=auto",
        ),
        (
            {"precision": "auto", "calibration.max_error": 5e-4},
            "Try config.calibration.max_error below 0.0005, which leaves more products in fp16; then a higher "
            "config.plan.cosine.",
        ),
        (
            {"engine.int8_lowering": "fused"},
            "Try config.calibration.max_error below 0.001, which leaves more products in fp16; then a higher "
            "config.calibration.min_cosine, which leaves in fp16 what costs the output most. docs/checks.md",
        ),
        (
            {"engine.int8_lowering": "fused", "calibration.method": "mse"},
            "Try config.calibration.method=entropy instead of mse; then a higher config.calibration.min_cosine",
        ),
    ],
)
def test_what_an_int8_miss_advises_is_what_the_config_has_not(context, changes, fix):
    """Nothing that is set already, nor what int8 by ranges does not take."""
    with context.config.unlocked(), context.config.ignore_type():
        context.config.update_from_flattened_dict(changes)
    write_graph(context.bundle.onnx("int8"))
    refer(context, logits=turned(0.9))
    assert failure(context, "int8")[1].fix.startswith(fix)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_head_of_zeros_passes_in_every_precision(context, precision):
    write_graph(context.bundle.onnx(precision), WEIGHT * 0)
    refer(context, logits=-forward(normalized(pixels(COUNT)).astype(np.float32))["logits"])
    found = check_precision(context, precision)
    assert (found.max_abs, found.max_rel, found.cosine) == (0.0, 0.0, 1.0)


def test_the_keys_of_the_config_decide(context):
    context.config.check.atol, context.config.check.rtol, context.config.check.cosine = 0.5, 0.0, 0.5
    refer(context, logits=off(context, 0.45))
    assert check_precision(context, "fp32").passed
    context.config.check.atol = 0.4
    assert "needed max_abs <= 0.4 + 0 * scale, cosine >= 0.5" in failure(context)[0]


def test_every_size_is_judged_but_of_a_quantized_graph_the_first(context, monkeypatch):
    asked = []
    from vit_convert.checks import onnx_graph

    real = {name: getattr(onnx_graph, name) for name in ("check_graph", "check_graph_and_itself")}

    def note(name):
        def noted(path, reference, batches, tolerance, *, judged, **options):
            asked.append(
                (
                    list(batches) if name == "check_graph" else batches is not None,
                    list(judged),
                    [name for name in reference if name != "images"],
                )
            )
            return real[name](path, reference, batches, tolerance, judged=judged, **options)

        monkeypatch.setattr(onnx_graph, name, noted)

    for name in real:
        note(name)
    dynamic(context)
    found = check_precision(context, "fp32")
    assert list(found.sizes) == [*SIZES] and found.summary.count(" at ") == 2 and ", 1.0000000 at 8x4" in found.summary
    tensors = ["block_00", "logits"]
    assert [row[0] for row in asked] == [True, [4], [4]] and all(row[2] == tensors for row in asked)
    assert all({*row[1]} - {"images"} == {*tensors} for row in asked)
    for precision, judged in (("fp16", ["logits"]), ("int8", [])):
        asked.clear()
        write_graph(context.bundle.onnx(precision))
        check_precision(context, precision)
        assert [row[1] for row in asked] == [["logits"], judged, judged]
    asked.clear()
    context.config.check.consistency = False
    assert check_precision(context, "fp32").consistency is None
    assert [row[0] for row in asked] == [False, [4], [4]]
    for size in ("2x2", "8x4"):
        dynamic(context, **{size: {"logits": off(context, 9.0)}})
        assert f"at batch 4 of {size}" in failure(context)[0] and f"of {size}" in failure(context, "fp16")[0]
        assert check_precision(context, "int8").passed and check_precision(context, "int8").sizes[size].cosine < 0.98


def test_the_worst_of_several_sizes_is_told(context):
    dynamic(
        context,
        **{
            "4x4": {"logits": off(context, 0.1)},
            "2x2": {"logits": off(context, 20.0)},
            "8x4": {"logits": off(context, 0.2)},
        },
    )
    message, error = failure(context)
    assert "differs from JAX by 20" in message and "of 2x2" in message
    assert error.result.max_abs == pytest.approx(0.1, rel=1e-4)  # of the size that engines are tuned for
    assert error.result.sizes["2x2"].max_abs == pytest.approx(20.0, rel=1e-4)


def test_bf16_is_checked_by_its_widened_form_which_goes_afterwards(context):
    save_onnx(to_bf16(ir.load(context.bundle.onnx())).model, context.bundle.onnx("bf16"))
    before = sorted(context.bundle.root.iterdir())
    found = check_precision(context, "".join("bf16"))  # as a word out of a config file is: none of Python's own copies
    assert found.summary.endswith("in float32 rounded to bf16") and found.passed
    assert 1e-4 < found.max_rel < 2e-2  # 8 bits, a few times
    assert sorted(context.bundle.root.iterdir()) == before
    refer(context, logits=off(context, 9.0))
    assert failure(context, "bf16")[0].startswith("model.bf16.onnx: logits differs")
    assert sorted(context.bundle.root.iterdir()) == before


def label(context, right, count=40):
    """Gives the context labelled images of which the graph gets so many right."""
    images = pixels(count, seed=1)
    labels = forward(normalized(images))["logits"].argmax(1)
    labels[right:] = (labels[right:] + 1) % CLASSES
    np.save(context.bundle.images("evaluation"), images)
    np.save(context.bundle.labels("evaluation"), labels)
    change(context, "images", labelled=True)


@pytest.mark.parametrize(("allowed", "passes"), [(5.0, True), (4.9, False)])
def test_top1_may_drop_by_what_is_allowed(context, allowed, passes):
    label(context, right=38)  # 95 % of 40, in batches of 32
    change(context, "reference", top1=100.0)
    context.config.check.max_top1_drop = allowed
    if passes:
        found = check_precision(context, "fp32")
        assert found.top1 == 95.0 and found.summary.endswith(", top-1 95.00 %") and found.passed is True
        return
    message, error = failure(context)
    assert message == "model.onnx: top-1 is 95.00 %, 5.00 points below JAX's 100.00 %; allowed 4.9"
    assert error.result.passed is False and error.result.top1 == 95.0


def test_pixels_are_what_a_graph_that_normalises_takes(context):
    """Labelled images go in as the config says: here as they are, so that a graph for values sees other colours."""
    label(context, right=40)
    change(context, "reference", top1=100.0)
    context.config.check.max_top1_drop = 100.0
    write_graph(context.bundle.onnx(), WEIGHT * [[1], [-1], [2]])
    refer(context, logits=forward(normalized(pixels(COUNT)))["block_00"] @ (WEIGHT * [[0], [-2], [1]]))
    images = pixels(40, seed=1)
    mean = normalized(images).mean((1, 2))
    expected = 100 * np.mean(
        (mean @ (WEIGHT * [[1], [-1], [2]])).argmax(1) == np.load(context.bundle.labels("evaluation"))
    )
    assert check_precision(context, "fp32").top1 == expected < 100


def test_a_lowering_has_to_give_what_model_onnx_gives(context):
    change(context, "export", lowerings={"matmul": {}, "plugin": {}})
    context.scratch["model"] = object()
    for name in ("matmul", "plugin"):
        write_graph(context.bundle.lowering(name))
    found = check(context)
    assert {*context.scratch} == {ANSWERS} and found.passed is True and list(found.lowerings) == ["matmul", "plugin"]
    spelt = found.lowerings["matmul"]
    assert spelt.passed is True and spelt.cosine > 0.9999999
    assert spelt.sizes == {"4x4": Distance.part_of(spelt)}
    assert found.summary.count("; matmul: cosine 1.0000000") == found.summary.count("; plugin: cosine 1.0000000") == 1
    write_graph(context.bundle.lowering("plugin"), WEIGHT * 1.5)
    message, error = failure(context, run=check)
    assert (
        message.startswith("lowering plugin: plugin.onnx: logits differs from JAX by") and "; lowering" not in message
    )
    assert error.result.passed is False and [row.passed for row in error.result.lowerings.values()] == [
        True,
        False,
    ]
    write_graph(context.bundle.lowering("matmul"), WEIGHT * 2)
    assert "; lowering plugin: plugin.onnx" in failure(context, run=check)[0]


def test_a_lowering_is_judged_at_every_size_and_inside_it_may_be_laid_out_otherwise(context):
    change(context, "export", lowerings={"matmul": {}})
    write_graph(context.bundle.lowering("matmul"))
    dynamic(context)
    found = check(context)
    assert list(found.lowerings["matmul"].sizes) == [*SIZES]
    change(context, "export", taps=[])  # so that the main graph's own tap is not what misses
    dynamic(context, **{"2x2": {"block_00": 1.0}})
    assert check(context).passed


def test_without_lowerings_the_summary_is_of_the_graph_alone(context):
    found = check(context)
    assert found.lowerings == {} and ";" not in found.summary


def test_what_jax_holds_is_let_go_of(context, monkeypatch):
    cleared = []
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(clear_caches=lambda: cleared.append(True)))
    monkeypatch.setattr(module.gc, "collect", lambda: cleared.append("collected"))
    context.scratch["model"] = object()
    check(context)
    assert cleared == [True, "collected"] and {*context.scratch} == {ANSWERS}
    monkeypatch.delitem(sys.modules, "jax")
    check(context)  # a rerun of the check alone never loads it
    assert "jax" not in sys.modules


def test_the_stage_depends_on_its_tolerances(context):
    assert (CHECK.name, CHECK.after) == ("check", ("reference", "export"))
    before = CHECK.inputs(context)
    assert before["rtol"] == 1e-4 and before["max_top1_drop"] == 1.0
    context.config.check.rtol = 1e-3
    assert CHECK.inputs(context) != before


def test_what_a_graph_says_of_itself_is_in_the_result(context):
    found = check_precision(context, "fp32")
    assert [(row.check, row.output, row.passed) for row in found.consistency] == [
        (check, "logits", True) for check in (FINITE, IDENTICAL, PERMUTED, ALONE)
    ]


def test_a_graph_that_is_not_finite_on_what_is_flat_fails(context, monkeypatch):
    """Though it is right on every image of the reference: it adds 0 / (largest - smallest pixel)."""
    flat = """most = ReduceMax <keepdims = 0> (images, axes) least = ReduceMin <keepdims = 0> (images, axes)
    range = Sub (most, least) zero = Sub (most, most) nothing = Div (zero, range) safe = Add (block_00, nothing)
    logits = MatMul (safe, w)"""
    monkeypatch.setattr(stage_context, "GRAPH", stage_context.GRAPH.replace("logits = MatMul (block_00, w)", flat))
    write_graph(context.bundle.onnx())
    message, error = failure(context)
    assert message.startswith("model.onnx: logits is NaN or infinite on black, white; needed max_abs")
    assert error.result.passed is False and [row.passed for row in error.result.blocks] == [True, True]
    context.config.check.consistency = False
    assert check_precision(context, "fp32").passed
