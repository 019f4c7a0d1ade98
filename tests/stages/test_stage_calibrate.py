"""What calibration asks for, leaves, and says of thresholds, shifts and layers that stay out of INT8."""

import types

import numpy as np
import pytest
from stage_context import make_context, write_graph

from vit_convert.core.errors import UsageError
from vit_convert.core.stage_results import LeftOut, Shifted, Widened
from vit_convert.stages import calibrate as module
from vit_convert.stages import lowering, other_weights
from vit_convert.stages.calibrate import CALIBRATE


@pytest.fixture
def context(tmp_path):
    found = make_context(tmp_path / "b")
    found.config.precision, found.config.target = "fp32,int8", "rtx"
    return found


def names(context):
    return [path.relative_to(context.bundle.root).as_posix() for path in CALIBRATE.outputs(context)]


def test_what_it_leaves(context):
    assert names(context) == ["calibration.json", "calibration_images.npy"]
    context.config.calibration.data, context.config.calibration.smooth = "a.zip", 0.5
    assert names(context) == [
        "calibration.json", "calibration_images.npy", "calibration_labels.npy",
        "model.smooth.onnx", "model.smooth.onnx.data",
    ]  # fmt: skip
    assert module.source_graph(context).name == "model.smooth.onnx"
    context.config.calibration.data, context.config.calibration.smooth, context.config.target = "", 0.0, "trt8"
    assert module.source_graph(context).name == "model.onnx"
    assert names(context)[:2] == ["calibration.json", "calibration_images.npy"]
    assert names(context)[2] == "calibration.cache" and len(names(context)) == 4  # TensorRT's own, with its key
    context.config.engine.int8_lowering = "fused"
    assert names(context)[-3:] == [
        "lowerings/fused.ranges.json",
        "lowerings/fused.int8.onnx",
        "lowerings/fused.int8.onnx.data",
    ]


@pytest.mark.parametrize(
    ("precision", "sensitivity", "wanted"),
    [("fp32", False, False), ("fp32,fp16", False, False), ("fp32,int8", False, True), ("fp32,fp8", False, True),
     ("fp32", True, True)],
)  # fmt: skip
def test_when_it_is_needed(context, precision, sensitivity, wanted):
    context.config.precision, context.config.sensitivity = precision, sensitivity
    assert CALIBRATE.needed(context) is wanted


INT8 = {"precision": "fp32,int8", "plan.type": "fp8"}


@pytest.mark.parametrize(
    ("values", "leave_out", "shift"),
    [
        (INT8, True, True),
        ({"precision": "fp32,fp8", "plan.type": "fp8"}, False, False),
        ({"precision": "fp32,fp8", "plan.type": "int8"}, True, True),  # what a plan would quantize to
        ({**INT8, "quantize_only": ("block_00",)}, False, True),  # the user's word
        ({**INT8, "plan.file": "plan.json"}, False, True),
        ({**INT8, "calibration.shift": False}, True, False),
        ({**INT8, "engine.calibrator": True}, True, False),
        ({**INT8, "target": "trt8", "engine.int8_lowering": "fused"}, True, False),
    ],
)
def test_what_may_stay_out_and_what_may_be_shifted(context, values, leave_out, shift):
    for key, value in values.items():
        group = context.config
        *groups, last = key.split(".")
        for name in groups:
            group = group[name]
        group[last] = value
    assert (module._may_leave_out(context), module._may_shift(context)) == (leave_out, shift)
    assert CALIBRATE.inputs(context)[-2:] == [leave_out, shift]


def test_what_limits_each_precision(context, monkeypatch):
    context.config.keep_fp32, context.config.keep_fp16, context.config.quantize_only = ("a",), ("b",), ("c",)
    given = {"keep_fp32": ["a"], "keep_fp16": ["b"], "quantize_only": ["c"]}
    assert module.patterns(context) == given
    found = types.SimpleNamespace(left_out={"x": 0.5})
    monkeypatch.setattr("vit_convert.quantize.calibrate.Calibration.load", lambda path: found)
    assert module.limits(context, "fp8") == given and module.limits(context, "int8") == {**given, "leave_out": ["x"]}


