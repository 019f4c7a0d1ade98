"""INT8 of own models: their linears are found and named whatever they are called, in every stage that speaks of
layers."""

import json

import onnx
import pytest
from own_model import Own

# A transformer whose layers have no name that means anything to us; a Dense for each patch, none for the image.
SOURCE = """
class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="pre")(x)
        q, k, v = (nn.Dense(32, name=name)(y).reshape(x.shape[0], -1, 2, 16) for name in ("eins", "zwei", "drei"))
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q / 4.0, k))
        x = x + nn.Dense(32, name="zurueck")(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape[0], -1, 32))
        return x + nn.Dense(32, name="runter")(nn.gelu(nn.Dense(64, name="hoch")(nn.LayerNorm(name="post")(x))))


class M(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, name="patches")(x.reshape(x.shape[0], 4, -1))
        for name in ("alpha", "beta"):
            x = Mixer(name=name)(x)
        return nn.Dense(5, name="classes")(x.mean(1))


def spread(tree):
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map(lambda leaf: (rng.standard_normal(leaf.shape) / 4).astype(np.float32), tree)
"""
MODEL = "lambda: (M(), spread(variables(M())))"
LAYERS = [
    f"{scope}/{layer}" for scope in ("alpha", "beta") for layer in ("eins", "zwei", "drei", "zurueck", "hoch", "runter")
]
FLAGS = ("--config.precision=int8", "--config.calibration.num_images=4", "--config.calibration.method=minmax")


@pytest.mark.parametrize("target", ["rtx", "trt8"])
def test_linears_between_the_first_and_the_last(tmp_path, target):
    own = Own(tmp_path)
    assert own.convert(SOURCE, MODEL, *FLAGS, f"--config.target={target}") == 0
    assert own.stage("quantize")["checks"]["int8"]["quantized"] == LAYERS
    graph = onnx.load(own.bundle / "model.int8.onnx", load_external_data=False).graph
    stored = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    assert len(stored) == (0 if target == "trt8" else len(LAYERS))
    found = own.stage("quantize") if target == "trt8" else own.stage("quantize")["checks"]["int8"]
    # scopes where there are no blocks
    assert set(found["max_abs_activation"]) >= {"patches", "alpha", "beta", "classes"}


def test_patterns_mean_the_users_own_layers(tmp_path, capsys):
    own = Own(tmp_path)
    flags = ("--config.keep_fp16=('*/runter',)", "--config.keep_fp32=('beta',)")
    assert own.convert(SOURCE, MODEL, *FLAGS, *flags) == 0
    found = own.stage("quantize")["checks"]["int8"]
    assert found["quantized"] == [f"alpha/{layer}" for layer in ("eins", "zwei", "drei", "zurueck", "hoch")]
    assert "keep_fp32" in found["fp32_islands"].values()
    assert own.again(*FLAGS, "--config.quantize_only=('alpha/hoch','patches')") == 0
    assert own.stage("quantize")["checks"]["int8"]["quantized"] == ["patches/patches", "alpha/hoch"]
    assert own.again(*FLAGS, "--config.keep_fp16=('gamma',)") == 2
    assert "keep_fp16: 'gamma' matches no block, layer or node" in capsys.readouterr().err
    assert own.again(*FLAGS, "--config.keep_fp16=('alpha','beta')") == 2
    assert "config.keep_fp16=['alpha', 'beta']: these leave no linear" in capsys.readouterr().err


def test_a_model_without_linears_is_refused(tmp_path, capsys):
    own = Own(tmp_path)
    assert own.convert("", "lambda: (lambda p, x: x.max((1, 2)), {})", *FLAGS) == 2
    assert (
        "no product or convolution of an activation with a constant, so nothing would be quantized"
        in capsys.readouterr().err
    )


def test_sensitivity_and_plan_speak_of_its_layers(tmp_path):
    own = Own(tmp_path)
    flags = (
        "--config.precision=auto",
        "--config.sensitivity=True",  # or no layer is measured alone where all of them together are within the budget
        "--config.calibration.num_images=4",
        "--config.plan.cosine=0.9",
        "--config.calibration.attention=True",
    )
    assert own.convert(SOURCE, MODEL, *flags) == 0
    plan = json.loads((own.bundle / "precision_plan.json").read_text())
    assert {"alpha/eins", "beta/runter", "alpha/scaled_q"} <= set(plan["sites"])
    assert {row["unit"] for row in plan["ranked"]} >= {"alpha/hoch", "beta/runter", "alpha/attention", "beta/attention"}
    saved = tmp_path / "plan.json"
    saved.write_text(json.dumps({"precision": "int8", "sites": ["alpha/hoch", "beta"]}))
    assert own.again("--config.precision=int8", "--config.calibration.num_images=4", f"--config.plan.file={saved}") == 0
    assert own.stage("quantize")["checks"]["int8"]["quantized"] == ["alpha/hoch", *LAYERS[6:]]


def test_smoothing_and_fp8(tmp_path):
    own = Own(tmp_path)
    assert own.convert(SOURCE, MODEL, *FLAGS, "--config.calibration.smooth=0.5", "--config.precision=int8,fp8") == 0
    assert own.stage("calibrate")["smoothed"]["num_norms"] == 4
    assert own.stage("quantize")["checks"]["fp8"]["quantized"] == LAYERS
