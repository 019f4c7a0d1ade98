"""What the sensitivity and plan stages measure, on which images, and what they say of it; the losses are a table of the
test's own."""

import dataclasses
import json
import types

import numpy as np
import pytest
from stage_context import change, make_context, normalized, pixels, write_graph

from vit_convert.core.errors import CheckError
from vit_convert.core.sensitivity_record import Measured, SensitivityRecord
from vit_convert.quantize.sensitivity import Unit
from vit_convert.stages import plan as module
from vit_convert.stages.plan import PLAN, SENSITIVITY, plan, scan_sensitivity

# What each unit loses; a set loses their sum. 0.98 is the budget that the config begins with.
LOSSES = {"block_00/fc1": 0.001, "block_00/fc2": 0.03, "block_01/fc1": 0.002}


class Table:
    """Stands in for Sensitivity: the same words and the same record, without a graph."""

    made: "list[Table]"

    def __init__(self, path, graph, calibration, units, images, labels, normalize, **options):
        self.path, self.graph, self.calibration, self.units = path, graph, calibration, units
        self.images, self.labels, self.normalize, self.options = images, labels, normalize, options
        self.asked, self.scans = [], 0
        self.record = SensitivityRecord.from_dict(
            {
                "key": {"of": "this model"},
                "precision": options["precision"],
                "rest": options["rest"],
                "source": options["source"],
                "num_images": len(images),
                "scan_images": min(len(images), 16),
                "labelled": labels is not None,
                "units": {unit.name: {} for unit in units},
            }
        )
        Table.made.append(self)

    def measure(self, names):
        loss = sum(LOSSES[name] for name in names)
        top1 = None if self.labels is None else 90 - 100 * loss
        found = Measured(tuple(names), loss, 1 - loss, loss, 100.0, top1)
        if found not in self.asked:
            self.asked.append(found)
            self.record = dataclasses.replace(self.record, measured=(*self.record.measured, found))
        return found

    judge = glimpse = measure

    def alone(self):
        return {found.quantized[0]: found for found in self.asked if len(found.quantized) == 1}

    def scan(self):
        self.scans += 1
        return [self.measure([unit.name]) for unit in self.units]


UNITS = [
    Unit(*name.split("/"), (types.SimpleNamespace(name=name),), weights)
    for name, weights in zip(LOSSES, (100, 250, 150))
]


@pytest.fixture
def context(tmp_path, monkeypatch):
    found = make_context(tmp_path / "b")
    write_graph(found.bundle.onnx())
    change(found, "export", taps=[])
    found.config.target, found.config.precision = "rtx", "auto"
    np.save(found.bundle.images("calibration"), pixels(20, seed=1))
    Table.made = []
    calibration = types.SimpleNamespace(load=lambda path: types.SimpleNamespace(path=path, left_out={"tensor": {}}))
    given = []
    monkeypatch.setattr("vit_convert.quantize.sensitivity.Sensitivity", Table)
    monkeypatch.setattr("vit_convert.quantize.calibrate.Calibration", calibration)
    monkeypatch.setattr(
        "vit_convert.quantize.sensitivity.candidates",
        lambda model, patterns, *, attention: given.append((model.graph.name, patterns, attention)) or UNITS,
    )
    ranked = []
    monkeypatch.setattr(
        "vit_convert.quantize.ranking.unit_costs", lambda *args, **options: ranked.append((args, options)) or LOSSES
    )
    found.scratch |= {"given": given, "ranked": ranked}
    return found


def evaluation_images(context, labels=None):
    np.save(context.bundle.images("evaluation"), pixels(40, seed=2))
    change(context, "images", num_images=40, labelled=labels is not None)
    if labels is not None:
        np.save(context.bundle.labels("evaluation"), labels)