def cost(candidates, errors, cheapest):
    return types.SimpleNamespace(candidates=candidates, errors=errors, cheapest=cheapest)


def test_thresholds_that_were_widened():
    costs = {"a": cost([3.125, 5.0, 8.0], [0.25, 0.01, 0.03], 0.01)}
    calibration = types.SimpleNamespace(amax={"a": 8.0}, thresholds={"a": 5.0}, widened=lambda: costs)
    (row,) = module._widened(calibration)
    assert row == Widened(
        tensor="a", amax=8.0, entropy=3.125, threshold=5.0, error_entropy=0.25, error=0.01, error_minmax=0.03
    )
    said = module._most([row, row])
    assert said == "most a: 3.12 → 5, error of its products 0.25 → 0.01"


def test_shifts_that_gain_most_come_first():
    shift = lambda offset, error: types.SimpleNamespace(offset=offset, threshold=1.0, error=error)  # noqa: E731
    calibration = types.SimpleNamespace(
        shifts={"a": shift(0.5, 0.1), "b": shift(0.25, 0.1)}, costs={"a": cost((), (), 0.2), "b": cost((), (), 0.4)}
    )
    assert module._shifted(calibration) == [
        Shifted(tensor=name, offset=offset, threshold=1.0, error=0.1, error_symmetric=before)
        for name, offset, before in (("b", 0.25, 0.4), ("a", 0.5, 0.2))
    ]


SITES = [types.SimpleNamespace(name=name, tensor=tensor) for name, tensor in
         (("q", "x"), ("k", "x"), ("k", "x"), ("fc1", "y"), ("fc2", "z"))]  # fmt: skip


def test_layers_that_stay_out_the_worst_first(context):
    context.config.calibration.max_error = 0.001
    rows = module._left_out(context, types.SimpleNamespace(left_out={"x": 0.002, "z": 0.5}), SITES)
    assert rows == [
        LeftOut(sites=("fc2",), tensor="z", error=0.5, max_error=0.001),
        LeftOut(sites=("q", "k"), tensor="x", error=0.002, max_error=0.001),
    ]
    said = context.bundle.events.read_text()
    assert "fc2: stays fp16" in said and "q, k: stays fp16" in said and "calibration.max_error" in said
    assert module._left_out(context, types.SimpleNamespace(left_out={}), SITES) == []
    assert module._left_out(context, types.SimpleNamespace(left_out={}), []) == []


def test_not_everything_may_stay_out(context):
    with pytest.raises(UsageError, match=r"config\.calibration\.max_error=0\.001: .* q: 0\.002"):
        module._left_out(context, types.SimpleNamespace(left_out={"x": 0.002, "y": 0.1, "z": 0.5}), SITES)


@pytest.mark.parametrize(
    ("keep", "said", "fix"),
    [((), "has no product or convolution", "fp16"), (("*",), r"config\.keep_fp16=\['\*'\]", "keep_fp16")],
)
def test_nothing_to_quantize(context, keep, said, fix):
    context.config.keep_fp16 = keep
    with pytest.raises(UsageError, match=said) as caught:
        module._refuse_to_quantize_nothing(context)
    assert fix in caught.value.fix and "nothing would be quantized" in str(caught.value)


class Calibration:
    """What measuring gave: two tensors, one of them clipped."""

    device, thresholds, amax = "cuda", {"images": 1.0, "block_00": 2.0}, {"images": 4.0, "block_00": 2.0}
    shifts, costs = {}, {}

    def __init__(self, left_out=()):
        self.left_out = dict(left_out)

    def widened(self):
        return {}

    def shift(self, *arguments):
        return self

    def leave_out(self, tensors, max_error):
        assert (tensors, max_error) == (["block_00"], 0.001)
        return Calibration({"block_00": 0.5})

    def save(self, path):
        path.write_text("{}")


