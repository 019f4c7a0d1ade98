"""Which engines are offered: of the recommended precision, else the best unquantized one; the newest TensorRT's."""

import types

import pytest

from vit_convert.core.bundle import Bundle
from vit_convert.core.errors import BuildError, UsageError
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.serve.triton import offered as module
from vit_convert.serve.triton.offered import Plan, _plans, _version, class_names, classes_of, require_graph


@pytest.fixture
def plans(tmp_path, monkeypatch):
    """Which of some engines are offered; those in `wrong` are not proved."""

    def plans(*paths, precision="", recommended="", wrong=()):
        bundle = Bundle(tmp_path)
        for path in paths:
            (tmp_path / "engines" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "engines" / path).touch()

        def is_proved(bundle, plan, refusals):
            name = plan.path.relative_to(tmp_path / "engines").as_posix()
            if name in wrong:
                refusals.append(f"{name} missed")
            return name not in wrong

        def plan(path):
            return Plan(path, path.stem, path.parent.name.split("-")[1], ("sm90",), False, ({},), None)

        monkeypatch.setattr(module, "_is_proved", is_proved)
        monkeypatch.setattr(module, "_plan", plan)
        benchmark = {"recommended": {"precision": recommended}} if recommended else {}
        found, why = _plans(bundle, precision, benchmark)
        return [plan.path.relative_to(tmp_path / "engines").as_posix() for plan in found], why

    return plans


NEW, OLD = "tensorrt-10.3.0-sm90", "tensorrt-8.6.1-sm90"
ALL = [f"{NEW}/{name}.plan" for name in ("fp32", "fp16", "int8")]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, "fp16"),  # the fastest of those that are as accurate
        ({"recommended": "int8"}, "int8"),
        ({"recommended": "int8", "precision": "fp32"}, "fp32"),
        ({"recommended": "bf16"}, "fp16"),  # which is not there
        ({"recommended": "int8", "wrong": [f"{NEW}/int8.plan"]}, "fp16"),
        ({"wrong": [f"{NEW}/fp16.plan"]}, "fp32"),
    ],
)
def test_which_precision(plans, asked, found):
    assert plans(*ALL, **asked) == ([f"{NEW}/{found}.plan"], "")


def test_the_newest_tensorrts_for_every_gpu(plans):
    others = [f"{OLD}/fp16.plan", "tensorrt-10.3.0-sm89/fp16.plan", "rtx-1.7-all/fp16.plan"]
    assert plans(f"{NEW}/fp16.plan", *others) == ([others[1], f"{NEW}/fp16.plan"], "")
    assert _version("10.3.0") > _version("8.6.1.post1") == (8, 6, 1)


def test_why_there_is_none(plans, tmp_path):
    assert plans() == ([], f"{tmp_path} has no engine of TensorRT")
    assert plans(precision="fp16") == ([], f"{tmp_path} has no fp16 engine of TensorRT")
    assert plans(f"{NEW}/fp16.plan", wrong=[f"{NEW}/fp16.plan"]) == ([], f"{NEW}/fp16.plan missed")
    said = plans("rtx-1.7-all/int8.plan", precision="int8")[1]
    assert said.endswith("has no int8 engine of TensorRT (rtx-1.7-all: Triton has no backend for these)")


def offered(judge="top1", count=3):
    signature = Signature(
        (Tensor("x", "float32", ("batch", 4)),), (Output("logits", "float32", ("batch", count), judge=judge),)
    )
    return types.SimpleNamespace(
        signature=signature, expected={"logits": types.SimpleNamespace(shape=(4, count))}, bundle=Bundle("tiny")
    )


def test_names_of_classes(tmp_path):
    path = tmp_path / "names.txt"
    assert class_names(offered(), "") == ["0", "1", "2"] and class_names(offered("cosine"), "") == []
    path.write_text("\ufeffcat\nox\ndog\n", encoding="utf-8")
    assert class_names(offered(), str(path)) == ["cat", "ox", "dog"]
    with pytest.raises(UsageError, match="3 lines, the model has 4 classes"):
        class_names(offered(count=4), str(path))
    with pytest.raises(UsageError, match="tiny gives no classes, but logits"):
        class_names(offered("cosine"), str(path))
    for content in (None, b"\xff\xfe\x00"):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read"):
            class_names(offered(), str(path))
    assert classes_of(offered()) == "logits"


@pytest.mark.parametrize(
    ("precision", "reason", "wrong", "said"),
    [
        ("int8", "", "", "saturate"),
        ("fp8", "", "", "saturate"),
        ("fp16", "it was not checked", "", "it was not checked"),
        ("fp16", "", "the graph changed", "the graph changed"),
        ("fp16", "", "", ""),
    ],
)
def test_a_graph_that_onnxruntime_may_serve(monkeypatch, precision, reason, wrong, said):
    monkeypatch.setattr(module, "doubt", lambda *arguments: reason)
    files = types.SimpleNamespace(wrong_graph=lambda path: wrong)
    found = types.SimpleNamespace(bundle=Bundle("tiny"), facts=types.SimpleNamespace(files=files, checks={}))
    if not said:
        assert require_graph(found, precision) == Bundle("tiny").onnx(precision)
        return
    with pytest.raises(BuildError, match=said):
        require_graph(found, precision)
