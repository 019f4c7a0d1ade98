"""A user's own module goes the whole way through the command line, whatever it is written in."""

import json
import pathlib

import numpy as np
import onnx_ir as ir
import pytest

from vit_convert.__main__ import main

# Each config file holds a one-block transformer on 32x48 images: patches, attention, MLP, mean, head.
HEADER = """
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vit_convert.core.config import default_config

WIDTH, HEADS, PATCH = 32, 2, 16


def config_of(model):
    config = default_config()
    config.model = model
    config.image_size = (32, 48)
    config.engine.backend = "none"
    config.precision = "fp32"
    return config
"""
LINEN = """
class Tiny(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(WIDTH, (PATCH, PATCH), strides=(PATCH, PATCH), padding="VALID", name="embedding")(images)
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = taps_block = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(nn.LayerNorm(name="norm1")(x))
        y = nn.Dense(64, name="fc1")(nn.LayerNorm(use_fast_variance=False, use_bias=False, name="norm2")(x))
        x = x + nn.Dense(WIDTH, use_bias=False, name="fc2")(nn.gelu(y))
        return nn.Dense(5, name="head")(x.mean(1)), {"after_attention": taps_block}


def variables():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Tiny().init, jax.random.key(0), jnp.zeros((1, 32, 48, 3)))
    return jax.tree_util.tree_map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / 6, shapes)
"""
NNX = """
class Tiny(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Conv(3, WIDTH, (PATCH, PATCH), strides=(PATCH, PATCH), padding="VALID", rngs=rngs)
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, use_fast_variance=False, rngs=rngs)
        self.fc1 = nnx.Linear(WIDTH, 64, rngs=rngs)
        self.fc2 = nnx.Linear(64, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, images):
        x = self.embedding(images)
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = x + self.attention(self.norm1(x))
        x = x + self.fc2(nnx.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


def tiny():
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: Tiny(nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree_util.tree_map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)
    / 6, state))
"""
FUNCTION = """
def norm(x, scale, bias):
    deviation = x - x.mean(-1, keepdims=True)
    return deviation * jax.lax.rsqrt((deviation**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def forward(params, images):
    x = images.reshape(images.shape[0], 2, PATCH, 3, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(images.shape[0], 6, -1)
    x = x @ params["embedding"]
    y = norm(x, *params["norm1"])
    q, k, v = (jnp.einsum("bsd,dhk->bshk", y, kernel) for kernel in params["qkv"])
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4.0)
    x = x + jnp.einsum("bshk,hkd->bsd", jnp.einsum("bhqk,bkhd->bqhd", weights, v), params["out"])
    y = norm(x, *params["norm2"])
    x = x + jax.nn.gelu(y @ params["fc1"], approximate=False) @ params["fc2"]
    return x.mean(1) @ params["head"]


def params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32) / 6
    return {
        "embedding": draw(PATCH * PATCH * 3, WIDTH),
        "norm1": [1 + draw(1, 1, WIDTH), draw(1, 1, WIDTH)],
        "qkv": [draw(WIDTH, 2, 16) for _ in range(3)],
        "out": draw(2, 16, WIDTH),
        "norm2": [1 + draw(1, 1, WIDTH), draw(1, 1, WIDTH)],
        "fc1": draw(WIDTH, 64),
        "fc2": draw(64, WIDTH),
        "head": draw(WIDTH, 5),
    }
"""
MODELS = {
    "linen": (LINEN, "lambda: (Tiny(), variables())"),
    "linen_params": (LINEN, 'lambda: (Tiny(), variables()["params"])'),
    "nnx": (NNX, "lambda: tiny()"),
    "function": (FUNCTION, "lambda: (forward, params())"),
}


def convert(folder: pathlib.Path, source: str, model: str, *flags: str) -> int:
    config = folder / "mine.py"
    config.write_text(f"{HEADER}\n{source}\n\ndef get_config():\n    return config_of({model})\n")
    return main(["vit_convert", f"--config={config}", f"--workdir={folder / 'out'}", "--quiet", *flags])


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("linen", "trt8"),
        ("linen", "rtx"),
        ("linen_params", "rtx"),
        ("nnx", "rtx"),
        ("function", "trt8"),
        ("function", "rtx"),
    ],
)
def test_user_model(tmp_path, name, target):
    assert convert(tmp_path, *MODELS[name], f"--config.target={target}") == 0
    report = json.loads((tmp_path / "out/mine/report.json").read_text())
    assert report["status"] == "done"
    assert report["check"]["passed"]
    assert report["checkpoint"]["family"] == "user"
    with np.load(tmp_path / "out/mine/reference.npz") as reference:
        expected = {"images", "logits", "after_attention"} if name.startswith("linen") else {"images", "logits"}
        assert set(reference.files) == expected
        assert reference["logits"].shape == (4, 5)
        assert np.abs(reference["logits"]).max() > 0.1
    graph = ir.load(tmp_path / "out/mine/model.onnx").graph
    operators = [node.op_type for node in graph]
    assert "Einsum" not in operators
    assert operators.count("Softmax") == 1
    assert operators.count("LayerNormalization") == 2
    assert operators.count("Gelu") == (0 if target == "trt8" else 1)
    assert operators.count("Shape") <= 1
    # A block of each costs what a ViT's does (30, and 34 without Gelu), with room for the patches, the mean and the
    # head.
    assert len(operators) <= (42 if target == "trt8" else 38)
    assert any("fc1" in value for value in graph.initializers)


def test_linen_module_without_variables(tmp_path, capsys):
    assert convert(tmp_path, LINEN, "lambda: Tiny()") == 2
    assert "a Linen module needs its variables" in capsys.readouterr().err


def test_object_that_is_no_model(tmp_path, capsys):
    assert convert(tmp_path, LINEN, "lambda: 3") == 2
    assert "neither a Linen module, an NNX module nor a function" in capsys.readouterr().err


def test_image_size_is_asked_for(tmp_path, capsys):
    assert (
        convert(
            tmp_path,
            LINEN.replace("def variables", "default = config_of\n\n\ndef variables"),
            MODELS["linen"][1],
            "--config.image_size=",
        )
        == 2
    )
    assert "config.image_size is not" in capsys.readouterr().err


def test_model_that_cannot_be_traced(tmp_path, capsys):
    source = "def forward(params, images):\n    return jnp.linalg.eigvals(images[:, :3, :3, 0]).real\n"
    assert convert(tmp_path, source, "lambda: (forward, {})") == 4
    assert "jax2onnx could not trace the model" in capsys.readouterr().err


def test_change_of_a_users_model_is_noticed(tmp_path):
    """Nothing tells whether a function returns what it did, so its stages always run again."""
    assert convert(tmp_path, *MODELS["function"]) == 0
    assert convert(tmp_path, FUNCTION.replace("default_rng(0)", "default_rng(1)"), MODELS["function"][1]) == 0
    report = json.loads((tmp_path / "out/mine/report.json").read_text())
    assert {row["status"] for row in report["stages"]} == {"done"}
