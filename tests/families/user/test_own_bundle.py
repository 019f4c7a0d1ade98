"""A bundle of an own model is read where its code is not, and is fresh exactly as long as the model is what it was."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from own_model import Own

from vit_convert.core import config as configs
from vit_convert.core.bundle import Bundle
from vit_convert.engine.handoff import read_config, read_facts
from vit_convert.families.user.model import user_model

SOURCE = """
class M(nn.Module):
    act: str = "relu"

    @nn.compact
    def __call__(self, x, train=False):
        x = getattr(nn, self.act)(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(5)(nn.Dropout(0.5, deterministic=not train)(pooled(x))) + LATER


LATER = np.arange(5, dtype=np.float32)
"""
MODEL = "lambda: (M(), variables(M()))"


def statuses(own: Own) -> set[str]:
    return {row["status"] for row in own.report()["stages"]}


def test_the_same_config_is_fresh_in_another_process(tmp_path):
    own = Own(tmp_path)
    assert own.convert(SOURCE, MODEL) == 0
    command = [
        sys.executable,
        "-m",
        "vit_convert",
        f"--config={own.config}",
        f"--workdir={tmp_path / 'out'}",
        "--quiet",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_NUMPY_DTYPE_PROMOTION": "standard",
        "PYTHONHASHSEED": "7",
    }
    subprocess.run(command, check=True, env=environment)
    assert statuses(own) == {"fresh"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('act: str = "relu"', 'act: str = "gelu"'),  # another function
        ("nn.BatchNorm(", "nn.BatchNorm(epsilon=1e-3, "),  # another constant in it
        ("dtype=np.float32)\n", "dtype=np.float32) + 1e-6\n"),  # another array that it holds
        ("default_rng(0)", "default_rng(1)"),  # other parameters
        ("/ 6 + 0.1)", "/ 6 + 0.1000001)"),
    ],
)
def test_another_model_is_not(tmp_path, before, after):
    own = Own(tmp_path)
    assert own.convert(SOURCE, MODEL, "--until=export") == 0
    text = own.config.read_text()
    assert before in text
    own.config.write_text(text.replace(before, after))
    assert own.again("--until=export") == 0
    assert statuses(own) == {"done"}
    own.config.write_text(f"# a remark\n{own.config.read_text()}")
    assert own.again("--until=export") == 0
    assert statuses(own) == {"fresh"}  # the model is the one that it was


def test_identity_sees_every_leaf_and_every_bit():
    def identity(params, scale=2.0):
        return user_model(lambda p, x: x.mean((1, 2)) @ p["w"] * scale, params, image_shape=(4, 4, 3)).identity

    w = np.ones((3, 5), np.float32)
    nudged = w.copy()
    nudged[2, 4] = np.nextafter(np.float32(1), np.float32(2))
    trees = [
        {"w": w},
        {"w": nudged},
        {"w": w, "unused": np.int32(3)},
        {"w": w, "unused": np.int32(4)},
        {"w": w, "unused": jax.random.key(3)},
        {"w": w, "unused": jax.random.key(4)},
        {"w": w, "unused": "text"},
        {"w": w.astype(np.float64)},
        {"w": jnp.asarray(w, jnp.bfloat16)},
    ]
    found = [identity(tree) for tree in trees]
    assert len(set(found)) == len(trees)
    assert found == [identity(tree) for tree in trees]
    assert identity(trees[0], 3.0) != found[0]
    # an array that the function holds, of which JAX writes but a part
    large = np.zeros(4096, np.float32)
    other = large.copy()
    other[2000] = 1

    def holding(array):
        held = jax.jit(lambda x: x.mean((1, 2)) @ jnp.ones((3, 5)) + array.sum() + jnp.asarray(array)[:5])
        return user_model(lambda p, x: held(x), {}, image_shape=(4, 4, 3)).identity

    assert holding(large) != holding(other) and holding(large) == holding(large.copy())


def test_config_names_the_function_and_not_its_address(tmp_path):
    own = Own(tmp_path)
    assert own.convert(SOURCE, MODEL) == 0
    saved = json.loads((own.bundle / "config.json").read_text())["model"]
    assert saved["function"] == "get_config.<locals>.<lambda>" and saved["file"] == str(own.config)
    assert len(saved["sha256"]) == 64
    assert "0x" not in (own.bundle / "config.json").read_text()
    assert own.stage("checkpoint")["model"].items() > saved.items()


def test_a_copied_bundle_is_read_without_the_code(tmp_path):
    own = Own(tmp_path)
    assert own.convert(SOURCE, MODEL) == 0
    elsewhere = Bundle(shutil.copytree(own.bundle, tmp_path / "elsewhere"))
    shutil.rmtree(own.bundle)
    own.config.unlink()
    config = read_config(elsewhere)
    configs.check_values(config)
    assert config.image_size == (16, 16) or list(config.image_size) == [16, 16]
    assert config.model is not None
    # and may be written again
    assert configs.as_plain(config)["model"] == json.loads(elsewhere.config.read_text())["model"]
    assert read_facts(elsewhere).output == "logits"


def test_a_description_is_no_model(tmp_path, capsys):
    """The resolved config of a bundle tells which model it was; it does not hold it."""
    own = Own(tmp_path)
    assert own.convert(SOURCE, MODEL, "--until=checkpoint") == 0
    own.convert(SOURCE, "None", "--until=checkpoint")
    text = own.config.read_text().replace(
        "config.model = None",
        f"config.model = __import__('json').load(open({str(own.bundle / 'config.json')!r}))['model']",
    )
    own.config.write_text(text)
    assert own.again() == 2
    assert "it must be a function that returns the model" in capsys.readouterr().err
    assert isinstance(configs.default_config(), ml_collections.ConfigDict)
