"""A family that a config brings: two inputs, whole numbers among them, and two outputs, through the whole command
line."""

import importlib.util
import json
import pathlib
import shutil

import numpy as np
import onnx_ir as ir
import pytest

from vit_convert.__main__ import main
from vit_convert.core.bundle import Bundle
from vit_convert.engine.handoff import read_facts
from vit_convert.families.family import RandomOptions

SOURCE = pathlib.Path(__file__).with_name("captioned.py")


@pytest.fixture
def convert(tmp_path):
    """Converts with the family's file somewhere else; returns the exit code, and keeps the bundle in `out/mine`."""
    shutil.copy(SOURCE, tmp_path / "my_family.py")
    spec = importlib.util.spec_from_file_location("my_family", tmp_path / "my_family.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.FAMILY.write_random(tmp_path / "random.npz", "captioned", RandomOptions(depth=5))
    config = tmp_path / "mine.py"
    config.write_text(f"""
from vit_convert.config import default_config


def get_config():
    config = default_config()
    config.families = ({str(tmp_path / "my_family.py:FAMILY")!r},)
    config.checkpoint = {str(tmp_path / "random.npz")!r}
    config.engine.backend = "none"
    return config
""")
    return lambda *flags: main(
        ["vit_convert", f"--config={config}", f"--workdir={tmp_path / 'out'}", "--quiet", *flags]
    )


@pytest.mark.parametrize("target", ["rtx", "trt8"])
def test_it_is_converted_and_proved(convert, tmp_path, target):
    assert convert("--config.precision=int8", f"--config.target={target}") == 0
    bundle = Bundle(tmp_path / "out/mine")
    report = json.loads(bundle.report.read_text())
    passed = {name: found["passed"] for name, found in report["checks"].items()}
    assert (report["checkpoint"]["family"], passed) == ("captioned", dict.fromkeys(passed, True))
    assert {"fp32", "int8"} <= set(passed)
    rows = {row["tensor"]: row["passed"] for row in report["checks"]["int8"]["blocks"]}
    # every output is judged, what is inside is reported
    assert rows["scores"] is rows["pair"] is True and rows["block_04"] is None
    graph = ir.load(bundle.onnx()).graph
    assert [(value.name, str(value.dtype)) for value in graph.inputs] == [("images", "FLOAT"), ("caption", "INT32")]
    assert [value.name for value in graph.outputs] == ["scores", "pair"]
    assert {f"block_{i}/fc1/kernel" for i in range(5)} <= set(graph.initializers)
    with np.load(bundle.reference) as reference:
        assert reference["caption"].dtype == np.int32 and set(reference["caption"].ravel()) <= set(range(11))
    signature = read_facts(bundle).signature
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in signature.inputs] == [
        ("images", "float32", ("batch", 8, 8, 3)),
        ("caption", "int32", ("batch", 5)),
    ]
    assert [(output.name, output.judge) for output in signature.outputs] == [("scores", "top1"), ("pair", "embedding")]


def test_a_file_that_is_not_the_familys_is_refused(convert, tmp_path, capsys):
    arrays = dict(np.load(tmp_path / "random.npz"))
    del arrays["block_3/fc2/kernel"]
    np.savez(tmp_path / "random.npz", **arrays)
    assert convert("--config.precision=fp32") == 3
    assert "block_3/fc2/kernel: missing, variant captioned needs (32, 16)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere", "is not module:OBJECT"),
        ("no_such_module:FAMILY", "No module named 'no_such_module'"),
        ("json:dumps", "has no name, layouts"),
    ],
)
def test_what_is_no_family(convert, capsys, place, said):
    assert convert("--config.precision=fp32", f"--config.families=('{place}',)") == 2
    assert said in capsys.readouterr().err
