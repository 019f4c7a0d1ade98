"""What each layer loses alone: the switched graph against graphs of its own, the file it is kept in, ranking and
picture."""

import builtins
import json

import numpy as np
import onnx_ir as ir
import pytest
from rounded import run_rounded
from tiny_vit import TinyViT, normalize, run, unfused

from vit_convert.core.compare import top1_accuracy
from vit_convert.core.errors import CheckError, UsageError
from vit_convert.core.onnx_file import save_onnx
from vit_convert.images.decode import pick
from vit_convert.quantize import sensitivity as module
from vit_convert.quantize.calibrate import calibrate
from vit_convert.quantize.half_precision import to_fp16
from vit_convert.quantize.placement import place
from vit_convert.quantize.qdq import quantize
from vit_convert.quantize.sensitivity import Sensitivity, candidates, switched
from vit_convert.report.sensitivity import load_record, plot_ranking, print_ranking, ranking


def to_half(model):
    return to_fp16(model).model


class Case:
    """A tiny ViT, its units and calibration."""

    def __init__(self, folder, images, *, attention=False, **options):
        self.folder, self.images = folder, images
        self.path = TinyViT(**options).save(folder / "model.onnx")
        self.model = ir.load(self.path)
        self.units = candidates(self.model, {}, attention=attention)
        tensors = place(self.model).tensors() + place(self.model, attention=attention).tensors()
        self.calibration = calibrate(self.path, images, normalize, tensors)
        self.labels = run(self.path, normalize(images))[0].argmax(-1)
        self.labels[:6] = 0

    def sensitivity(self, *, path="sensitivity.json", images=None, labels=None, **changes):
        options = {"target": "rtx", "precision": "int8", "rest": "fp16", "lower": to_half, "source": "test images"}
        options |= {"scan_images": 24, **changes}  # all of them
        images, labels = (self.images, self.labels) if images is None else (images, labels)
        arguments = (self.folder / path, self.path, self.calibration, self.units, images, labels, normalize)
        return Sensitivity(*arguments, **options)


@pytest.fixture
def case(tmp_path, images):
    return Case(tmp_path, images)


@pytest.mark.parametrize("fused_qkv", [True, False])
def test_units(tmp_path, images, fused_qkv):
    case = Case(tmp_path, images, attention=True, fused_qkv=fused_qkv)
    assert [u.name for u in case.units if u.block == "block_01"] == [
        f"block_01/{k}" for k in ("qkv", "out", "fc1", "fc2", "attention")
    ]
    qkv = case.units[0]
    assert [s.kind for s in qkv.sites] == (["qkv"] if fused_qkv else ["query", "key", "value"])
    assert qkv.num_weights == 64 * 3 * 64
    kept = candidates(case.model, {"keep_fp16": ["block_00"], "quantize_only": ["*/MlpBlock_0/*"]}, attention=True)
    assert [u.name for u in kept] == ["block_01/fc1", "block_01/fc2"]


@pytest.mark.parametrize(
    ("precision", "target", "options"),
    [
        ("int8", "rtx", {"fused_qkv": False}),
        ("fp8", "rtx", {}),
        ("int8", "trt8", {"opset": 17, "layernorm": "two_pass"}),
    ],
)
@pytest.mark.parametrize("attention", [False, True])
def test_a_switched_graph_gives_the_numbers_of_its_own_graph(tmp_path, images, precision, target, options, attention):
    case = Case(tmp_path, images, attention=attention, **options)
    save_onnx(
        switched(case.model, case.calibration, case.units, target=target, precision=precision),
        tmp_path / "switched.onnx",
    )
    session, x = unfused(tmp_path / "switched.onnx"), normalize(images)
    for chosen in some_sets(case, attention):
        save_onnx(own_graph(case, chosen, attention, target=target, precision=precision), tmp_path / "own.onnx")
        (expected,) = unfused(tmp_path / "own.onnx").run(None, {"images": x})
        (got,) = session.run(None, {"images": x, "quantized": switches(case, chosen)})
        np.testing.assert_array_equal(got, expected, err_msg=str(chosen))  # the same arithmetic, node by node