@pytest.mark.parametrize(("target", "cached"), [("rtx", False), ("trt8", True)])
def test_everything_that_may_be_quantized_is_measured(context, monkeypatch, target, cached):
    """Of a graph with one product; for TensorRT's own cache also its input."""
    write_graph(context.bundle.onnx())
    context.config.target, context.config.calibration.num_images = target, 5
    context.config.quantize_only = ()
    asked, caches = [], []

    def measure(graph, images, prepare, tensors, **options):
        asked.append((graph.name, len(images), tensors, options["method"], options["batch_size"], options["device"]))
        return Calibration()

    monkeypatch.setattr("vit_convert.quantize.calibrate.calibrate", measure)
    monkeypatch.setattr("vit_convert.quantize.shift.shiftable", lambda model, sites: ((), ()))
    monkeypatch.setattr(module, "_write_cache", lambda context, calibration: caches.append(calibration))
    monkeypatch.setattr(module, "_left_out", lambda context, calibration, linears: [
        LeftOut(sites=("w",), tensor="block_00", error=0.5, max_error=0.001)])  # fmt: skip
    found = module.calibrate(context)
    tensors = ["images", "block_00"] if cached else ["block_00"]
    assert asked == [("model.onnx", 5, tensors, "entropy", 8, "auto")] and len(caches) == cached
    assert found.summary == "entropy, 5 images, 2 tensors, 1 clipped, on cuda, w left out of int8"
    assert (found.num_images, found.num_tensors, found.num_clipped, found.source) == (5, 2, 1, "seeded noise")
    assert found.left_out[0].sites == ("w",) and context.bundle.calibration.exists() and found.smoothed is None


@pytest.mark.parametrize(
    ("method", "header"),
    [
        ("entropy", "TRT-8601-EntropyCalibration2"),
        ("minmax", "TRT-8601-MinMaxCalibration"),
        ("percentile", "TRT-8601-EntropyCalibration2"),  # one of ours, which TensorRT reads as its default's
        ("entropy_plain", "TRT-8601-EntropyCalibration2"),
    ],
)
def test_a_cache_is_read_by_the_algorithm_that_it_names(context, monkeypatch, method, header):
    """Of the layers that are quantized alone."""
    write_graph(context.bundle.onnx())
    context.config.target = "trt8"
    written = {}
    monkeypatch.setattr(module, "builds_here", lambda context: False)
    monkeypatch.setattr(module, "hash_source", lambda *arguments, **options: "source")
    monkeypatch.setattr(module, "save_cache", lambda path, key, text, **options: written.update({key: (text, options)}))
    calibration = Calibration(left_out={"block_00": 0.5})
    calibration.method, calibration.num_images = method, 5
    module._write_cache(context, calibration)
    ((key, (text, options)),) = written.items()
    text = text.decode() if isinstance(text, bytes) else text
    assert text.splitlines()[0] == key.header == header and key.source_hash == "source"
    assert [line.split(":")[0] for line in text.splitlines()[1:] if line] == ["images"]
    assert options == {"num_images": 5}


@pytest.mark.parametrize(
    ("here", "calibrates", "header"),
    [(True, True, "TRT-100203"), (True, False, "TRT-8601"), (False, True, "TRT-8601")],
)
def test_a_cache_is_for_the_tensorrt_that_builds(context, monkeypatch, here, calibrates, header):
    """That of this host, if it builds here and has a calibrator of its own; else the newest of the target."""
    write_graph(context.bundle.onnx())
    context.config.target = "trt8"
    keys = []
    backend = types.SimpleNamespace(version="10.2.3", has_calibrator=calibrates)
    monkeypatch.setattr(module, "builds_here", lambda context: here)
    monkeypatch.setattr(module, "backend_named", lambda name: backend)
    monkeypatch.setattr(module, "hash_source", lambda *arguments, **options: "source")
    monkeypatch.setattr(module, "save_cache", lambda path, key, text, **options: keys.append(key.header))
    calibration = Calibration()
    calibration.method, calibration.num_images = "entropy", 5
    module._write_cache(context, calibration)
    assert [key.rpartition("-")[0] for key in keys] == [header]


