"""NaFlex on photographs of several aspects: our patches against transformers' image processor, and what the tower makes
of them against transformers' model on the same random weights."""

import itertools

import numpy as np
import pytest

from vit_convert.families.load import load_checkpoint
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


def test_photographs(processing, photographs, naflex, assert_close):
    given = processing.Siglip2ImageProcessorPil(patch_size=16, max_num_patches=256)(photographs, return_tensors="np")
    patches, coordinates, mask = map(np.stack, zip(*(image_patches(image, 16, 256) for image in photographs)))
    np.testing.assert_array_equal(mask, given["pixel_attention_mask"])
    np.testing.assert_array_equal(coordinates.max(1) + 1, given["spatial_shapes"])
    # Both resize by Pillow to whole levels: one level is 2 / 255.
    np.testing.assert_allclose(patches, given["pixel_values"], atol=1e-6)
    path, features = naflex
    found = features(*(given[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")))
    loaded = load_checkpoint(f"{path}:img", normalize=False)
    embeddings = loaded.family.model(loaded).run(patches, coordinates, mask)["embedding"]
    assert_close(embeddings, found)
    assert np.abs(embeddings - embeddings[:1]).max() > 0.1  # they are not all the same
