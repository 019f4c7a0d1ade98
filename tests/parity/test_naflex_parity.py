"""NaFlex on photographs of several aspects: our patches against transformers' image processor, and what the tower makes
of them against transformers' model on the same random weights."""

import itertools

import numpy as np
import pytest

from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint
from vit_convert.images.patches import image_patches, patch_grid

SHAPES = [(427, 640), (640, 427), (120, 500), (333, 333), (30, 41)]  # parts of a photograph, in pixels


@pytest.fixture(scope="module")
def processing(torchvision_operators):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.siglip2 import image_processing_pil_siglip2 as module

    return module


@pytest.fixture(scope="module")
def photographs():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    images = [np.asarray(datasets.load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    turned = [images[0], np.ascontiguousarray(images[1].transpose(1, 0, 2)), *itertools.repeat(images[1], 3)]
    return [np.ascontiguousarray(image[:height, :width]) for image, (height, width) in zip(turned, SHAPES)]


def test_sizes_are_transformers(processing):
    generator = np.random.default_rng(0)
    for height, width in generator.integers(8, 3000, (200, 2)).tolist():
        for patch, length in ((16, 256), (14, 729), (16, 64)):
            right = processing.get_image_size_for_max_num_patches(height, width, patch, length)
            assert patch_grid(height, width, patch, length) == (right[0] // patch, right[1] // patch), (height, width)


def test_photographs(processing, photographs, tmp_path, assert_close):
    import torch
    from safetensors.torch import load_file
    from transformers import Siglip2Config, Siglip2Model

    given = processing.Siglip2ImageProcessorPil(patch_size=16, max_num_patches=256)(photographs, return_tensors="np")
    patches, coordinates, mask = map(np.stack, zip(*(image_patches(image, 16, 256) for image in photographs)))
    np.testing.assert_array_equal(mask, given["pixel_attention_mask"])
    np.testing.assert_array_equal(coordinates.max(1) + 1, given["spatial_shapes"])
    # Both resize by Pillow to whole levels: one level is 2 / 255.
    np.testing.assert_allclose(patches, given["pixel_values"], atol=1e-6)
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
    names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    with torch.no_grad():
        found = model.get_image_features(**{name: torch.from_numpy(np.asarray(given[name])) for name in names})
    found = getattr(found, "pooler_output", found).numpy()
    loaded = load_checkpoint(f"{path}:img", normalize=False)
    embeddings = loaded.family.model(loaded).run(patches, coordinates, mask)["embedding"]
    assert_close(embeddings, found)
    assert np.abs(embeddings - embeddings[:1]).max() > 0.1  # they are not all the same
