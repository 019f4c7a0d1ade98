"""Random hybrids, Swins and Mixers: which arrays a file holds, what they depend on, and what is refused before it is
written."""

import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from vit_convert.core.errors import UsageError
from vit_convert.families.family import RandomOptions
from vit_convert.families.hybrid.random import write_random_hybrid
from vit_convert.families.load import load_checkpoint
from vit_convert.families.mixer.random import write_random_mixer
from vit_convert.families.random import write_random_checkpoint
from vit_convert.families.swin.random import write_random_swin


def swin(folder, variant="Swin-mu/7", **options):
    path = folder / "swin.safetensors"
    options = {"image_size": (56, 112), "num_classes": 3, **options}
    return write_random_swin(path, variant, RandomOptions(**options)), load_file(path)


def hybrid(folder, variant="R8+ViT-mu/8", **options):
    path = folder / "r.npz"
    options = {"image_size": (64, 96), "num_classes": 3, **options}
    model = write_random_hybrid(path, variant, RandomOptions(**options))
    with np.load(path) as file:
        return model, dict(file)


def mixer(folder, variant="Mixer-mu/16", **options):
    model = write_random_mixer(folder / "m.npz", variant, **{"image_size": (32, 64), "num_classes": 3, **options})
    with np.load(folder / "m.npz") as file:
        return model, dict(file)


def expected(seed, name, shape):
    """Kernels of variance 1 over inputs, scales near 1, small biases: by the seed and the canonical name."""
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
    return values / np.sqrt(np.prod(shape[:-1])) if name.endswith("kernel") else values


@pytest.mark.parametrize(
    ("write", "kernel"),
    [(swin, "classifier.weight"), (hybrid, "head/kernel"), (mixer, "head/kernel")],
)
def test_what_the_values_depend_on(tmp_path, write, kernel):
    first, again, other = (write(tmp_path, seed=seed)[1] for seed in (3, 3, 4))
    assert list(first) == list(again) and all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)
    width = max(first[kernel].shape)
    head = first[kernel].T if write is swin else first[kernel]
    np.testing.assert_allclose(head, expected(3, "head/kernel", (width, 3)), rtol=1e-6)
    longer = write(tmp_path, seed=3, prefix="params/", dtype="float16")[1]
    assert list(longer) == [f"params/{name}" for name in first]
    assert all(np.array_equal(longer[f"params/{name}"], array.astype(np.float16)) for name, array in first.items())
    headless = write(tmp_path, seed=3, num_classes=0)[1]
    assert {*first} - {*headless} == {name for name in first if name.startswith(("head", "classifier"))}


@pytest.mark.parametrize("write", [hybrid, swin])
@pytest.mark.parametrize("option", [{"pool": "gap"}, {"posemb": "sincos2d"}, {"outlier_channels": 2}])
def test_options_without_meaning_are_refused(tmp_path, write, option):
    (name,) = option
    with pytest.raises(UsageError, match=f"{name}=.*has no meaning for family {write.__name__}"):
        write(tmp_path, **option)
    if write is swin:
        with pytest.raises(UsageError, match="pre_logits=True"):
            write(tmp_path, pre_logits=True)
    assert not list(tmp_path.iterdir())


def test_hybrids(tmp_path):
    model, arrays = hybrid(tmp_path)
    assert (model.variant, model.image_size, model.trunk.num_classes) == ("R8+ViT-mu/8", (64, 96), 3)
    # 8 by 12 tokens and the class token
    assert arrays["Transformer/posembed_input/pos_embedding"].shape == (1, 97, 32)
    assert arrays["block2/unit2/gn3/bias"].shape == (1, 1, 1, 512) and arrays["gn_root/scale"].shape == (1, 1, 1, 64)
    table = arrays["Transformer/posembed_input/pos_embedding"]
    np.testing.assert_allclose(table, 0.1 * expected(0, "pos_embedding", (1, 97, 32)), rtol=1e-6)
    np.testing.assert_allclose(arrays["cls"], 0.1 * expected(0, "cls", (1, 1, 32)), rtol=1e-6)
    # a query's inputs are its first axis alone
    name = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
    assert np.std(arrays[name]) == pytest.approx(32**-0.5, rel=0.1)
    assert np.std(arrays["block2/unit1/conv2/kernel"]) == pytest.approx((9 * 128) ** -0.5, rel=0.05)
    linen = hybrid(tmp_path, layout="vit_jax_linen", depth=2, pre_logits=True)
    assert linen[1]["gn_root/scale"].shape == (64,) and linen[0].trunk.depth == 2
    assert linen[1]["pre_logits/kernel"].shape == (32, 32) and "pre_logits/kernel" not in arrays
    assert [any("encoderblock_1/" in name for name in found) for found in (arrays, linen[1])] == [False, True]


def test_sizes_where_none_is_given(tmp_path):
    model, arrays = hybrid(tmp_path, image_size=None)
    assert model.image_size == (224, 224) and arrays["Transformer/posembed_input/pos_embedding"].shape[1] == 785
    assert swin(tmp_path, image_size=None)[0].image_size == (224, 224)
    assert swin(tmp_path, "mu/12", image_size=None)[0].image_size == (384, 384)
    assert swin(tmp_path, "mu/5", image_size=None)[0].image_size == (160, 160)  # 32 windows' sides