def test_a_switched_graph_in_fp16(tmp_path, images):
    case = Case(tmp_path, images)
    save_onnx(
        to_half(switched(case.model, case.calibration, case.units, target="rtx", precision="int8")),
        tmp_path / "switched.onnx",
    )
    x = normalize(images[:2])
    for chosen in some_sets(case, attention=False):
        save_onnx(to_half(own_graph(case, chosen, False, target="rtx", precision="int8")), tmp_path / "own.onnx")
        expected = run_rounded(tmp_path / "own.onnx", x)
        np.testing.assert_array_equal(
            run_rounded(tmp_path / "switched.onnx", x, quantized=switches(case, chosen)), expected
        )


def some_sets(case, attention):
    sets = [
        [],
        ["block_01/fc2"],
        ["block_00/out"],
        ["block_00/qkv", "block_01/out", "block_01/fc1"],
        [unit.name for unit in case.units],
    ]
    return sets + ([["block_00/attention"], ["block_00/attention", "block_00/out"]] if attention else [])


def switches(case, chosen):
    return np.array([unit.name in chosen for unit in case.units])


def own_graph(case, chosen, attention, *, target, precision):
    """The graph of one set, as the pipeline makes it from a plan."""
    if not chosen:
        return case.model
    wanted = [site.name for unit in case.units if unit.name in chosen for site in unit.sites]
    sites = place(case.model, attention=attention, quantize_only=wanted).sites
    assert sorted(site.name for site in sites) == sorted(wanted)
    return quantize(case.model, case.calibration, sites, target=target, precision=precision)


def test_measured_numbers(case):
    result = case.sensitivity(rest="fp32", lower=lambda model: model).measure(["block_00/fc2", "block_00/qkv"])
    assert result.quantized == ("block_00/qkv", "block_00/fc2")  # graph order
    sites = place(case.model, quantize_only=["block_00/qkv", "block_00/fc2"]).sites
    save_onnx(quantize(case.model, case.calibration, sites, target="rtx"), case.folder / "own.onnx")
    x = normalize(case.images)
    reference, got = (run(path, x)[0].astype(np.float64) for path in (case.path, case.folder / "own.onnx"))
    cosines = (reference * got).sum(1) / np.linalg.norm(reference, axis=1) / np.linalg.norm(got, axis=1)
    # onnxruntime fuses the two graphs differently, and a last digit of float32 may move one value in 10**4 over a
    # quantizer's edge
    assert result.cosine == pytest.approx(cosines.min(), abs=0.05 * (1 - cosines.min()))
    assert result.error == pytest.approx((1 - cosines).mean(), rel=0.05)
    assert result.max_rel == pytest.approx(np.abs(reference - got).max() / np.abs(reference).max(), rel=0.05)
    assert result.top1 == top1_accuracy(got, case.labels)
    assert result.agreement == top1_accuracy(got, reference.argmax(-1))


def test_scan_measures_every_unit_and_block_once(case):
    results = case.sensitivity().scan()
    units = [unit.name for unit in case.units]
    assert [list(r.quantized) for r in results] == [[], *([u] for u in units), units[:4], units[4:], units]
    assert results[0].error < 1e-6 < min(r.error for r in results[1:])
    record = json.loads((case.folder / "sensitivity.json").read_text())
    assert len(record["measured"]) == 12 and record["rest"] == "fp16" and record["labelled"]
    assert not [path for path in case.folder.iterdir() if path.name.startswith(".")]  # the switched graph is gone