def test_which_stages_are_wanted(context):
    wanted = {
        ("auto", False, ""): (False, True),  # a plan ranks by what calibration knows
        ("auto", True, ""): (True, True),
        ("int8", True, ""): (True, False),
        ("int8", False, ""): (False, False),
        ("auto", False, "plan.json"): (False, False),  # a plan that is given is not searched for
        ("auto", True, "plan.json"): (True, False),
    }
    for (precision, sensitivity, file), stages in wanted.items():
        context.config.precision, context.config.sensitivity, context.config.plan.file = precision, sensitivity, file
        assert (bool(SENSITIVITY.needed(context)), bool(PLAN.needed(context))) == stages
    root = context.bundle.root
    assert SENSITIVITY.outputs(context) == [root / "sensitivity.json", root / "sensitivity.png"]
    assert PLAN.outputs(context) == [root / "precision_plan.json", root / "plan_search.json"]
    assert (SENSITIVITY.after, PLAN.after) == (("reference", "calibrate"), ("reference", "calibrate", "sensitivity"))


def test_what_the_stages_depend_on(context):
    assert SENSITIVITY.inputs(context) == ["int8", 256, []]
    assert PLAN.inputs(context) == [{**context.config.plan.to_dict()}, 0.98, []]
    context.config.plan.cosine, context.config.plan.accuracy_budget = 0.99, 2.0
    context.config.keep_fp32, context.config.plan.type = ("head",), "fp8"
    assert SENSITIVITY.inputs(context) == ["fp8", 256, ["head"]]
    assert PLAN.inputs(context) == [{**context.config.plan.to_dict()}, 0.98, ["head"]]


def test_what_is_measured_and_on_what(context):
    """Without evaluation images, those of the calibration; the sensitivity's own file."""
    context.config.plan.num_images = 5
    context.config.keep_fp32, context.config.keep_fp16, context.config.calibration.attention = ("a",), ("b",), True
    scan_sensitivity(context)
    (made,) = Table.made
    assert (made.path, made.graph, made.calibration.path) == (
        context.bundle.sensitivity,
        context.bundle.onnx(),
        context.bundle.calibration,
    )
    limits = {"keep_fp32": ["a"], "keep_fp16": ["b"], "quantize_only": [], "leave_out": ["tensor"]}
    assert context.scratch["given"] == [("g", limits, True)] and made.units == UNITS
    assert np.array_equal(made.images, pixels(20, seed=1)[[2, 6, 10, 14, 18]]) and made.labels is None
    assert np.abs(made.normalize(made.images) - normalized(made.images)).max() < 1e-6
    options = dict(made.options)
    assert options.pop("progress") is context.progress and callable(options.pop("lower"))
    assert options == {
        **{"target": "rtx", "precision": "int8", "rest": "fp16", "source": "calibration images", "batch_size": 64},
        **{"depends_on": {"keep_fp32": ["a"]}, "known": context.bundle.sensitivity},
    }


def test_labelled_evaluation_images_go_before(context):
    evaluation_images(context, np.arange(40))
    context.config.plan.num_images = 4
    context.config.plan.type, context.config.calibration.smooth = "fp8", 0.5
    write_graph(context.bundle.onnx("smooth"))
    scan_sensitivity(context)
    (made,) = Table.made
    assert made.labels.tolist() == [5, 15, 25, 35] and np.array_equal(made.images, pixels(40, seed=2)[made.labels])
    assert made.options["source"] == "evaluation images" and made.options["precision"] == "fp8"
    assert made.graph == context.bundle.onnx("smooth")
    assert "leave_out" not in context.scratch["given"][0][1]  # which is of int8 alone


