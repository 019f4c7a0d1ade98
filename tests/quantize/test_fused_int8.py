"""INT8 from ranges, lowering "fused": what a conversion leaves for the GPU host, what stays out of INT8, and the check
without a GPU."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import simulated_gpu

from vit_convert import kernels
from vit_convert.convert import convert
from vit_convert.core.compare import compare
from vit_convert.core.config import default_config
from vit_convert.core.errors import CheckError
from vit_convert.core.onnx_file import open_session, run_session
from vit_convert.core.operators import ADD_NORM
from vit_convert.core.progress import Progress
from vit_convert.engine.build_bundle import request_for
from vit_convert.engine.handoff import open_bundle, read_config
from vit_convert.engine.host import EngineHost
from vit_convert.export.passes.fused_encoder import quantized_tensors
from vit_convert.quantize.calibrate import Calibration
from vit_convert.quantize.placement import place
from vit_convert.quantize.ranged import sites_with_ranges


def config(checkpoint, name, **changes):
    found = default_config()
    found.name, found.checkpoint, found.engine.backend, found.target = name, str(checkpoint), "none", "trt8"
    found.precision, found.engine.int8_lowering, found.calibration.num_images, found.check.num_images = (
        "fp16,int8",
        "fused",
        4,
        2,
    )
    with found.ignore_type():
        found.update_from_flattened_dict(changes)
    return found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("fused")


@pytest.fixture(scope="module")
def small(workdir):
    from vit_convert.families.random import write_random_checkpoint

    write_random_checkpoint(workdir / "ti.npz", "Ti/16", depth=3, image_size=(32, 32), num_classes=10)
    return workdir / "ti.npz"


@pytest.fixture(scope="module")
def converted(workdir, small):
    return convert(config(small, "all"), workdir, quiet=True)


def ranges(workdir, name):
    return Calibration.load(workdir / name / "lowerings" / "fused.ranges.json")


def test_the_check_computes_with_every_range(converted, workdir):
    check = converted["checks"]["int8"]
    assert converted["calibration"]["left_out"] == [] and check["passed"] and 0.98 < check["cosine"] < 0.999999
    model = ir.load(workdir / "all" / "lowerings" / "fused.int8.onnx")
    sites = sites_with_ranges(model, ranges(workdir, "all").thresholds)
    # The last block computes keys and values, and attention for one token, by products.
    kinds = [site.kind for site in sites]
    assert {kind: kinds.count(kind) for kind in kinds} == {"qkv": 2, "VitAttention": 2, "out": 2, "fc1": 3, "fc2": 3}
    assert len(check["quantized"]) == len(sites) == 12
    written = onnx.load(workdir / "all" / "model.int8.onnx", load_external_data=False).graph
    # a tensor each, and the weights of convolutions
    assert sum(node.op_type == "DequantizeLinear" for node in written.node) == 12 + 10


def test_branches_are_read_where_they_are_added(converted, workdir):
    model = ir.load(workdir / "all" / "lowerings" / "fused.int8.onnx")
    plain, with_branches = (quantized_tensors(model, branches=branches) for branches in (False, True))
    before, after = (sites_with_ranges(model, {*read, *other}) for read, other in (plain, with_branches))
    added = [site for site in after if site not in before]
    assert {site.kind for site in added} == {ADD_NORM} and len(added) == 4 and {*before} < {*after}
    assert not any(site.weight for site in added)


def test_weights_were_changed_exactly(converted, workdir):
    with np.load(workdir / "all" / "reference.npz") as file:
        images = file["images"]
    paths = (workdir / "all" / "lowerings" / f"{name}.onnx" for name in ("fused", "fused.int8"))
    before, after = (run_session(open_session(path), images, ["logits"])["logits"] for path in paths)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())  # rounding of fp32 alone


def test_what_costs_too_much_is_left_out(converted, workdir, small):
    costs = {name: min(cost.errors) for name, cost in ranges(workdir, "all").costs.items()}
    worst, *_, second_best, _ = sorted(costs, key=costs.__getitem__, reverse=True)
    allowed = costs[second_best] * 1.0001
    report = convert(config(small, "some", **{"calibration.max_error": allowed}), workdir, quiet=True)
    left_out = {name for name, error in costs.items() if error > allowed}
    assert worst in left_out and len(left_out) == len(costs) - 2
    assert {row["tensor"] for row in report["calibration"]["left_out"]} == left_out
    assert all(row["sites"] and row["max_error"] == allowed for row in report["calibration"]["left_out"])
    assert not left_out & {*ranges(workdir, "some").thresholds}
    graph = ir.load(workdir / "some" / "lowerings" / "fused.int8.onnx").graph
    kernels = {node.outputs[-1].name: node for node in graph if "quantized" in node.attributes}
    assert all(kernels[name].attributes["quantized"].as_int() == 0 for name in left_out if name in kernels)
    assert any(kernels[name].attributes["quantized"].as_int() == 1 for name in kernels)
    assert report["checks"]["int8"]["cosine"] > converted["checks"]["int8"]["cosine"]
    assert len(report["checks"]["int8"]["quantized"]) == 12 - len(left_out)


def test_patterns_are_honoured(converted, workdir, small):
    report = convert(config(small, "patterns", keep_fp16=("*/fc2", "block_00/key")), workdir, quiet=True)
    assert not any(name.endswith("/fc2") or name == "block_00/qkv" for name in report["checks"]["int8"]["quantized"])
    assert len(report["checks"]["int8"]["quantized"]) == 12 - 4 and report["calibration"]["left_out"] == []
    kept = {*ranges(workdir, "all").thresholds} - {*ranges(workdir, "patterns").thresholds}
    assert len([name for name in kept if "LayerNorm" in name]) == 1
    report = json.loads((workdir / "patterns" / "report.json").read_text())
    assert report["checks"]["int8"]["passed"]


@pytest.fixture(scope="module")
def pictures(workdir):
    """Sixteen images; the same with labels, since so few tell little of the ranges that others need."""
    noise = np.random.default_rng(3).integers(0, 256, (16, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    np.savez(workdir / "pictures.npz", images=noise)
    np.savez(workdir / "labelled.npz", images=noise, labels=np.arange(16) % 10)
    return workdir


def left_in_fp16(workdir, name, report):
    """The tensors of the products that the report names, after a look at every file that must agree with it."""
    rows = report["calibration"]["output_share"]["products"]
    sites = {row["site"] for row in rows}
    model = ir.load(workdir / name / "lowerings" / "fused.int8.onnx")
    read = {site.tensor for site in place(model).sites if site.name in sites}
    assert not read & {*ranges(workdir, name).thresholds} and not sites & {*report["checks"]["int8"]["quantized"]}
    kernels = {node.outputs[-1].name: node for node in model.graph if "quantized" in node.attributes}
    assert all(kernels[name].attributes["quantized"].as_int() == 0 for name in read if name in kernels)
    assert [row["share"] / row["multiplications"] for row in rows] == sorted(
        (row["share"] / row["multiplications"] for row in rows), reverse=True
    )
    return read


@pytest.mark.slow
def test_the_output_decides_what_stays_out(converted, workdir, small, pictures):
    given = {"calibration.data": str(pictures / "pictures.npz"), "calibration.num_images": 8}

    def share(cosine, until="calibrate"):
        asked = config(small, "share", **given, **{"calibration.min_cosine": cosine})
        return convert(asked, workdir, until=until, quiet=True)

    loose = share(0.99)["calibration"]["output_share"]
    assert loose["products"] == [] and loose["cosine"] == loose["cosine_before"] > loose["min_cosine"] == 0.99
    never = share(1.0)["calibration"]["output_share"]
    assert never["products"] == [] and never["cosine"] == loose["cosine"]  # attention alone costs more
    assert "output_share" not in share(0.0)["calibration"]
    assert "output_share" not in converted["calibration"]  # noise shows no accuracy
    goal = (1 + loose["cosine"]) / 2  # half of what the whole loses
    report = share(goal, until="")
    found = report["calibration"]["output_share"]
    assert found["cosine_before"] == loose["cosine"] < goal <= found["cosine"] and found["num_images"] == 8
    assert 0 < len(left_in_fp16(workdir, "share", report)) < 10
    # the graph that stands for the engine loses that much: compared with model.onnx, which knows nothing of ranges
    images = np.load(workdir / "share" / "calibration_images.npy").astype(np.float32) / 127.5 - 1
    paths = (workdir / "share" / name for name in ("model.onnx", "model.int8.onnx"))
    exact, got = (run_session(open_session(path), images, ["logits"])["logits"] for path in paths)
    assert compare(exact, got).cosine == pytest.approx(found["cosine"], abs=1e-5)
    said = (workdir / "share" / "events.jsonl").read_text()
    assert "is out of reach" in said and "as they cost the output most for their time" in said


@pytest.mark.slow
def test_a_plan_of_a_lowering_is_made_on_labelled_images(workdir, small, pictures):
    given = {"calibration.data": str(pictures / "pictures.npz"), "calibration.num_images": 16, "precision": "auto"}
    given |= {"evaluation.data": str(pictures / "labelled.npz"), "plan.cosine": 0.9998, "plan.accuracy_budget": 100.0}
    given |= {"check.max_top1_drop": 100.0, "check.min_agreement": 0.0}
    report = convert(config(small, "plan", **given), workdir, quiet=True)
    share = report["calibration"]["output_share"]
    assert (share["num_images"], share["source"], share["min_cosine"]) == (16, "evaluation images", 0.9998)
    assert share["cosine_before"] < 0.9998 <= share["cosine"] and left_in_fp16(workdir, "plan", report)
    assert not (workdir / "plan" / "precision_plan.json").exists()
    np.savez(workdir / "unlabelled.npz", images=np.load(pictures / "pictures.npz")["images"][:12])
    given["evaluation.data"] = str(workdir / "unlabelled.npz")
    found = convert(config(small, "plan", **given), workdir, until="calibrate", quiet=True)["calibration"]
    assert (found["output_share"]["num_images"], found["output_share"]["source"]) == (12, "evaluation images")
    with pytest.raises(CheckError, match=r"precision=auto: with every product in fp16 that may be, cosine 0\.99"):
        convert(config(small, "plan", **{**given, "plan.cosine": 1.0}), workdir, until="calibrate", quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("built", [True, False])
def test_a_plan_takes_the_lowering_where_the_kernels_are_built(workdir, small, pictures, monkeypatch, built):
    """And a GPU host builds int8 from what the plan left, on a simulated one as on any."""
    monkeypatch.setenv(kernels.ENVIRONMENT, str(workdir / ("kernels.so" if built else "none.so")))
    (workdir / "kernels.so").write_bytes(b"a library")
    given = {"precision": "auto", "engine.int8_lowering": "auto", "plan.cosine": 0.9, "check.int8_cosine": 0.0}
    given |= {"calibration.data": str(pictures / "pictures.npz")}
    convert(config(small, f"auto_{built}", **given), workdir, quiet=True)
    bundle = open_bundle(str(workdir / f"auto_{built}"))
    assert bundle.lowering("fused.int8").exists() is bundle.ranges("fused").exists() is built
    assert bundle.precision_plan.exists() is not built
    backend, _ = simulated_gpu.install(monkeypatch)
    host = EngineHost.open(backend, bundle, read_config(bundle), Progress(quiet=True))
    request = request_for(host, "int8")
    assert request.onnx_path == (bundle.lowering("fused.int8") if built else bundle.onnx("int8"))
    assert {*request.ranges} == ({*ranges(workdir, "auto_True").thresholds} if built else set())


def test_a_rotated_stream_computes_the_same(converted, workdir, small):
    report = convert(config(small, "rotated", **{"calibration.rotate": True}), workdir, quiet=True)
    found = report["calibration"]["rotated"]
    assert found["widths"] == [192] and found["num_norms"] == 7 and found["products"] == []
    assert converted["calibration"]["rotated"] is None
    with np.load(workdir / "rotated" / "reference.npz") as file:
        images = file["images"]
    paths = [workdir / "rotated" / "lowerings" / f"{name}.onnx" for name in ("fused", "fused.int8")]
    before, after = (run_session(open_session(path), images, ["logits"])["logits"] for path in paths)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())  # rounding of fp32 alone
    nodes = [[node.op_type for node in ir.load(path).graph] for path in paths]
    assert nodes[0] == nodes[1]
    rows = report["checks"]["int8"]["blocks"]
    assert [row["tensor"] for row in rows] == ["logits"]  # JAX knows no rotated block
    assert report["checks"]["int8"]["passed"] and report["checks"]["int8"]["cosine"] > 0.98


def test_a_rotated_graph_with_pairs_is_judged_by_jax(workdir, small):
    changes = {"target": "trt10", "precision": "int8", "engine.int8_lowering": "", "calibration.rotate": True}
    report = convert(config(small, "pairs", outputs="features", **changes), workdir, quiet=True)
    assert report["calibration"]["rotated"]["products"] == ["features"]  # nothing but a product could give them back
    assert report["checks"]["smooth"]["passed"] and report["checks"]["smooth"]["max_rel"] <= 1e-5
    assert report["checks"]["int8"]["passed"] and report["checks"]["int8"]["cosine"] > 0.98
    assert [row["tensor"] for row in report["checks"]["smooth"]["blocks"]] == ["features"]