@pytest.mark.parametrize("shift", [True, False])
def test_tensors_are_shifted_where_that_may_be(context, monkeypatch, shift):
    """By what the graph allows, and the summary tells how many were."""
    write_graph(context.bundle.onnx())
    context.config.calibration.shift, context.config.calibration.num_images = shift, 2
    asked = []

    class Shifting(Calibration):
        def shift(self, *arguments):
            asked.append(arguments)
            self.shifts = {"block_00": 0.5}
            return self

        def leave_out(self, tensors, max_error):
            return self

    monkeypatch.setattr("vit_convert.quantize.calibrate.calibrate", lambda *arguments, **options: Shifting())
    monkeypatch.setattr("vit_convert.quantize.shift.shiftable", lambda model, sites: (["block_00"], len(sites)))
    monkeypatch.setattr(module, "_left_out", lambda context, calibration, linears: [])
    monkeypatch.setattr(module, "_shifted", lambda calibration: ())
    found = module.calibrate(context)
    assert asked == ([(["block_00"], 1)] if shift else [])
    assert found.summary.endswith(", 1 shifted") is shift and found.summary.count("shifted") == shift


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        (("query", "key", "value", "out"), ["qkv", "out"]),
        (("query", "key", "out"), ["out"]),  # queries, keys and values are one linear there
        (("query", "key", "value"), ["qkv"]),
        (("qkv", "fc1"), ["qkv", "fc1"]),
        ((), []),
    ],
)
def test_linears_of_a_lowering_by_the_names_of_the_model(context, monkeypatch, asked, kept):
    write_graph(context.bundle.onnx())
    sites = [
        types.SimpleNamespace(name=f"block_03/{kind}", block="block_03", kind=kind)
        for kind in ("query", "key", "value", "out", "qkv", "fc1")
    ]
    placed = types.SimpleNamespace(sites=[site for site in sites if site.kind in asked])
    monkeypatch.setattr("vit_convert.quantize.placement.place", lambda model, **options: placed)
    lowered = [site for site in sites if site.kind in ("qkv", "out", "fc1")]
    assert [site.kind for site in sites if site in lowering._as_asked(context, lowered, module.patterns(context))] == [
        kind for kind in ("out", "qkv", "fc1") if kind in kept
    ]


def test_attention_that_is_not_quantized_is_said(context, monkeypatch):
    write_graph(context.bundle.onnx())
    site = types.SimpleNamespace(name="w")
    placed = types.SimpleNamespace(sites=[site], declined={"block_03": "its mask is computed"})
    monkeypatch.setattr("vit_convert.quantize.placement.place", lambda model, **options: placed)

    def stop(*arguments):
        raise InterruptedError

    monkeypatch.setattr(module, "change_weights", stop)
    with pytest.raises(InterruptedError):
        module.calibrate(context)
    assert "block_03: attention is not quantized: its mask is computed" in context.bundle.events.read_text()


def test_what_was_widened_stands_in_the_summary(context, monkeypatch):
    write_graph(context.bundle.onnx())
    context.config.calibration.num_images, context.config.calibration.shift = 3, False
    context.config.quantize_only = ("w",)  # so that nothing stays out
    costs = {"block_00": cost([1.0, 2.0], [0.25, 0.01], 0.01)}
    measured = Calibration()
    monkeypatch.setattr(measured, "widened", lambda: costs, raising=False)
    monkeypatch.setattr("vit_convert.quantize.calibrate.calibrate", lambda *arguments, **options: measured)
    found = module.calibrate(context)
    assert found.summary == (
        "entropy, 3 images, 2 tensors, 1 clipped, 1 wider than entropy, "
        "most block_00: 1 → 2, error of its products 0.25 → 0.01, on cuda"
    )
    assert found.widened[0].threshold == 2.0


def test_every_image_is_in_one_batch(context, monkeypatch):
    monkeypatch.setattr(other_weights, "prepare", lambda context: lambda images: images.tolist())
    context.config.calibration.batch_size = 3
    assert list(other_weights._batches(context, np.arange(7))) == [[0, 1, 2], [3, 4, 5], [6]]


def test_calibration_images_need_no_labels(context, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "source_identity", lambda data, *, labelled: asked.append((data, labelled)) or "id")
    context.config.calibration.data = "a.zip"
    assert CALIBRATE.inputs(context)[1] == "id" and asked == [("a.zip", False)]


def test_a_graph_without_products_is_refused(context):
    write_graph(context.bundle.onnx())
    context.config.keep_fp16 = ("w",)
    with pytest.raises(UsageError, match="nothing would be quantized"):
        module.calibrate(context)