def test_the_rest_is_typed_but_where_a_flag_types_it(context, monkeypatch):
    typed = []
    monkeypatch.setattr(module, "activation_ranges", lambda context, graph: ({"of": graph.name}, {}))
    monkeypatch.setattr(
        "vit_convert.quantize.half_precision.to_fp16",
        lambda model, **options: typed.append((model, options)) or types.SimpleNamespace(model="typed"),
    )
    context.config.keep_fp32 = ("head",)
    scan_sensitivity(context)
    assert Table.made[-1].options["lower"]("graph") == "typed"
    assert typed == [("graph", {"keep_fp32": ("head",), "amax": {"of": "model.onnx"}})]
    context.config.target = "trt8"
    scan_sensitivity(context)
    assert (
        Table.made[-1].options["rest"] == "fp32"
        and Table.made[-1].options["lower"]("graph") == "graph"
        and len(typed) == 1
    )


def test_a_scan_ranks_and_draws(context):
    pytest.importorskip("matplotlib")
    found = scan_sensitivity(context)
    assert Table.made[0].scans == 1
    assert found.worst.name == "block_00/fc2" and found.worst.error == 0.03
    assert found.summary == "3 units on 16 calibration images; worst block_00/fc2: 1 - cosine 0.03"
    assert context.bundle.sensitivity.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    context.config.plan.cosine = 0.5
    # whatever the budget
    assert scan_sensitivity(context).worst.name == "block_00/fc2" and Table.made[1].scans == 1


def test_a_picture_that_cannot_be_drawn_is_said_and_the_old_one_goes(context, monkeypatch, capsys):
    monkeypatch.setattr(
        "vit_convert.report.sensitivity.plot_ranking", lambda record, path: "matplotlib is not installed"
    )
    picture = context.bundle.sensitivity.with_suffix(".png")
    picture.write_bytes(b"an earlier scan's")
    assert scan_sensitivity(context).num_units == 3
    events = [json.loads(line) for line in context.bundle.events.read_text().splitlines()]
    assert not picture.exists() and any(
        "no sensitivity.png: matplotlib is not installed" in str(event) for event in events
    )


@pytest.mark.parametrize("labelled", [False, True])
def test_the_largest_set_within_the_budget(context, labelled):
    if labelled:
        evaluation_images(context, np.arange(40))
    found = plan(context)
    (made,) = Table.made
    assert made.path == context.bundle.plan_search and made.scans == 0  # the scan's own file stays as it was left
    (((graph, calibration, units, images, normalize), options),) = context.scratch["ranked"]
    assert (graph, calibration, units) == (context.bundle.onnx(), made.calibration, UNITS) and normalize is not None
    # those of the calibration
    assert np.array_equal(images, pixels(20, seed=1)) and options.pop("progress") is context.progress
    assert options == {"precision": "int8", "batch_size": context.config.calibration.batch_size}
    written = json.loads(context.bundle.precision_plan.read_text())
    assert written["sites"] == ["block_00/fc1", "block_01/fc1"] and list(written["left_out"]) == ["block_00/fc2"]
    for key in ("precision", "budget", "measured", "fp32", "images", "left_out"):
        assert found.to_dict()[key] == written[key]
    assert (found.path, found.num_units, found.num_candidates) == ("precision_plan.json", 2, 3)
    top1 = ", top-1 89.70 %" if labelled else ""
    assert found.summary == f"2 of 3 units, 50 % of their weights in int8: cosine 0.99700{top1}"
    assert found.measured.share_of_weights == 0.5 and found.budget.top1_drop_points == (0.5 if labelled else None)


def test_points_of_top1_are_a_budget_too(context):
    evaluation_images(context, np.arange(40))
    context.config.plan.accuracy_budget = 0.15  # 0.1 and 0.2 points
    assert plan(context).num_units == 1
    context.config.plan.accuracy_budget = 0.05
    with pytest.raises(CheckError, match="no layer can be int8; the most harmless is block_00/fc1"):
        plan(context)


@pytest.mark.parametrize(("key", "kept"), [({"of": "this model"}, True), ({"of": "another"}, False), (None, False)])
def test_a_search_of_another_model_goes(context, key, kept):
    context.bundle.plan_search.write_text(json.dumps({"key": key}))
    plan(context)
    assert context.bundle.plan_search.exists() == kept
