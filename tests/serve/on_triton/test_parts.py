"""The first lines of a config, sides that an earlier bundle does not tell, and configs read by Triton's protobuf."""

import importlib.util
import json
import runpy
import sys
import types

import pytest

from vit_convert.core.bundle import Bundle, write_json
from vit_convert.core.signature import Output
from vit_convert.core.version import __version__
from vit_convert.serve.triton import parse
from vit_convert.serve.triton.parts import Asked, head, known


@pytest.fixture
def offered(tmp_path):
    def offered(summary):
        bundle = Bundle(tmp_path / "tiny")
        bundle.require_writable()
        stages = [{"name": "checkpoint", "status": "done", "result": {"summary": summary}}] if summary else []
        write_json(bundle.manifest, {"stages": stages})
        return types.SimpleNamespace(bundle=bundle, expected={"logits": types.SimpleNamespace(shape=(4, 10))})

    return offered


@pytest.mark.parametrize(
    ("backend", "lines"),
    [
        ("tensorrt", ['name: "m"', 'backend: "tensorrt"', 'platform: "tensorrt_plan"']),
        ("onnxruntime", ['name: "m"', 'backend: "onnxruntime"', 'platform: "onnxruntime_onnx"']),
        ("python", ['name: "m"', 'backend: "python"']),
    ],
)
def test_who_runs_it(offered, backend, lines):
    about, fields = head(offered("ViT B/16, 1 parameters"), "m", backend)
    assert fields.text.splitlines() == lines
    assert about.text.endswith(f"{__version__} from tiny (ViT B/16, 1 parameters).")
    assert head(offered(""), "m", backend)[0].text.endswith(f"{__version__} from tiny.")


def test_the_last_side_is_jaxs(offered):
    output = Output("logits", "float32", ("batch", "values"), judge="cosine")
    assert known(offered(""), output) == Output("logits", "float32", ("batch", 10), judge="cosine")
    found, tokens = offered(""), Output("logits", "float32", ("batch", 7, "values"))
    found.expected = {"logits": types.SimpleNamespace(shape=(4, 7, 10))}
    assert known(found, tokens).shape == ("batch", 7, 10)


def test_the_networks_name():
    assert (Asked("a").model, Asked("a", network="b").model) == ("a", "b")
    plain = Asked("a")  # what docs/serving.md says of a command without flags
    assert (plain.runtime, plain.precision, plain.version, plain.delay_us, plain.top_k) == ("auto", "", 1, None, 5)
    assert plain.response_cache is False


@pytest.fixture
def triton(monkeypatch, tmp_path):
    """tritonclient with a message of its own in place of ModelConfig: protobuf's Duration, which has two numbers."""
    pytest.importorskip("google.protobuf")
    folder = tmp_path / "client"
    (folder / "grpc").mkdir(parents=True)
    (folder / "grpc" / "model_config_pb2.py").write_text(
        "from google.protobuf.descriptor_pb2 import FileOptions as ModelConfig\n"
    )
    places = [[str(folder)]]

    def find_spec(name, find=importlib.util.find_spec):
        if name != "tritonclient":
            return find(name)
        return types.SimpleNamespace(submodule_search_locations=places[0]) if places else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return places


def test_configs_are_read_with_their_own_names(triton, tmp_path):
    good, bad, none = (tmp_path / name for name in ("good", "bad", "none"))
    good.write_text('java_package: "a"\ncc_enable_arenas: true\n')
    bad.write_text("java_package: 3\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    found = parse.parse([str(path) for path in (good, bad, none, tmp_path / "bytes")])
    assert found[str(good)] == {"config": {"java_package": "a", "cc_enable_arenas": True}}
    assert found[str(bad)]["error"].startswith("1:15") and "No such file" in found[str(none)]["error"]
    assert "utf-8" in found[str(tmp_path / "bytes")]["error"] and len(found) == 4


@pytest.mark.parametrize("places", [[], [None], [[]]])
def test_without_tritons_client(triton, places):
    triton[:] = places
    with pytest.raises(ModuleNotFoundError) as caught:
        parse.parse([])
    assert caught.value.name == "tritonclient"


def test_as_a_script_it_prints_json(triton, tmp_path, monkeypatch, capsys):
    (tmp_path / "a").write_text('java_package: "a"\n')
    (tmp_path / "b").write_text('java_package: "b"\n')
    monkeypatch.setattr(sys, "argv", ["parse.py", str(tmp_path / "a"), str(tmp_path / "b")])
    runpy.run_path(parse.__file__, run_name="__main__")
    assert json.loads(capsys.readouterr().out) == {
        str(tmp_path / name): {"config": {"java_package": name}} for name in "ab"
    }
