"""What is said of an engine that was built: how much of it is INT8, and which attention it fuses, by whoever tells."""

import types

import pytest

from vit_convert.core.engine_results import ProfileKernels
from vit_convert.core.errors import BuildError
from vit_convert.engine.backend.sidecar import Sidecar
from vit_convert.engine.builder import summary
from vit_convert.engine.builder.summary import look_at, summarise

BACKEND = types.SimpleNamespace(name="tensorrt", version="8.6.1", arch="sm90", gpu="one")


class Said:
    """Progress that keeps its warnings."""

    def __init__(self):
        self.warnings = []
        self.warn = self.warnings.append


def sidecar(precision, **more):
    return Sidecar.from_dict({"precision": precision, "onnx": {"path": "model.int8.onnx"}, "attentions": 2, **more})


@pytest.mark.parametrize("precision", ["fp16", "fp32", "fp8", "int8"])
@pytest.mark.parametrize(("layers", "count"), [({"Layers": []}, 0), ({"Layers": ["a"]}, 3), (None, None)])
def test_products_in_int8_are_counted_in_int8_engines(tmp_path, monkeypatch, precision, layers, count):
    monkeypatch.setattr(summary, "look_at", lambda *arguments: (layers, None, "why"))
    monkeypatch.setattr(summary, "count_int8", lambda found: count)
    progress = Said()
    found = summarise(BACKEND, tmp_path / "x.plan", sidecar(precision), warnings=["w"], progress=progress)
    assert found.int8_layers == (count if precision == "int8" else None)
    warned = precision == "int8" and count == 0
    assert len(progress.warnings) == warned and all("may be an fp16 engine" in text for text in progress.warnings)
    assert (tmp_path / "x.plan.layers.json").exists() is (layers is not None)
    assert (found.fused_attention_unknown, found.warnings, found.graph) == ("why", ("w",), "model.int8.onnx")


@pytest.fixture
def look(monkeypatch, tmp_path):
    """Looks at an engine of which this is known."""

    def look(*, layers=({"Layers": []}, ""), fused=None, kernels=()):
        monkeypatch.setattr(summary, "Engine", lambda *arguments, **options: "engine")
        monkeypatch.setattr(summary, "engine_layers", lambda engine: layers)
        monkeypatch.setattr(summary, "fused_attention", lambda found: fused)
        monkeypatch.setattr(summary, "fused_attention_by_kernels", lambda engine: list(kernels))
        return look_at(BACKEND, tmp_path / "x.plan", sidecar("fp16"))

    return look


def profile(batch, count=None, unknown=None):
    if count is None:
        return ProfileKernels(batch=batch, unknown=unknown)
    return ProfileKernels(batch=batch, kernels=9, count=count, precisions={"fp16": count}, text=f"{count} of 2")


def test_the_profile_that_fuses_least_stands_for_the_engine(look):
    rows = [profile(1, 2), profile(4, 1), profile(8, unknown="no graph"), profile(64, 2)]
    layers, found, unknown = look(kernels=rows)
    assert (found.count, found.precisions, found.text, found.source) == (1, {"fp16": 1}, "1 of 2", "kernel names")
    assert found.profiles == tuple(rows) and unknown == "no graph" and layers == {"Layers": []}
    assert look(kernels=[profile(1, 1), profile(4, 1)])[1].count == 1  # of equal ones the first


def test_no_profile_tells(look):
    rows = [profile(1, unknown="first"), profile(4, unknown="second")]
    assert look(kernels=rows)[1:] == (None, "first")
    assert look(kernels=[])[1:] == (None, "")


def test_the_inspector_tells(look):
    told = types.SimpleNamespace(count=2, precisions={"fp16": 2}, describe=lambda attentions: f"2 of {attentions}")
    _, found, unknown = look(fused=told)
    assert (found.count, found.text, found.source, found.profiles, unknown) == (
        2,
        "2 of 2",
        "engine inspector",
        None,
        "",
    )


def test_an_engine_whose_layers_are_not_told(look):
    assert look(layers=(None, "no inspector")) == (None, None, "no inspector")


def test_an_engine_that_cannot_be_looked_at(monkeypatch, tmp_path):
    def engine(*arguments, **options):
        raise BuildError("too little memory")

    monkeypatch.setattr(summary, "Engine", engine)
    assert look_at(BACKEND, tmp_path / "x.plan", sidecar("fp16"))[:2] == (None, None)
    without = types.SimpleNamespace(**{**vars(BACKEND), "gpu": None})
    assert "this host has none" in look_at(without, tmp_path / "x.plan", sidecar("fp16"))[2]
