"""Our LiT towers against a float64 forward pass, written from vit_jax/models_lit.py and flaxformer's BERT."""

import numpy as np
import pytest
from float64_towers import attend, blocks, dense, float64, gelu, norm, patches, unit

from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint


def run(path, fed):
    loaded = load_checkpoint(path)
    return loaded.family.model(loaded).run(fed)


def image_forward(image, leaves, depth):
    table = leaves["Transformer/posembed_input/pos_embedding"][0]
    x = np.concatenate([leaves["cls"][0], patches(image, leaves, "embedding")]) + table
    streams = blocks(x, leaves, "Transformer/encoderblock_{}", depth)
    x = norm(streams[-1], leaves, "Transformer/encoder_norm")[0]
    return streams, unit(dense(x, leaves, "head") if "head/kernel" in leaves else x)


def bert_forward(tokens, leaves, depth):
    """A text [length]: embeddings of tokens, places and the first segment, then post-norm layers; [CLS] is
    projected."""
    embedder = "BertEncoder_0/embedder"
    tables = {name: leaves[f"{embedder}/embedders_{name}_ids/embedding"] for name in ("token", "position", "segment")}
    x = tables["token"][tokens] + tables["position"][: len(tokens)] + tables["segment"][0]
    x = norm(x, leaves, f"{embedder}/layer_norm", 1e-12)
    width, streams = x.shape[-1], []
    for i in range(depth):
        layer = f"BertEncoder_0/encoder_block/layer_sequence/layers_{i}"
        inner = f"{layer}/attention_block"
        parts = (dense(x, leaves, f"{inner}/attention_layer/{part}") for part in ("query", "key", "value"))
        mixed = attend(*(part.reshape(len(tokens), width // 64, 64) for part in parts), tokens != 0)
        x = x + dense(mixed.reshape(len(tokens), width), leaves, f"{inner}/dense_layer")
        x = norm(x, leaves, f"{inner}/layer_norm", 1e-12)
        hidden = gelu(dense(x, leaves, f"{layer}/mlp_block/mlp/dense_layer"))
        x = norm(
            x + dense(hidden, leaves, f"{layer}/mlp_block/dense_layer"), leaves, f"{layer}/mlp_block/layer_norm", 1e-12
        )
        streams.append(x)
    return streams, unit(dense(x[0], leaves, "head"))


def text_forward(tokens, leaves, depth):
    x = leaves["Embed_0/embedding"][tokens] + leaves["pos_embedding"][0]
    streams = blocks(x, leaves, "Encoder_0/encoderblock_{}", depth)
    return streams, unit(dense(norm(streams[-1], leaves, "Encoder_0/encoder_norm")[-1], leaves, "head"))


def assert_all_close(assert_close, ours, passes):
    assert_close(ours["embedding"], np.stack([result for _, result in passes]))
    for i, streams in enumerate(zip(*(streams for streams, _ in passes))):
        assert_close(ours[f"block_{i:02d}"], np.stack(streams))


@pytest.mark.parametrize(("variant", "layout"), [("LiT-mu", "lit"), ("LiT-muV", "lit_linen")])
def test_float64(tmp_path, images, assert_close, variant, layout):
    written, plain = tmp_path / "written.npz", tmp_path / "plain.npz"
    write_random_checkpoint(written, variant, image_size=(48, 48), depth=3, layout=layout)
    write_random_checkpoint(plain, variant, image_size=(48, 48), depth=3, layout="lit_linen")
    arrays, fed = dict(np.load(plain)), images(48, 48)
    image, text = float64(arrays, "img/"), float64(arrays, "txt/")
    passes = [image_forward(one.astype(np.float64), image, 3) for one in fed]
    assert_all_close(assert_close, run(f"{written}:img", fed), passes)
    vocabulary = text.get("Embed_0/embedding", text.get("BertEncoder_0/embedder/embedders_token_ids/embedding")).shape[
        0
    ]
    tokens = np.random.default_rng(1).integers(2, vocabulary, (3, 16)).astype(np.int32)
    tokens[0, 5:], tokens[1, 15:] = (0, 0) if variant == "LiT-mu" else (1, 1)
    forward = bert_forward if variant == "LiT-mu" else text_forward
    assert_all_close(assert_close, run(f"{written}:txt", tokens), [forward(one, text, 3) for one in tokens])
