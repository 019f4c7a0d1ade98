"""The same .npz through timm's own reader and its PyTorch ViT."""

import numpy as np
import pytest

from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint

SIZES = {
    "Ti/16": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "S/32": {"patch_size": 32, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "S/16-gap-norep": {
        "patch_size": 16,
        "embed_dim": 384,
        "depth": 12,
        "num_heads": 6,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    },
}


def timm_model(vision_transformer, variant, **options):
    from timm.layers import get_act_layer

    return vision_transformer.VisionTransformer(
        act_layer=get_act_layer("gelu_tanh"), **SIZES[variant], **options
    ).eval()


def timm_logits(model, images):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


@pytest.mark.parametrize("variant", SIZES)
def test_same_file_same_logits(timm_vision_transformer, tmp_path, images, run, assert_close, variant):
    path = tmp_path / "random.npz"
    write_random_checkpoint(path, variant)
    model = timm_model(timm_vision_transformer, variant)
    model.load_pretrained(str(path))
    assert_close(run(path, images())["logits"], timm_logits(model, images()))


def test_second_image_size(timm_vision_transformer, tmp_path, images, run, assert_close):
    path = tmp_path / "random.npz"
    write_random_checkpoint(path, "S/32")
    model = timm_model(timm_vision_transformer, "S/32", img_size=384)
    model.load_pretrained(str(path))
    # timm resamples with half-pixel centres and an antialiasing bicubic filter, vit_jax linearly with aligned corners:
    # give it our table.
    params = load_checkpoint(path, image_size=(384, 384)).params
    row = np.load(path)["Transformer/posembed_input/pos_embedding"][:, :1]
    table = np.concatenate([row, params["pos_embedding"]], axis=1)
    assert np.abs(model.pos_embed.detach().numpy() - table).max() > 0.01
    import torch

    model.pos_embed.data = torch.from_numpy(table)
    assert_close(run(path, images(384, 384), image_size=(384, 384))["logits"], timm_logits(model, images(384, 384)))


def test_blocks_agree_one_by_one(timm_vision_transformer, tmp_path, images, run, assert_close):
    path = tmp_path / "random.npz"
    write_random_checkpoint(path, "Ti/16")
    model = timm_model(timm_vision_transformer, "Ti/16")
    model.load_pretrained(str(path))
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().numpy()))
    timm_logits(model, images())
    taps = run(path, images())
    assert len(seen) == 12
    for i, reference in enumerate(seen):
        assert_close(taps[f"block_{i:02d}"], reference)
