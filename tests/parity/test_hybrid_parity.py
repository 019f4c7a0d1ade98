"""Our hybrids against timm's, and against a forward pass in float64 written from vit_jax/models_resnet.py and
models_vit.py."""

import math

import numpy as np
import pytest
from family_files import outputs

from vit_convert.families.family import RandomOptions
from vit_convert.families.hybrid.family import HybridFamily

FAMILY = HybridFamily()


def std_conv(x, kernel, stride=1):
    """[H, W, C] -> [ceil(H / stride), ceil(W / stride), D]: SAME padding, what is odd of it below and to the right."""
    kernel = kernel - kernel.mean((0, 1, 2))
    return conv(x, kernel / (kernel.std((0, 1, 2)) + 1e-5), stride)


def same(x, side, stride, value):
    pads = [max((-(-length // stride) - 1) * stride + side - length, 0) for length in x.shape[:2]]
    return np.pad(x, [(pad // 2, pad - pad // 2) for pad in pads] + [(0, 0)], constant_values=value)


def windows(x, side, stride):
    # [h, w, C, side, side]
    view = np.lib.stride_tricks.sliding_window_view(x, (side, side), (0, 1))[::stride, ::stride]
    return view


def conv(x, kernel, stride):
    side = kernel.shape[0]
    return np.einsum("hwcij,ijcd->hwd", windows(same(x, side, stride, 0.0), side, stride), kernel, optimize=True)


def max_pool(x):
    return windows(same(x, 3, 2, -np.inf), 3, 2).max((-1, -2))


def group_norm(x, scale, bias):
    groups = x.reshape(*x.shape[:2], 32, -1)
    mean = groups.mean((0, 1, 3), keepdims=True)
    variance = ((groups - mean) ** 2).mean((0, 1, 3), keepdims=True)
    return ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale.ravel() + bias.ravel()


def unit(x, leaves, name, stride):
    def normed(y, number):
        return group_norm(y, leaves[f"{name}/gn{number}/scale"], leaves[f"{name}/gn{number}/bias"])

    residual = x
    if f"{name}/conv_proj/kernel" in leaves:
        residual = normed(std_conv(x, leaves[f"{name}/conv_proj/kernel"], stride), "_proj")
    y = np.maximum(normed(std_conv(x, leaves[f"{name}/conv1/kernel"]), 1), 0)
    y = np.maximum(normed(std_conv(y, leaves[f"{name}/conv2/kernel"], stride), 2), 0)
    return np.maximum(residual + normed(std_conv(y, leaves[f"{name}/conv3/kernel"]), 3), 0)


def norm(x, leaves, name):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * leaves[f"{name}/scale"] + leaves[f"{name}/bias"]


def encoder_block(x, leaves, name):
    y = norm(x, leaves, f"{name}/LayerNorm_0")
    attention = f"{name}/MultiHeadDotProductAttention_1"
    query, key, value = (
        np.einsum("td,dhe->hte", y, leaves[f"{attention}/{part}/kernel"]) + leaves[f"{attention}/{part}/bias"][:, None]
        for part in ("query", "key", "value")
    )
    scores = np.exp(query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1]))
    mixed = scores / scores.sum(-1, keepdims=True) @ value
    x = x + np.einsum("hte,hed->td", mixed, leaves[f"{attention}/out/kernel"]) + leaves[f"{attention}/out/bias"]
    y = (
        norm(x, leaves, f"{name}/LayerNorm_2") @ leaves[f"{name}/MlpBlock_3/Dense_0/kernel"]
        + leaves[f"{name}/MlpBlock_3/Dense_0/bias"]
    )
    y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return x + y @ leaves[f"{name}/MlpBlock_3/Dense_1/kernel"] + leaves[f"{name}/MlpBlock_3/Dense_1/bias"]


def forward(image, leaves, stages, depth, table):
    """One image [height, width, 3] in float64; leaves as vit_jax stores them. The taps [C, h, w] or [tokens, width],
    and the result."""
    x = std_conv(image, leaves["conv_root/kernel"], 2)
    x = max_pool(np.maximum(group_norm(x, leaves["gn_root/scale"], leaves["gn_root/bias"]), 0))
    taps = {"root": x.transpose(2, 0, 1)}
    for i, units in enumerate(stages, 1):
        for j in range(units):
            x = unit(x, leaves, f"block{i}/unit{j + 1}", 2 if i > 1 and not j else 1)
            taps[f"stage_{i}/block_{j:02d}"] = x.transpose(2, 0, 1)
    kernel = leaves["embedding/kernel"]
    side = kernel.shape[0]
    x = np.einsum("hwcij,ijcd->hwd", windows(x, side, side), kernel, optimize=True) + leaves["embedding/bias"]
    x = np.concatenate([leaves["cls"][0], x.reshape(-1, x.shape[-1])]) + table[0]
    for i in range(depth):
        x = taps[f"block_{i:02d}"] = encoder_block(x, leaves, f"Transformer/encoderblock_{i}")
    x = norm(x, leaves, "Transformer/encoder_norm")[0]
    return taps, x @ leaves["head/kernel"] + leaves["head/bias"] if "head/kernel" in leaves else x


def check(path, images, assert_close, stages, depth, **asked):
    leaves = {name: leaf.astype(np.float64) for name, leaf in np.load(path).items()}
    ours = outputs(FAMILY, path, images, **asked)
    table = leaves["Transformer/posembed_input/pos_embedding"]
    passes = [forward(image.astype(np.float64), leaves, stages, depth, table) for image in images]
    for tap in passes[0][0]:
        assert_close(ours[tap], np.stack([taps[tap] for taps, _ in passes]))
    assert_close(ours["logits" if "head/kernel" in leaves else "features"], np.stack([result for _, result in passes]))


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize(
    ("variant", "size"), [("R8+ViT-mu/8", (64, 64)), ("R8+ViT-mu/8", (75, 53)), ("R+ViT-mu/16", (64, 128))]
)
def test_float64(tmp_path, images, assert_close, variant, size, head):
    """75x53 has an odd side before every step of two: 75, 38, 19, 10; 53, 27, 14, 7."""
    path = tmp_path / "random.npz"
    FAMILY.write_random(path, variant, RandomOptions(image_size=size, num_classes=10 * head))
    stages = {"R8+ViT-mu/8": (1, 2), "R+ViT-mu/16": ()}[variant]
    check(path, images(*size), assert_close, stages, 1, image_size=size, outputs="logits" if head else "features")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "side", "stages", "depth"),
    [
        ("R26+ViT-S/32", 224, (2, 2, 2, 2), 12),
        ("R26+ViT-S/32", 384, (2, 2, 2, 2), 12),
        # Whose blocks are a ViT's. timm adds its epsilon to the variance of a kernel, not to the deviation: of weights
        # as small as these that is 2e-4 of the logits.
        ("R50+ViT-L/32", 384, (3, 4, 6, 3), 2),
    ],
)
def test_float64_full_size(tmp_path, images, assert_close, variant, side, stages, depth):
    path = tmp_path / "random.npz"
    FAMILY.write_random(path, variant, RandomOptions(image_size=(side, side), depth=depth))
    check(path, images(side, side)[:1], assert_close, stages, depth)


@pytest.mark.parametrize(
    ("variant", "name", "side", "depth"),
    [
        ("R+ViT-Ti/16", "vit_tiny_r_s16_p8_224", 224, 12),
        ("R+ViT-Ti/16", "vit_tiny_r_s16_p8_384", 384, 12),
        pytest.param("R26+ViT-S/32", "vit_small_r26_s32_224", 224, 12, marks=pytest.mark.slow),
        pytest.param("R26+ViT-S/32", "vit_small_r26_s32_384", 384, 12, marks=pytest.mark.slow),
        pytest.param("R26+ViT-B/32", "vit_base_r26_s32_224", 224, 2, marks=pytest.mark.slow),  # its blocks are a ViT's
        pytest.param("R50+ViT-B/16", "vit_base_r50_s16_224", 224, 12, marks=pytest.mark.slow),
    ],
)
def test_timm(timm_vision_transformer, tmp_path, images, assert_close, variant, name, side, depth):
    """The same .npz through timm's own reader, logits and features."""
    import timm
    import torch
    from timm.layers import get_act_layer

    path = tmp_path / "random.npz"
    FAMILY.write_random(path, variant, RandomOptions(image_size=(side, side), depth=depth))
    model = timm.create_model(name, num_classes=1000, depth=depth, act_layer=get_act_layer("gelu_tanh")).eval()
    model.load_pretrained(str(path))
    batch = torch.from_numpy(images(side, side).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        logits, features = (
            model(batch).numpy(),
            model.forward_head(model.forward_features(batch), pre_logits=True).numpy(),
        )
    assert_close(outputs(FAMILY, path, images(side, side))["logits"], logits)
    assert_close(outputs(FAMILY, path, images(side, side), outputs="features")["features"], features)
