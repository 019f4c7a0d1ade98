"""Our Swin against timm's and transformers', from files that these wrote themselves, and against a forward pass in
float64."""

import math

import numpy as np
import pytest
from family_files import load, outputs
from safetensors.numpy import load_file

from vit_convert.families.family import RandomOptions
from vit_convert.families.swin.family import SwinFamily
from vit_convert.families.swin.module import to_windows

FAMILY = SwinFamily()
ERF = np.vectorize(math.erf, otypes=[np.float64])


def norm(x, leaves, name):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * leaves[f"{name}.weight"] + leaves[f"{name}.bias"]


def dense(x, leaves, name):
    return x @ leaves[f"{name}.weight"].T + leaves.get(f"{name}.bias", 0.0)


def attention(tokens, places, leaves, name, heads, window, regions):
    """One window's tokens [N, C]; places and regions of each token in the image that was rolled."""
    query, key, value = np.split(dense(tokens, leaves, f"{name}.qkv"), 3, axis=-1)
    size = tokens.shape[-1] // heads
    result = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = query[:, part] @ key[:, part].T / math.sqrt(size)
        for i, (row, column) in enumerate(places):
            for j, (other_row, other_column) in enumerate(places):
                index = (row - other_row + window - 1) * (2 * window - 1) + column - other_column + window - 1
                scores[i, j] += leaves[f"{name}.relative_position_bias_table"][index, head]
                scores[i, j] -= 100 * (regions[i] != regions[j])
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        result.append(scores / scores.sum(-1, keepdims=True) @ value[:, part])
    return dense(np.concatenate(result, -1), leaves, f"{name}.proj")


def block(x, leaves, name, heads, window, shift):
    """[H, W, C], after models/swin_transformer.py's SwinTransformerBlock."""
    rows, columns, _ = x.shape
    y = np.roll(norm(x, leaves, f"{name}.norm1"), (-shift, -shift), (0, 1))
    side = [
        np.digitize(np.arange(length), [length - window, length - shift]) if shift else np.zeros(length, int)
        for length in (rows, columns)
    ]
    out = np.zeros_like(y)
    places = [(i, j) for i in range(window) for j in range(window)]
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            tokens = y[top : top + window, left : left + window].reshape(window * window, -1)
            regions = [(side[0][top + i], side[1][left + j]) for i, j in places]
            mixed = attention(tokens, places, leaves, f"{name}.attn", heads, window, regions)
            out[top : top + window, left : left + window] = mixed.reshape(window, window, -1)
    x = x + np.roll(out, (shift, shift), (0, 1))
    y = dense(norm(x, leaves, f"{name}.norm2"), leaves, f"{name}.mlp.fc1")
    return x + dense(0.5 * y * (1 + ERF(y / math.sqrt(2))), leaves, f"{name}.mlp.fc2")


def forward(image, leaves, depths, heads, window):
    """One image [height, width, 3] in float64; leaves as Microsoft names them. The stream [H, W, C] after each block,
    and the result."""
    rows, columns = image.shape[0] // 4, image.shape[1] // 4
    patches = image.reshape(rows, 4, columns, 4, 3).transpose(0, 2, 4, 1, 3).reshape(rows, columns, 48)
    x = patches @ leaves["patch_embed.proj.weight"].reshape(-1, 48).T + leaves["patch_embed.proj.bias"]
    x = norm(x, leaves, "patch_embed.norm")
    taps = {}
    for stage, depth in enumerate(depths):
        for i in range(depth):
            shift = window // 2 if i % 2 and min(x.shape[:2]) > window else 0
            x = taps[f"stage_{stage}/block_{i:02d}"] = block(
                x, leaves, f"layers.{stage}.blocks.{i}", heads[stage], window, shift
            )
        if stage < len(depths) - 1:
            x = np.concatenate([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], -1)
            x = dense(
                norm(x, leaves, f"layers.{stage}.downsample.norm"), leaves, f"layers.{stage}.downsample.reduction"
            )
    x = norm(x, leaves, "norm").mean((0, 1))
    return taps, dense(x, leaves, "head") if "head.weight" in leaves else x


