"""Our CLIP towers against transformers' CLIP on the same file of random weights, with OpenAI's activation and
LAION's."""

import numpy as np
import pytest

from vit_convert.families.clip.variants import parse_variant
from vit_convert.families.random import write_random_checkpoint

ACTIVATIONS = {"CLIP": "quick_gelu", "OpenCLIP": "gelu"}


@pytest.mark.parametrize(
    ("variant", "side", "depth"),
    [
        ("CLIP-mu/16", 64, None),
        ("OpenCLIP-mu/16", 48, 3),
        pytest.param("CLIP-B/32", 224, None, marks=pytest.mark.slow),
    ],
)
def test_transformers(torchvision_operators, tmp_path, images, assert_close, assert_pair_close, variant, side, depth):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from safetensors.torch import load_file
    from transformers import CLIPConfig, CLIPModel

    path = tmp_path / "model.safetensors"
    write_random_checkpoint(path, variant, image_size=(side, side), depth=depth)
    parsed = parse_variant(variant)

    def sizes(row):
        return {
            "hidden_size": row.width,
            "intermediate_size": row.mlp_dim,
            "num_hidden_layers": depth or row.depth,
            "num_attention_heads": row.num_heads,
            "hidden_act": ACTIVATIONS[parsed.kind],
        }

    special = {"bos_token_id": parsed.vocabulary - 2, "eos_token_id": parsed.vocabulary - 1}
    words = {"vocab_size": parsed.vocabulary, "max_position_embeddings": parsed.length, **special}
    config = CLIPConfig(
        text_config={**sizes(parsed.sizes.text), **words},
        vision_config={**sizes(parsed.sizes.image), "image_size": side, "patch_size": parsed.patch_size},
        projection_dim=parsed.sizes.embedding,
    )
    model = CLIPModel(config).eval()
    model.load_state_dict(load_file(path), strict=True)
    fed = images(side, side)
    tokens = np.random.default_rng(1).integers(1, parsed.vocabulary - 2, (4, parsed.length)).astype(np.int32)
    tokens[:, 0] = special["bos_token_id"]
    for row, length in enumerate((3, 5, parsed.length - 1, 7)):
        tokens[row, length:] = special["eos_token_id"] if row % 2 else 0
        tokens[row, length] = special["eos_token_id"]
    image, ours, found = assert_pair_close(path, model, fed, tokens)
    assert_close(image.pair.logit_scale * ours[0] @ ours[1].T, found.logits_per_image.numpy())
    cut = tokens[:, :8].copy()
    cut[2, -1] = special["eos_token_id"]  # which was cut off
    assert_pair_close(path, model, fed, cut)
