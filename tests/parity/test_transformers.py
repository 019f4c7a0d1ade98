"""Our model against transformers' ViTForImageClassification, its weights set from the .npz by the published
correspondence."""

import numpy as np
import pytest

from vit_convert.families.random import write_random_checkpoint


def torch_state(leaves, depth):
    """transformers' names for the leaves of a vit_jax file; torch stores matrices as (out, in) and convolutions as
    OIHW."""
    block = "Transformer/encoderblock_"
    state = {
        "vit.embeddings.cls_token": leaves["cls"],
        "vit.embeddings.position_embeddings": leaves["Transformer/posembed_input/pos_embedding"],
        "vit.embeddings.patch_embeddings.projection.weight": leaves["embedding/kernel"].transpose(3, 2, 0, 1),
        "vit.embeddings.patch_embeddings.projection.bias": leaves["embedding/bias"],
        "vit.layernorm.weight": leaves["Transformer/encoder_norm/scale"],
        "vit.layernorm.bias": leaves["Transformer/encoder_norm/bias"],
        "classifier.weight": leaves["head/kernel"].T,
        "classifier.bias": leaves["head/bias"],
    }
    for i in range(depth):
        ours = {
            name.removeprefix(f"{block}{i}/"): leaf for name, leaf in leaves.items() if name.startswith(f"{block}{i}/")
        }
        width = ours["LayerNorm_0/scale"].size
        theirs = {
            "layernorm_before.weight": ours["LayerNorm_0/scale"],
            "layernorm_before.bias": ours["LayerNorm_0/bias"],
            "layernorm_after.weight": ours["LayerNorm_2/scale"],
            "layernorm_after.bias": ours["LayerNorm_2/bias"],
            "attention.o_proj.weight": ours["MultiHeadDotProductAttention_1/out/kernel"].reshape(width, width).T,
            "attention.o_proj.bias": ours["MultiHeadDotProductAttention_1/out/bias"],
            "mlp.fc1.weight": ours["MlpBlock_3/Dense_0/kernel"].T,
            "mlp.fc1.bias": ours["MlpBlock_3/Dense_0/bias"],
            "mlp.fc2.weight": ours["MlpBlock_3/Dense_1/kernel"].T,
            "mlp.fc2.bias": ours["MlpBlock_3/Dense_1/bias"],
        }
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            theirs[f"attention.{letter}_proj.weight"] = (
                ours[f"MultiHeadDotProductAttention_1/{name}/kernel"].reshape(width, width).T
            )
            theirs[f"attention.{letter}_proj.bias"] = ours[f"MultiHeadDotProductAttention_1/{name}/bias"].reshape(width)
        state |= {f"vit.layers.{i}.{name}": leaf for name, leaf in theirs.items()}
    return state


def test_ti16(tmp_path, images, run, assert_close):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    path = tmp_path / "random.npz"
    write_random_checkpoint(path, "Ti/16")
    config = transformers.ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        num_labels=1000,
    )
    model = transformers.ViTForImageClassification(config).eval()
    state = {
        name: torch.from_numpy(np.ascontiguousarray(leaf))
        for name, leaf in torch_state(dict(np.load(path)), 12).items()
    }
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        reference = model(torch.from_numpy(images().transpose(0, 3, 1, 2).copy())).logits.numpy()
    assert_close(run(path, images())["logits"], reference)