@pytest.mark.parametrize(("window", "size", "head"), [(7, (56, 112), True), (7, (56, 56), False), (4, (64, 64), True)])
def test_float64(tmp_path, images, assert_close, window, size, head):
    path = tmp_path / "random.safetensors"
    FAMILY.write_random(
        path, f"Swin-mu/{window}", RandomOptions(image_size=size, num_classes=10 * head, layout="swin_microsoft")
    )
    leaves = {name: leaf.astype(np.float64) for name, leaf in load_file(path).items()}
    batch = images(*size)
    ours = outputs(FAMILY, path, batch, image_size=size, outputs="logits" if head else "features")
    passes = [forward(image.astype(np.float64), leaves, (2, 2), (1, 2), window) for image in batch]
    assert_close(ours["logits" if head else "features"], np.stack([result for _, result in passes]))
    for tap in passes[0][0]:
        assert_close(ours[tap], np.asarray(to_windows(np.stack([taps[tap] for taps, _ in passes]), window)))


def filled(torch, model):
    """The model with values in which every part shows: biases that are not zero, tables that are not flat."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias_table"):
            parameter.data = values
        elif parameter.ndim == 1:
            parameter.data = 0.1 * values + ("norm" in name and name.endswith("weight"))
        else:
            parameter.data = values / math.sqrt(parameter[0].numel())
    return model.eval()


def run_torch(torch, model, images):
    with torch.no_grad():
        result = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    return getattr(result, "logits", result).numpy()


SMALL = {"embed_dim": 32, "depths": (2, 4), "num_heads": (1, 2)}


@pytest.mark.parametrize(("window", "side", "classes"), [(7, 56, 1000), (12, 96, 21841)])
def test_timm(torchvision_operators, tmp_path, images, assert_close, window, side, classes):
    """Of a file that timm's state dict makes; every block, the logits, and the features."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("timm", reason="timm is not installed")
    from safetensors.torch import save_file
    from timm.models.swin_transformer import SwinTransformer

    model = filled(torch, SwinTransformer(img_size=side, window_size=window, num_classes=classes, **SMALL))
    path = tmp_path / "timm.safetensors"
    save_file(model.state_dict(), path)
    seen = []
    for stage in model.layers:
        for each in stage.blocks:
            each.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().numpy()))
    reference = run_torch(torch, model, images(side, side))
    assert load(FAMILY, path, image_size=(side, side)).layout.value == "swin_timm"
    ours = outputs(FAMILY, path, images(side, side), image_size=(side, side))
    assert_close(ours["logits"], reference)
    for tap, stream in zip(
        ["stage_0/block_00", "stage_0/block_01", *(f"stage_1/block_{i:02d}" for i in range(4))], seen, strict=True
    ):
        assert_close(ours[tap], np.asarray(to_windows(stream, window)))
    model.reset_classifier(0)
    features = outputs(FAMILY, path, images(side, side), image_size=(side, side), outputs="features")["features"]
    assert_close(features, run_torch(torch, model, images(side, side)))


@pytest.mark.parametrize(("window", "side"), [(7, 112), (12, 96)])
def test_transformers(torchvision_operators, tmp_path, images, assert_close, window, side):
    """Of the folder that transformers' save_pretrained writes, config.json and all."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.SwinConfig(image_size=side, window_size=window, num_labels=10, **SMALL)
    model = filled(torch, transformers.SwinForImageClassification(config))
    model.save_pretrained(tmp_path)
    found = load(FAMILY, tmp_path / "model.safetensors")
    assert (found.layout.value, found.image_size) == ("swin_transformers", (side, side))
    ours = outputs(FAMILY, tmp_path / "model.safetensors", images(side, side))
    assert_close(ours["logits"], run_torch(torch, model, images(side, side)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_base_patch4_window12_384"])
def test_timm_full_size(torchvision_operators, tmp_path, images, assert_close, name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from safetensors.torch import save_file

    model, side = filled(torch, timm.create_model(name)), int(name[-3:])
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    found = load(FAMILY, tmp_path / "timm.safetensors")
    assert (found.variant, found.image_size) == ({224: "Swin-T/7", 384: "Swin-B/12"}[side], (side, side))
    batch = images(side, side)[:1]
    assert_close(outputs(FAMILY, tmp_path / "timm.safetensors", batch)["logits"], run_torch(torch, model, batch))
