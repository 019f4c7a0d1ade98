"""After conversions that are killed, out of disk, shut out of their folder or two at a time, the next one gets every
file right."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_after_any_accident_every_file_is_right(tmp_path):
    """A process of its own, which forks: nothing in it may have started JAX."""
    words = [f"--workdir={tmp_path}/yard", "--kills=20", "--others=2", f"--output={tmp_path}/found.json"]
    done = subprocess.run(
        [sys.executable, "accidents.py", *words], cwd=BENCHMARKS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (
        found["accidents"] == {"kill": 20, "full disk": 2, "read-only": 2, "two at a time": 2} and found["wrong"] == []
    )
    assert found["files_compared"] >= 3 * 26 and len(found["kills_by_stage"]) > 3


def test_another_models_graph_is_seen(tmp_path, monkeypatch):
    """What the yard looks for is found where it is put: another model's graph, a file that nobody left, a report of
    another checkpoint."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import float64_vit
    import yard as module

    from vit_convert.convert import convert
    from vit_convert.core.config import complete, default_config
    from vit_convert.families.random import write_random_checkpoint

    for number, name in enumerate("ab"):
        write_random_checkpoint(tmp_path / f"{name}.npz", "mu/16", image_size=(32, 32), num_classes=10, seed=number)
        config = default_config()
        config.checkpoint, config.precision, config.engine.backend = str(tmp_path / f"{name}.npz"), "fp16", "none"
        convert(complete(config, "x"), tmp_path / name, quiet=True)
    yard = object.__new__(module.Yard)
    yard.folder, yard.bundle, yard._counts = tmp_path, tmp_path / "a" / "x", dict.fromkeys(module.KINDS, 0)

    def look(model="a", kind="fp16"):
        wrong = []
        yard.look(module.Command(model, kind), wrong)
        return " ".join(wrong)

    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "a" / "x" / "model.onnx").run(None, {"images": images})
    np.testing.assert_allclose(
        logits, float64_vit.forward(tmp_path / "a.npz", images), atol=1e-5
    )  # float32's rounding of logits of order 1
    assert look() == ""
    wrong = look("b")
    assert all(
        words in wrong
        for words in ("model.onnx is off", "model.fp16.onnx is off", "reference.npz is of another", "the report is of")
    )
    assert "there are" in look(kind="int8")
    for name in ("model.fp16.onnx", "model.fp16.onnx.data"):
        (yard.bundle / name).write_bytes((tmp_path / "b" / "x" / name).read_bytes())
    assert "model.fp16.onnx is off" in look() and "model.onnx is off" not in look()
    (yard.bundle / ".model.onnx.1-2.tmp").touch()
    assert "not of this conversion: ['.model.onnx.1-2.tmp']" in look()
