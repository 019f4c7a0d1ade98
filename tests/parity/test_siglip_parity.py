"""Our SigLIP towers against transformers' SigLIP, on random weights of big_vision's names."""

import re

import numpy as np
import pytest

from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint

_BLOCK = {
    "LayerNorm_0": "layer_norm1",
    "LayerNorm_1": "layer_norm2",
    "MlpBlock_0/Dense_0": "mlp.fc1",
    "MlpBlock_0/Dense_1": "mlp.fc2",
    **{
        f"MultiHeadDotProductAttention_0/{a}": f"self_attn.{b}_proj"
        for a, b in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out"))
    },
}
_OUTER = {
    "img/embedding": "vision_model.embeddings.patch_embedding",
    "img/Transformer/encoder_norm": "vision_model.post_layernorm",
    "img/MAPHead_0/LayerNorm_0": "vision_model.head.layernorm",
    "img/MAPHead_0/MlpBlock_0/Dense_0": "vision_model.head.mlp.fc1",
    "img/MAPHead_0/MlpBlock_0/Dense_1": "vision_model.head.mlp.fc2",
    "img/MAPHead_0/MultiHeadDotProductAttention_0/out": "vision_model.head.attention.out_proj",
    "txt/Encoder_0/encoder_norm": "text_model.final_layer_norm",
    "txt/head": "text_model.head",
}
_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def torch_state(leaves):
    """transformers' names for the leaves of a big_vision file; torch stores matrices as (out, in), convolutions as
    OIHW."""
    width = leaves["img/embedding/bias"].size

    def matrix(name, kernel):
        rows = width if not name.endswith("/out") else -1
        return (kernel.reshape(rows, width) if "Attention" in name else kernel).T

    state, pooled = {}, {}
    for path, leaf in leaves.items():
        scope, _, kind = path.rpartition("/")
        if kind == "kernel":
            leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else matrix(scope, leaf)
        elif kind == "bias":
            leaf = leaf.reshape(-1)
        if match := re.match(r"(img|txt)/(?:Transformer|Encoder_0)/encoderblock_(\d+)/(.*)", scope):
            model = {"img": "vision", "txt": "text"}[match[1]]
            state[f"{model}_model.encoder.layers.{match[2]}.{_BLOCK[match[3]]}.{_LEAF[kind]}"] = leaf
        elif match := re.match(r"img/MAPHead_0/MultiHeadDotProductAttention_0/(query|key|value)", scope):
            pooled[match[1], kind] = leaf
        elif scope in _OUTER:
            state[f"{_OUTER[scope]}.{_LEAF[kind]}"] = leaf
    for kind, name in (("kernel", "in_proj_weight"), ("bias", "in_proj_bias")):
        parts = [pooled[part, kind] for part in ("query", "key", "value")]
        state[f"vision_model.head.attention.{name}"] = np.concatenate(parts)
    return state | {
        "vision_model.embeddings.position_embedding.weight": leaves["img/pos_embedding"][0],
        "vision_model.head.probe": leaves["img/MAPHead_0/probe"],
        "text_model.embeddings.token_embedding.weight": leaves["txt/Embed_0/embedding"],
        "text_model.embeddings.position_embedding.weight": leaves["txt/pos_embedding"][0],
        "logit_scale": leaves["t"],
        "logit_bias": leaves["b"],
    }


@pytest.mark.parametrize(
    ("variant", "side", "depth", "length"),
    [("SigLIP-S/16", 64, 2, 16), pytest.param("SigLIP-B/16", 224, None, 64, marks=pytest.mark.slow)],
    ids=["small", "full"],
)
def test_transformers(
    torchvision_operators, tmp_path, images, assert_close, assert_pair_close, variant, side, depth, length
):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    path = tmp_path / "random.npz"
    write_random_checkpoint(path, variant, image_size=(side, side), depth=depth, length=length)
    leaves = dict(np.load(path))
    width, hidden = (
        leaves["img/embedding/bias"].size,
        leaves["img/Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias"].size,
    )
    blocks = depth or 12
    sizes = {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": width // 64,
    }
    config = transformers.SiglipConfig(
        text_config={**sizes, "vocab_size": 32000, "max_position_embeddings": length},
        vision_config={**sizes, "image_size": side, "patch_size": 16},
    )
    model = transformers.SiglipModel(config).eval()
    state = {name: torch.from_numpy(np.ascontiguousarray(leaf)) for name, leaf in torch_state(leaves).items()}
    model.load_state_dict(state, strict=True)
    fed, tokens = images(side, side), np.random.default_rng(1).integers(2, 32000, (3, length)).astype(np.int32)
    tokens[1, 5:] = 1
    image, ours, found = assert_pair_close(path, model, fed, tokens)
    logits = image.pair.logit_scale * ours[1] @ ours[0].T + image.pair.logit_bias
    assert_close(logits, found.logits_per_text.numpy())


def test_naflex(naflex, assert_close):
    """Two images of other aspects than the table, one larger and one smaller than it, with what fills them up."""
    path, features = naflex
    shapes, generator = [(5, 9), (20, 12), (16, 16)], np.random.default_rng(0)
    patches = generator.uniform(-1, 1, (3, 256, 768)).astype(np.float32)
    mask, coordinates = np.zeros((3, 256), np.int32), np.zeros((3, 256, 2), np.int32)
    for i, (rows, columns) in enumerate(shapes):
        mask[i, : rows * columns] = 1
        coordinates[i, : rows * columns] = np.argwhere(np.ones((rows, columns)))
        coordinates[i, rows * columns :] = 77  # whatever: it is masked
    found = features(patches, mask, np.array(shapes))
    loaded = load_checkpoint(f"{path}:img", normalize=False)
    assert_close(loaded.family.model(loaded).run(patches, coordinates, mask)["embedding"], found)
