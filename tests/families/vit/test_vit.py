"""The reference, computed one block at a time, is the ViT."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from float64_towers import attend, blocks, dense, erf, float64, gelu, mlp, norm, patches

from vit_convert.families.user.model import user_model
from vit_convert.families.vit.architecture import Architecture
from vit_convert.families.vit.model import gives_norm, vit_model
from vit_convert.families.vit.module import ViT, param_shapes

TINY = Architecture(
    family="vit",
    variant="custom",
    width=32,
    depth=3,
    mlp_dim=64,
    num_heads=2,
    patch_size=8,
    image_size=(16, 24),
    num_classes=7,
    pool="tok",
)


def random_params(arch):
    rng = np.random.default_rng(0)
    return {name: 0.2 * rng.standard_normal(shape).astype(np.float32) for name, shape in param_shapes(arch).items()}


def apply_whole(arch, params, images):
    with jax.default_matmul_precision("highest"):
        return jax.jit(ViT(arch).apply)({"params": traverse_util.unflatten_dict(params, sep="/")}, jnp.asarray(images))


def forward(arch, params, image):
    """What one image becomes, in float64: the residual stream, its norm, and what the model gives."""
    leaves = float64(params)
    x = patches(image.astype(np.float64), leaves, "embedding") + leaves["pos_embedding"][0]
    x = np.concatenate([leaves["cls"][0], x]) if arch.pool == "tok" else x
    activation = gelu if arch.gelu == "tanh" else lambda y: 0.5 * y * (1 + erf(y / math.sqrt(2)))
    found = {
        f"block_{i:02d}": stream
        for i, stream in enumerate(blocks(x, leaves, "Transformer/encoderblock_{}", arch.depth, activation))
    }
    x = norm(found[f"block_{arch.depth - 1:02d}"], leaves, "Transformer/encoder_norm")
    if arch.pool != "none":
        found["encoder_norm"] = x
    if arch.pool == "map":
        head, probe = "MAPHead_0/MultiHeadDotProductAttention_0", leaves["MAPHead_0/probe"][0]
        query, key, value = (
            np.einsum("sd,dhe->she", of, leaves[f"{head}/{part}/kernel"]) + leaves[f"{head}/{part}/bias"]
            for part, of in (("query", probe), ("key", x), ("value", x))
        )
        x = np.einsum("she,hed->sd", attend(query, key, value), leaves[f"{head}/out/kernel"])
        x = x + leaves[f"{head}/out/bias"]
        x = x + mlp(norm(x, leaves, "MAPHead_0/LayerNorm_0"), leaves, "MAPHead_0/MlpBlock_0", activation)
    x = {"gap": x.mean(0), "none": x}.get(arch.pool, x[0])
    x = np.tanh(dense(x, leaves, "pre_logits")) if arch.representation_size else x
    return found | {"logits": dense(x, leaves, "head")} if arch.num_classes and arch.pool != "none" else found


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": "tok"},
        {"pool": "gap"},
        {"pool": "map", "representation_size": 8},
        {"pool": "none"},
        {"num_classes": 0},
        {"gelu": "erf", "depth": 1},
    ],
    ids=str,
)
def test_stagewise_reference_equals_the_model(changes):
    arch = dataclasses.replace(TINY, **changes)
    params = random_params(arch)
    images = np.random.default_rng(1).uniform(-1, 1, (3, 16, 24, 3)).astype(np.float32)
    model = vit_model(arch, params)
    got = model.run(images)
    output, taps = apply_whole(arch, params, images)
    assert set(got) == {*model.taps, model.output}
    assert model.output == ("features" if arch.num_classes == 0 else "logits")
    assert model.pooled_token == (0 if arch.pool == "tok" else None) and model.position_table == "pos_embedding"
    assert model.kind == arch and [stack.depth for stack in model.stacks] == [arch.depth]
    # The same float32 operations, compiled in one program or in several: XLA may fuse, and so round, differently (6e-8
    # a step).
    for name, expected in {**taps, model.output: output}.items():
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=2e-6 * float(jnp.abs(expected).max()))
    # Against float64: float32 sums of some tens of products, block after block.
    for i, image in enumerate(images):
        for name, expected in forward(arch, params, image).items():
            np.testing.assert_allclose(got[name][i], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_taps_are_the_residual_stream():
    """encoder_norm is the LayerNorm of the last block, computed here in float64."""
    params = random_params(TINY)
    got = vit_model(TINY, params).run(np.random.default_rng(1).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32))
    x = got["block_02"].astype(np.float64)
    normalized = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + TINY.norm_epsilon)
    expected = normalized * params["Transformer/encoder_norm/scale"] + params["Transformer/encoder_norm/bias"]
    # Flax computes the variance as E[x²] − E[x]² in float32, which costs a digit.
    np.testing.assert_allclose(got["encoder_norm"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("pool", "outputs", "representation", "is_norm"),
    [
        ("tok", ("tokens",), 0, False),  # without the class token
        ("tok", ("features",), 0, False),
        ("gap", ("tokens",), 0, True),
        ("map", ("features", "tokens"), 8, True),
        ("none", ("tokens",), 8, True),
        ("none", ("features",), 0, True),
        ("none", ("features",), 8, False),
        ("none", ("logits",), 0, False),
        ("gap", ("features", "logits"), 0, False),
        ("gap", ("grid",), 0, False),
        ("none", ("grid",), 0, False),
    ],
)
def test_whether_an_output_is_the_last_norm_as_it_is(pool, outputs, representation, is_norm):
    """Which then is no tap, as a value has one name."""
    arch = dataclasses.replace(TINY, pool=pool, outputs=outputs, representation_size=representation)
    assert gives_norm(arch) == is_norm


def test_only_two_blocks_are_traced():
    model = vit_model(TINY, random_params(TINY))
    assert model.repeats and model.stacks[0].depth == 3
    assert {name.split("/")[1] for name in model.traced_shapes if "encoderblock" in name} == {
        "encoderblock_0",
        "encoderblock_1",
    }
    shallow = dataclasses.replace(TINY, depth=2)
    assert vit_model(shallow, random_params(shallow)).repeats is False


def test_names_of_a_users_parameters():
    model = user_model(
        lambda params, images: images @ params["a"][0]["kernel"], {"a": [{"kernel": np.eye(3)}]}, image_shape=(4, 4, 3)
    )
    assert list(model.params) == ["a/0/kernel"]
    assert model.params["a/0/kernel"].dtype == np.float32


@pytest.mark.parametrize("pool", ["tok", "gap"])
def test_each_output_is_the_same_alone(pool):
    """As among all of them: what one needs is computed whether or not another asks for it."""
    whole = dataclasses.replace(TINY, pool=pool, outputs=("logits", "features", "tokens", "grid"))
    params = {"params": traverse_util.unflatten_dict(random_params(whole), sep="/")}
    x = np.random.default_rng(2).standard_normal((2, whole.num_tokens, 32)).astype(np.float32)
    together = ViT(whole).apply(params, x, method=ViT.classify)
    assert [*together] == ["logits", "features", "tokens", "grid"]
    np.testing.assert_array_equal(together["tokens"], x[:, 1:] if pool == "tok" else x)
    np.testing.assert_array_equal(together["grid"], together["tokens"].reshape(2, 2, 3, 32))
    for name in together:
        alone = ViT(dataclasses.replace(whole, outputs=(name,))).apply(params, x, method=ViT.classify)
        assert [*alone] == [name]
        np.testing.assert_array_equal(alone[name], together[name])
