"""Inputs, tolerance and the other implementations of the parity tests."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def timm_vision_transformer(torchvision_operators):
    """timm's ViT module."""
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.models import vision_transformer

    return vision_transformer


@pytest.fixture
def images():
    """Draws normalised images: float32 [2, height, width, 3] in [-1, 1]."""

    def draw(height=224, width=224):
        return np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)

    return draw


@pytest.fixture
def run():
    """Loads a checkpoint and runs our Flax model at highest matmul precision."""
    from vit_convert.families.load import load_checkpoint
    from vit_convert.families.vit.model import vit_model

    def outputs(path, images, **options):
        loaded = load_checkpoint(path, **options)
        return vit_model(loaded.architecture, loaded.params).run(images)

    return outputs


@pytest.fixture
def assert_close():
    """Holds an output against its reference at 1e-4 of the reference's scale.

    Two float32 implementations that sum in different orders differ by about 1e-6 of the scale after 12 blocks; erf for
    tanh GELU, the smallest mistake there is to make, by 1.5e-4 to 2.1e-4.
    """

    def check(ours, reference, tolerance=1e-4):
        assert ours.shape == reference.shape
        assert np.isfinite(reference).all()
        scale = np.abs(reference).max()
        assert scale > 0.1, "a reference of zeros proves nothing"
        assert np.abs(ours - reference).max() <= tolerance * scale

    return check


@pytest.fixture
def assert_pair_close(assert_close):
    """Holds both towers of a checkpoint against transformers' model on the same pixels and tokens; gives the loaded
    image tower, our embeddings, and what the model gave."""
    from vit_convert.families.load import load_checkpoint

    def check(path, model, pixels, tokens):
        import torch

        with torch.no_grad():
            channels_first = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
            found = model(input_ids=torch.from_numpy(tokens).long(), pixel_values=channels_first)
        image, text = (load_checkpoint(f"{path}:{tower}") for tower in ("img", "txt"))
        ours = image.family.model(image).run(pixels)["embedding"], text.family.model(text).run(tokens)["embedding"]
        assert_close(ours[0], found.image_embeds.numpy())
        assert_close(ours[1], found.text_embeds.numpy())
        return image, ours, found

    return check


@pytest.fixture
def naflex(torchvision_operators, tmp_path):
    """A NaFlex of random weights: its file, and what transformers' model of it makes of patches, masks and sizes."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from safetensors.torch import load_file
    from transformers import Siglip2Config, Siglip2Model

    from vit_convert.families.random import write_random_checkpoint

    path = tmp_path / "naflex.safetensors"
    write_random_checkpoint(path, "SigLIP2-mu/16-naflex", layout="siglip_transformers", depth=2, length=8)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Siglip2Config(
        text_config={**sizes, "vocab_size": 96, "max_position_embeddings": 8, "projection_size": 32},
        vision_config={**sizes, "num_patches": 256, "patch_size": 16},
    )
    config._attn_implementation = "eager"
    model = Siglip2Model(config).eval()
    model.load_state_dict(load_file(path), strict=True)

    def features(patches, mask, shapes):
        given = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        with torch.no_grad():
            found = model.get_image_features(
                **{key: torch.from_numpy(np.asarray(value)) for key, value in given.items()}
            )
        return getattr(found, "pooler_output", found).numpy()

    return path, features
