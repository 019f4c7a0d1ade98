"""Our Mixer against timm's, and against a forward pass in float64 written from vit_jax/models_mixer.py one formula at a
time."""

import math

import numpy as np
import pytest
from family_files import outputs

from vit_convert.families.family import RandomOptions
from vit_convert.families.mixer.family import MixerFamily

FAMILY = MixerFamily()


def norm(x, leaves, name):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * leaves[f"{name}/scale"] + leaves[f"{name}/bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def forward(image, leaves, depth):
    """One image [height, width, 3] in float64; leaves as vit_jax stores them. The stream after each half block, and the
    result."""
    kernel = leaves["stem/kernel"]
    side = kernel.shape[0]
    rows, columns = image.shape[0] // side, image.shape[1] // side
    patches = image.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
    x = patches @ kernel.reshape(-1, kernel.shape[-1]) + leaves["stem/bias"]
    streams = []
    for i in range(depth):
        mlp = {
            f"{m}{d}": leaves[f"MixerBlock_{i}/{m}_mixing/Dense_{d}/kernel"]
            for m in ("token", "channel")
            for d in (0, 1)
        }
        bias = {
            f"{m}{d}": leaves[f"MixerBlock_{i}/{m}_mixing/Dense_{d}/bias"] for m in ("token", "channel") for d in (0, 1)
        }
        y = norm(x, leaves, f"MixerBlock_{i}/LayerNorm_0")
        hidden = gelu(np.einsum("nd,ns->sd", y, mlp["token0"]) + bias["token0"][:, None])
        x = x + np.einsum("sd,sn->nd", hidden, mlp["token1"]) + bias["token1"][:, None]
        streams.append(x)
        y = norm(x, leaves, f"MixerBlock_{i}/LayerNorm_1")
        x = x + gelu(y @ mlp["channel0"] + bias["channel0"]) @ mlp["channel1"] + bias["channel1"]
        streams.append(x)
    x = norm(x, leaves, "pre_head_layer_norm").mean(0)
    return streams, x @ leaves["head/kernel"] + leaves["head/bias"] if "head/kernel" in leaves else x


@pytest.mark.parametrize(("head", "layout"), [(True, "mixer"), (True, "mixer_old"), (False, "mixer")])
def test_float64(tmp_path, images, assert_close, head, layout):
    written, plain = tmp_path / "written.npz", tmp_path / "plain.npz"
    options = {"image_size": (224, 224), "num_classes": 1000 * head, "depth": 3}
    FAMILY.write_random(written, "Mixer-S/16", RandomOptions(**options, layout=layout))
    FAMILY.write_random(plain, "Mixer-S/16", RandomOptions(**options))
    ours = outputs(FAMILY, written, images(), outputs="logits" if head else "features")
    leaves = {name: leaf.astype(np.float64) for name, leaf in np.load(plain).items()}
    passes = [forward(image.astype(np.float64), leaves, 3) for image in images()]
    assert_close(ours["logits" if head else "features"], np.stack([result for _, result in passes]))
    taps = [f"block_{i:02d}{part}" for i in range(3) for part in ("/token_mixing", "")]
    for tap, streams in zip(taps, zip(*(streams for streams, _ in passes))):
        assert_close(ours[tap], np.stack(streams))


def torch_state(leaves, depth):
    """timm's names for the leaves of a vit_jax file; torch stores matrices as (out, in) and convolutions as OIHW."""
    state = {
        "stem.proj.weight": leaves["stem/kernel"].transpose(3, 2, 0, 1),
        "stem.proj.bias": leaves["stem/bias"],
        "norm.weight": leaves["pre_head_layer_norm/scale"],
        "norm.bias": leaves["pre_head_layer_norm/bias"],
        "head.weight": leaves["head/kernel"].T,
        "head.bias": leaves["head/bias"],
    }
    for i in range(depth):
        ours, theirs = f"MixerBlock_{i}", f"blocks.{i}"
        for j, mixing in enumerate(("token", "channel")):
            state[f"{theirs}.norm{j + 1}.weight"] = leaves[f"{ours}/LayerNorm_{j}/scale"]
            state[f"{theirs}.norm{j + 1}.bias"] = leaves[f"{ours}/LayerNorm_{j}/bias"]
            for layer in (0, 1):
                state[f"{theirs}.mlp_{mixing}s.fc{layer + 1}.weight"] = leaves[
                    f"{ours}/{mixing}_mixing/Dense_{layer}/kernel"
                ].T
                state[f"{theirs}.mlp_{mixing}s.fc{layer + 1}.bias"] = leaves[
                    f"{ours}/{mixing}_mixing/Dense_{layer}/bias"
                ]
    return state


@pytest.mark.parametrize(
    ("variant", "depth"),
    [("Mixer-S/32", 8), pytest.param("Mixer-B/16", 12, marks=pytest.mark.slow)],
    ids=lambda value: str(value),
)
def test_timm(torchvision_operators, tmp_path, images, assert_close, variant, depth):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.layers import get_act_layer
    from timm.models.mlp_mixer import MlpMixer

    path = tmp_path / "random.npz"
    FAMILY.write_random(path, variant, RandomOptions())
    width = {"Mixer-S/32": 512, "Mixer-B/16": 768}[variant]
    model = MlpMixer(
        patch_size=int(variant.split("/")[1]), embed_dim=width, num_blocks=depth, act_layer=get_act_layer("gelu_tanh")
    ).eval()
    state = {
        name: torch.from_numpy(np.ascontiguousarray(leaf))
        for name, leaf in torch_state(dict(np.load(path)), depth).items()
    }
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        reference = model(torch.from_numpy(images().transpose(0, 3, 1, 2).copy())).numpy()
    assert_close(outputs(FAMILY, path, images())["logits"], reference)