def test_an_interrupted_scan_continues(case, monkeypatch):
    first = case.sensitivity()
    run_set = first._run
    calls = []

    def stop_after_three(wanted):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(wanted)
        return run_set(wanted)

    monkeypatch.setattr(first, "_run", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        first.scan()
    second = case.sensitivity()
    counted = []
    monkeypatch.setattr(second, "_run", lambda wanted: counted.append(wanted) or Sensitivity._run(second, wanted))
    results = second.scan()
    assert len(calls) + len(counted) == len(results) == 12 and not set(calls) & set(counted)

    opened = []
    monkeypatch.setattr(module, "open_session", lambda *args: opened.append(args))
    assert case.sensitivity().scan() == results and not opened
    # what was measured in another way is measured again
    assert not case.sensitivity(precision="fp8")._known and not case.sensitivity(rest="fp32")._known
    case.calibration.thresholds[next(iter(case.calibration.thresholds))] *= 1.01
    assert not case.sensitivity()._known


def test_an_infinite_output_is_an_error(case):
    with pytest.raises(CheckError, match=r"block_00/fc2 in int8: the output is NaN or infinite"):
        case.sensitivity(lower=_scaled)._run(frozenset(["block_00/fc2"]))


def _scaled(model):
    head = model.graph.initializers["head/kernel"]
    head.const_value = ir.tensor(head.const_value.numpy() * np.float32(np.inf))
    return model


def test_ranking(case, capsys):
    case.sensitivity().scan()
    record = load_record(case.folder)
    by_error = ranking(record)
    assert sorted(row.name for row in by_error.units) == sorted(unit.name for unit in case.units)
    errors = [row.error for row in by_error.units]
    assert errors == sorted(errors, reverse=True)
    by_cosine = [row.cosine for row in ranking(record, "cosine").units]
    assert by_cosine == sorted(by_cosine)
    assert {row.name for row in by_error.blocks} == {"block_00", "block_01"}
    fp32 = next(row for row in record.measured if not row.quantized)
    for row in by_error.blocks:
        assert row.top1_change == row.top1 - fp32.top1
    print_ranking(record, "max_rel")
    text = capsys.readouterr().out
    assert "One at a time in int8, the rest in fp16; against fp32 on 24 test images" in text
    assert text.index(ranking(record, "max_rel").units[0].name) < text.index(ranking(record, "max_rel").units[-1].name)


def test_sets_are_judged_on_all_images_and_ranked_on_some(case):
    sensitivity = case.sensitivity(path="judged.json", scan_images=4)
    name = sensitivity.units[0].name
    some, whole = sensitivity.measure([name]), sensitivity.judge([name])
    every = case.sensitivity(path="every.json").measure([name])
    assert whole == every and some != every
    chosen = pick(len(case.images), 4)
    few = case.sensitivity(path="few.json", images=case.images[chosen], labels=case.labels[chosen]).measure([name])
    assert some == few
    again = case.sensitivity(path="judged.json", scan_images=4)
    assert (again.measure([name]), again.judge([name])) == (some, whole) and again._session is None  # remembered
    assert list(again.alone()) == [name]


def test_a_glimpse_is_of_the_images_that_lost_most(case):
    """Of those that were judged; before any was, of those that sets are ranked by."""
    sensitivity = case.sensitivity(scan_images=4)
    name, other = (unit.name for unit in sensitivity.units[:2])
    assert sensitivity.glimpse([name]) == sensitivity.measure([name])
    sensitivity.judge([name])
    x = normalize(case.images)
    save_onnx(to_half(own_graph(case, [name], False, target="rtx", precision="int8")), case.folder / "own.onnx")
    reference, got = run(case.path, x)[0].astype(np.float64), run(case.folder / "own.onnx", x)[0].astype(np.float64)
    cosines = (reference * got).sum(1) / np.linalg.norm(reference, axis=1) / np.linalg.norm(got, axis=1)
    worst = sorted(np.argsort(cosines, kind="stable")[:8])
    # onnxruntime fuses the two graphs differently: neighbours in the order may change places
    assert len(sensitivity._worst) == 8 and len({*sensitivity._worst} & {*worst}) >= 7
    found, chosen = sensitivity.glimpse([other]), sensitivity._worst
    alone = case.sensitivity(path="w.json", images=case.images[chosen], labels=case.labels[chosen]).measure([other])
    assert found == alone
    assert [row.quantized for row in sensitivity.record.measured] == [(name,)]  # a glimpse is not kept


def test_ranking_of_what_has_been_measured_so_far(case):
    case.sensitivity().measure(["block_01/fc1"])
    assert [row.name for row in ranking(load_record(case.folder)).units] == ["block_01/fc1"]


def test_ranking_errors(case, tmp_path):
    with pytest.raises(UsageError, match=r"sensitivity\.json: missing or damaged"):
        load_record(tmp_path / "nothing")
    case.labels = None
    case.sensitivity().measure([])
    record = load_record(case.folder)
    with pytest.raises(UsageError, match="no labels"):
        ranking(record, "top1")
    with pytest.raises(UsageError, match=r"--by=cosinus: .* Did you mean cosine"):
        ranking(record, "cosinus")


def test_picture(case):
    pytest.importorskip("matplotlib")
    case.sensitivity().scan()
    assert plot_ranking(load_record(case.folder), case.folder / "layers.png") == ""
    assert (case.folder / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_so(case, monkeypatch):
    load = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    case.sensitivity().measure([])
    assert plot_ranking(load_record(case.folder), case.folder / "layers.png") == "matplotlib is not installed"
    assert not (case.folder / "layers.png").exists()