@pytest.mark.parametrize(
    ("variant", "suffix", "side"),
    [
        ("SigLIP-mu/16", ".npz", 224),
        ("CLIP-mu/16", ".safetensors", 224),
        ("LiT-mu", ".npz", 224),
        ("TIPS-mu/14", ".npz", 224),
        ("TIPSv2-mu/14", ".npz", 448),
        ("PaliGemma-mu/14", ".npz", 224),
        ("openpi-mu/14", ".npz", 224),
        ("Gemma3-mu/14", ".npz", 896),
    ],
)
def test_a_towers_size_where_none_is_given(tmp_path, variant, suffix, side):
    """That of the published models."""
    path = tmp_path / f"a{suffix}"
    write_random_checkpoint(
        path, variant, depth=1, towers="" if variant.startswith(("PaliGemma", "openpi", "Gemma3")) else "image"
    )
    assert load_checkpoint(f"{path}:img").image_size == (side, side)


@pytest.mark.parametrize(
    ("variant", "suffix", "length"),
    [("SigLIP-mu/16", ".npz", 64), ("LiT-muV", ".npz", 16), ("TIPS-mu/14", ".npz", 64)],
)
def test_a_texts_length_where_none_is_given(tmp_path, variant, suffix, length):
    path = tmp_path / f"a{suffix}"
    write_random_checkpoint(path, variant, depth=1, towers="text")
    assert load_checkpoint(f"{path}:txt").pair.length == length


def test_a_mixer_of_which_nothing_is_said(tmp_path):
    model = write_random_mixer(tmp_path / "m.npz", "Mixer-mu/16")
    assert (model.image_size, model.num_classes) == ((224, 224), 1000)
    first = (tmp_path / "m.npz").read_bytes()
    write_random_mixer(tmp_path / "m.npz", "Mixer-mu/16", seed=0, layout="mixer", prefix="", dtype="float32")
    assert (tmp_path / "m.npz").read_bytes() == first


def test_swins(tmp_path):
    model, arrays = swin(tmp_path)
    assert (model.variant, model.depths, model.image_size, model.num_classes) == ("Swin-mu/7", (2, 2), (56, 112), 3)
    table = arrays["swin.encoder.layers.1.blocks.0.attention.self.relative_position_bias_table"]
    np.testing.assert_array_equal(table, expected(0, "stage_1/block_0/attn/table", (169, 2)))
    patches = expected(0, "patch_embed/proj/kernel", (4, 4, 3, 32)).transpose(3, 2, 0, 1)
    np.testing.assert_allclose(arrays["swin.embeddings.patch_embeddings.projection.weight"], patches, rtol=1e-6)
    assert {name.split(".")[0] for name in arrays} == {"swin", "classifier"}
    fused = swin(tmp_path, layout="swin_timm")[1]
    parts = [
        arrays[f"swin.encoder.layers.0.blocks.1.attention.self.{part}.weight"] for part in ("query", "key", "value")
    ]
    np.testing.assert_array_equal(fused["layers.0.blocks.1.attn.qkv.weight"], np.concatenate(parts))
    # of the last stage but one
    assert swin(tmp_path, depth=4)[0].depths == (4, 2) and not (tmp_path / "swin.npz").exists()
    with pytest.raises(UsageError, match="image_size 56x60: windows of 7 tokens do not tile it"):
        swin(tmp_path, image_size=(56, 60))


def test_mixers(tmp_path):
    model, arrays = mixer(tmp_path)
    assert (model.image_size, model.patch_size, model.num_classes) == ((32, 64), 16, 3)
    old, (_, older) = mixer(tmp_path, depth=1)[0], mixer(tmp_path, layout="mixer_old")
    assert old.depth == 1 < model.depth
    # The same values; once, mixing's axes said what they are shared by.
    block, new = "Mixer/encoderblock_1", {name: array.shape for name, array in arrays.items()}
    assert older[f"{block}/token_mixing_phase_0/kernel1"].shape == (1, 8, 16)
    assert older[f"{block}/token_mixing_phase_0/bias1"].shape == (16, 1)
    assert older[f"{block}/channel_mixing_phase_0/kernel2"].shape == (1, 64, 32)
    assert older[f"{block}/channel_mixing_phase_0/bias2"].shape == (1, 1, 32)
    assert new["MixerBlock_1/token_mixing/Dense_0/kernel"] == (8, 16)
    assert new["MixerBlock_1/channel_mixing/Dense_1/bias"] == (32,) and new["head/kernel"] == (32, 3)
    assert older["head/kernel"].shape == (32, 3) and older[f"{block}/LayerNorm_2/scale"].shape == (32,)
    for array, other in zip(arrays.values(), older.values(), strict=True):
        np.testing.assert_array_equal(array.ravel(), other.ravel())
    for size in ((32, 40), (0, 32)):
        with pytest.raises(UsageError, match=f"image_size {size[0]}x{size[1]}: not a multiple of the patch size 16"):
            mixer(tmp_path, image_size=size)
