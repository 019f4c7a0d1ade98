"""The whole conversion on a host with a GPU, and what of it a GPU host's own commands add to the report; the GPU is
simulated."""

import ml_collections
import pytest
import simulated_gpu

from vit_convert.convert import convert
from vit_convert.core import config as configs
from vit_convert.core.bundle import read_json
from vit_convert.core.engine_results import EngineSummary
from vit_convert.engine import __main__ as command
from vit_convert.engine import build_bundle
from vit_convert.families.random import write_random_checkpoint
from vit_convert.report.record import Report


@pytest.fixture
def road(gpu, tmp_path, monkeypatch):
    """Converts a tiny model for the simulated GPU; building itself takes a real one."""
    pytest.importorskip("jax2onnx")

    def build_engine(backend, request, plan, *, progress):
        ranges = [tuple(profile["images"]) for profile in request.profiles]
        simulated_gpu.write_plan(plan, request.onnx_path, ranges, precision=request.precision)
        names = {
            "graph": request.onnx_path.name,
            "backend": backend.name,
            "version": backend.version,
            "arch": backend.arch,
            "precision": request.precision,
        }
        return EngineSummary.from_dict(
            {**names, "bytes": 1, "build_seconds": 1.0, "fused_attention_unknown": "simulated"}
        )

    monkeypatch.setattr(build_bundle, "build_engine", build_engine)
    for name in ("common", "build"):
        monkeypatch.setattr(f"vit_convert.stages.{name}.backend_named", lambda asked: gpu[0])
    monkeypatch.setattr(command, "load_backend", lambda asked, **_: gpu[0])
    write_random_checkpoint(tmp_path / "tiny.npz", "mu/16", image_size=(64, 64), num_classes=10)

    def start(backend):
        given = {
            "checkpoint": str(tmp_path / "tiny.npz"),
            "target": "trt8",
            "precision": "fp32,fp16",
            "batch": {"min": 1, "opt": 4, "max": 8},
            "engine": {"backend": backend},
            "benchmark": {"batches": (1, 4), "streams": (1,), "seconds": 0.02},
        }
        return convert(configs.complete(ml_collections.ConfigDict(given), "b"), tmp_path, quiet=True)

    return start


@pytest.mark.slow
def test_report_of_a_conversion_recommends_what_was_verified_and_measured(road):
    report = road("tensorrt")
    assert [row["name"] for row in report["stages"][-3:]] == ["build", "verify", "benchmark"]
    assert set(report["verify"]["engines"]) == {"fp32", "fp16"} and report["verify"]["passed"]
    chosen = report["recommended"]["precision"]
    assert chosen in ("fp32", "fp16") and report["recommended"]["reason"] == "the fastest that passed its check"
    assert (report["engine"]["precision"], report["engine"]["recommended_because"]) == (
        chosen,
        report["recommended"]["reason"],
    )
    assert {row["batch"] for row in report["benchmark"]} == {1, 4} and Report.problems(report) == []


def test_what_a_gpu_host_found_stays_while_its_graphs_do(road, tmp_path):
    road("none")
    for words in (["build"], ["verify"], ["benchmark", "--batches=4", "--streams=1", "--duration=0.02", "--warmup=0"]):
        assert command.main(["engine", words[0], str(tmp_path / "b"), *words[1:], "--quiet"]) == 0
    found = read_json(tmp_path / "b" / "report.json")
    assert Report.problems(found) == []
    again = road("none")  # nothing changed
    assert {row["status"] for row in again["stages"]} == {"fresh"}
    assert all(again[key] == found[key] for key in ("engine", "engines", "verify", "benchmark", "recommended"))
    write_random_checkpoint(tmp_path / "tiny.npz", "mu/16", image_size=(64, 64), num_classes=10, seed=1)
    assert "verify" not in road("none")  # they were other graphs'
