"""What a Swin's names, spellings and sizes say, each by hand; and what the model reads, computed from the stored
leaves."""

import pathlib

import numpy as np
import pytest

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families.swin.architecture import SIZES, Sizes, Swin, name_variant, tiles
from vit_convert.families.swin.infer import Beside, infer_architecture, parse_variant, read_beside
from vit_convert.families.swin.layouts import Layout, detect, inner_leaves, prepare, stored_name, stored_shapes

TINY = Swin("", 4, (1, 2), (1, 2), 2, (16, 32), 3)
FILE = pathlib.Path("none/swin.safetensors")


def held(arrays):
    return {name: Leaf(name, value.shape, value.dtype, lambda value=value: value) for name, value in arrays.items()}


def stored(model, layout, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in stored_shapes(model, layout).items()}


MICROSOFT, TIMM, TRANSFORMERS = Layout.MICROSOFT, Layout.TIMM, Layout.TRANSFORMERS
NAMES = {
    # canonical: (Microsoft's, timm's, transformers')
    "patch_embed/proj/kernel": (
        "patch_embed.proj.weight",
        "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.weight",
    ),
    "patch_embed/norm/scale": ("patch_embed.norm.weight", "patch_embed.norm.weight", "embeddings.norm.weight"),
    "stage_2/block_11/norm1/bias": (
        "layers.2.blocks.11.norm1.bias",
        "layers.2.blocks.11.norm1.bias",
        "encoder.layers.2.blocks.11.layernorm_before.bias",
    ),
    "stage_0/block_1/norm2/scale": (
        "layers.0.blocks.1.norm2.weight",
        "layers.0.blocks.1.norm2.weight",
        "encoder.layers.0.blocks.1.layernorm_after.weight",
    ),
    "stage_0/block_1/attn/key/kernel": (
        "layers.0.blocks.1.attn.qkv.weight",
        "layers.0.blocks.1.attn.qkv.weight",
        "encoder.layers.0.blocks.1.attention.self.key.weight",
    ),
    "stage_0/block_1/attn/out/bias": (
        "layers.0.blocks.1.attn.proj.bias",
        "layers.0.blocks.1.attn.proj.bias",
        "encoder.layers.0.blocks.1.attention.output.dense.bias",
    ),
    "stage_0/block_1/attn/table": (
        "layers.0.blocks.1.attn.relative_position_bias_table",
        "layers.0.blocks.1.attn.relative_position_bias_table",
        "encoder.layers.0.blocks.1.attention.self.relative_position_bias_table",
    ),
    "stage_1/block_0/mlp/fc1/kernel": (
        "layers.1.blocks.0.mlp.fc1.weight",
        "layers.1.blocks.0.mlp.fc1.weight",
        "encoder.layers.1.blocks.0.intermediate.dense.weight",
    ),
    "stage_1/block_0/mlp/fc2/bias": (
        "layers.1.blocks.0.mlp.fc2.bias",
        "layers.1.blocks.0.mlp.fc2.bias",
        "encoder.layers.1.blocks.0.output.dense.bias",
    ),
    "stage_1/downsample/norm/scale": (
        "layers.1.downsample.norm.weight",
        "layers.2.downsample.norm.weight",  # at the beginning of the next stage
        "encoder.layers.1.downsample.norm.weight",
    ),
    "stage_1/downsample/reduction/kernel": (
        "layers.1.downsample.reduction.weight",
        "layers.2.downsample.reduction.weight",
        "encoder.layers.1.downsample.reduction.weight",
    ),
    "norm/scale": ("norm.weight", "norm.weight", "layernorm.weight"),
    "head/bias": ("head.bias", "head.fc.bias", "classifier.bias"),
}


@pytest.mark.parametrize("canonical", NAMES)
def test_names_on_disk(canonical):
    assert tuple(stored_name(canonical, layout) for layout in (MICROSOFT, TIMM, TRANSFORMERS)) == NAMES[canonical]


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("prefix", ["", "model.", "swin."])
def test_layouts_are_told_apart(layout, prefix):
    names = [prefix + name for name in stored_shapes(TINY, layout)]
    assert detect(names) is layout
    assert detect([name for name in names if "table" not in name]) is None
    assert list(inner_leaves(dict.fromkeys(names))) == list(stored_shapes(TINY, layout))


def test_what_is_no_swin():
    table = "relative_position_bias_table"
    assert detect([f"blocks.0.attn.{table}", "layers.0.blocks.0.norm1.weight"]) is None
    assert detect([f"layers.1.blocks.0.attn.{table}"]) is None
    assert detect([f"layers.0.blocks.0.attn.{table}"]) is TIMM  # no merging at a stage's end
    assert detect([f"layers.0.blocks.0.attn.{table}", "layers.0.downsample.norm.weight"]) is MICROSOFT
    assert detect([f"layers.0.blocks.0.attn.{table}", "layers.0.downsample.norm.weight", "head.fc.bias"]) is TIMM


def test_buffers_are_no_parameters():
    names = ["layers.0.blocks.0.attn.relative_position_index", "layers.0.blocks.1.attn_mask", "norm.weight"]
    assert list(inner_leaves(dict.fromkeys(names))) == ["norm.weight"]


def test_shapes_on_disk():
    """Matrices are [outputs, inputs]; query, key and value lie one behind the other but for transformers."""
    shapes = stored_shapes(TINY, MICROSOFT)
    assert shapes["patch_embed.proj.weight"] == (4, 3, 4, 4) and shapes["patch_embed.proj.bias"] == (4,)
    assert shapes["layers.1.blocks.1.attn.qkv.weight"] == (24, 8) and shapes["layers.1.blocks.1.attn.qkv.bias"] == (24,)
    assert shapes["layers.1.blocks.1.attn.relative_position_bias_table"] == (9, 2)
    assert shapes["layers.0.blocks.0.mlp.fc1.weight"] == (16, 4)
    assert shapes["layers.0.downsample.reduction.weight"] == (8, 16) and shapes["head.weight"] == (3, 8)
    query = "encoder.layers.1.blocks.1.attention.self.query"
    assert stored_shapes(TINY, TRANSFORMERS)[f"{query}.weight"] == (8, 8)


@pytest.mark.parametrize("layout", Layout)
def test_what_the_model_reads(layout):
    arrays = stored(TINY, layout)
    found = {name: leaf.read() for name, leaf in prepare(held(arrays), TINY, layout).items()}
    assert all(value.dtype == np.float32 for value in found.values())
    parts = ("query", "key", "value")
    for i, part in enumerate(parts):
        for leaf in ("kernel", "bias"):
            name = f"stage_1/block_0/attn/{part}/{leaf}"
            value = arrays[stored_name(name, layout)]
            value = value if layout is TRANSFORMERS else value[8 * i : 8 * (i + 1)]
            factor = 1 / 2 if part == "query" else 1  # 8 channels in 2 heads of 4: 1/√4
            np.testing.assert_allclose(found[name], factor * value.T, rtol=1e-6)
    name = "patch_embed/proj/kernel"
    np.testing.assert_array_equal(found[name], np.moveaxis(arrays[stored_name(name, layout)], (0, 1), (3, 2)))
    np.testing.assert_array_equal(found["head/kernel"], arrays[stored_name("head/kernel", layout)].T)
    np.testing.assert_array_equal(found["norm/bias"], arrays[stored_name("norm/bias", layout)])
    # windows of 2 in a map of 2 by 4 tokens: its side is one window, so nothing is shifted
    assert found["stage_1/block_1/attn/bias"].shape == (1, 2, 4, 4) and "stage_1/block_1/attn/table" not in found


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("num_classes", [3, 0])
def test_sizes_from_shapes(layout, num_classes):
    model = Swin("custom", 4, (1, 2), (1, 2), 2, (16, 32), num_classes)
    found, name = infer_architecture(held(stored(model, layout)), "auto", (16, 32), FILE)
    assert (found, name) == (model, "custom")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers.0.blocks.0.attn.relative_position_bias_table": (8, 1)}, "bias tables of 8 rows"),
        ({"layers.0.blocks.0.attn.relative_position_bias_table": (16, 1)}, "bias tables of 16 rows"),  # of 4 by 4
        ({"layers.0.blocks.0.attn.relative_position_bias_table": (9, 3)}, r"\(3,\) heads, width 4"),
        (
            {"patch_embed.norm.weight": (0,), "patch_embed.norm.bias": (0,)}
            | {"patch_embed.proj.weight": (0, 3, 4, 4), "patch_embed.proj.bias": (0,)},
            "width 0",
        ),
    ],
)
def test_shapes_that_are_no_swins(change, said):
    arrays = stored(Swin("", 4, (1,), (1,), 2, (8, 8), 0), MICROSOFT)
    changed = arrays | {name: np.zeros(shape, np.float32) for name, shape in change.items()}
    with pytest.raises(CheckpointError, match=said) as error:
        infer_architecture(held(changed), "auto", (8, 8), FILE)
    assert "no Swin" in str(error.value) and "Save the model's parameters whole" in error.value.fix
    with pytest.raises(CheckpointError, match="stage 0 missing, no block found"):
        infer_architecture(held({"norm.weight": arrays["norm.weight"]}), "auto", None, FILE)


@pytest.mark.parametrize(
    ("text", "letter", "window"),
    [
        ("Swin-T/7", "T", 7),
        ("T_12", "T", 12),
        ("Swin-L", "L", 7),
        ("mu/5", "mu", 5),
        ("swin_tiny_patch4_window7_224", "T", 7),
        ("base_patch4_window12_384", "B", 12),
        ("swin_large_patch4_window12", "L", 12),
        ("small_patch4_window7", "S", 7),
    ],
)
def test_spellings_of_variants(text, letter, window):
    assert parse_variant(text) == (SIZES[letter], window)


@pytest.mark.parametrize("text", ["Swin-X/7", "Swin-T/0", "Swin-t/7", "swin_huge_patch4_window7", "", "Swin-T/7/7"])
def test_what_is_no_variant(text):
    with pytest.raises(UsageError, match="no Swin") as error:
        parse_variant(text)
    assert error.value.fix == "Use Swin-, one of mu, T, S, B, L, a slash and the window, such as Swin-T/7."


def test_a_given_variant_overrules_the_shapes():
    leaves = held(stored(Swin("", 32, (2, 2), (1, 2), 7, (56, 56), 0), TIMM))
    found, name = infer_architecture(leaves, "Swin-T/12", (384, 384), FILE)
    assert (found.variant, found.depths, found.window, name) == ("Swin-T/12", (2, 2, 6, 2), 12, "Swin-mu/7")
    assert name_variant(Sizes(32, (2, 2), (1, 1)), 7) == "custom"


@pytest.mark.parametrize(("stages", "step"), [(1, 28), (2, 56), (4, 224)])
def test_a_size_that_windows_do_not_tile_is_told_one_that_they_do(stages, step):
    """Patches of 4 pixels, halved from stage to stage, in windows of 7."""
    leaves = held(stored(Swin("", 32, (1,) * stages, (1,) * stages, 7, (step, step), 3), TIMM))
    assert infer_architecture(leaves, "auto", (step, 2 * step), FILE)[0].image_size == (step, 2 * step)
    with pytest.raises(UsageError, match=f"its windows of 7 tokens tile multiples of {step}$") as error:
        infer_architecture(leaves, "auto", (step, step + 4), FILE)
    assert error.value.fix == f"Leave image_size open, or set it to a multiple of {step} pixels."


@pytest.mark.parametrize(
    ("size", "window", "num_stages", "fits"),
    [
        ((224, 224), 7, 4, True),
        ((224, 448), 7, 4, True),
        ((384, 384), 12, 4, True),
        ((224, 225), 7, 4, False),
        ((384, 384), 7, 4, False),
        ((56, 56), 7, 2, True),
        ((28, 28), 7, 1, True),
        ((0, 224), 7, 4, False),
        ((-224, 224), 7, 4, False),
    ],
)
def test_what_windows_tile(size, window, num_stages, fits):
    assert tiles(size, window, num_stages) is fits


def test_sizes_of_stages():
    model = Swin("", 96, (2, 2, 6, 2), (3, 6, 12, 24), 7, (224, 448), 0)
    assert [model.grid(stage) for stage in range(4)] == [(56, 112), (28, 56), (14, 28), (7, 14)]
    assert [model.windows(stage) for stage in range(4)] == [(8, 16), (4, 8), (2, 4), (1, 2)]
    assert [model.shift(stage, 1) for stage in range(4)] == [3, 3, 3, 0] and model.shift(0, 2) == model.shift(0, 0) == 0
    assert [model.stage_width(stage) for stage in range(4)] == [96, 192, 384, 768] and model.features == 768


@pytest.mark.parametrize(
    ("said", "size", "epsilon"),
    [
        ('"image_size": 112', (112, 112), None),
        ('"image_size": [56, 112]', (56, 112), None),
        ('"pretrained_cfg": {"input_size": [3, 56, 112]}', (56, 112), None),
        ('"layer_norm_eps": 0', None, 0.0),
        ('"layer_norm_eps": 1e-5, "image_size": null', None, 1e-5),
    ],
)
def test_what_a_config_beside_the_file_may_say(tmp_path, said, size, epsilon):
    (tmp_path / "config.json").write_text(f'{{"model_type": "swin", {said}}}')
    found = read_beside(tmp_path / "m.safetensors")
    assert (found.image_size, found.norm_epsilon, found.activation) == (size, epsilon, "gelu")
    (tmp_path / "config.json").write_text(f'{{"model_type": "vit", {said}}}')
    assert read_beside(tmp_path / "m.safetensors") == read_beside(tmp_path / "elsewhere" / "m.safetensors") == Beside()


@pytest.mark.parametrize(
    "said",
    [
        '"image_size": 0', '"image_size": -224', '"image_size": [224]', '"image_size": [224, "x"]',
        '"image_size": [1e400, 224]', '"image_size": 223.5', '"image_size": {"height": 224}', '"layer_norm_eps": NaN',
        '"layer_norm_eps": 1', '"layer_norm_eps": -1e-9', '"layer_norm_eps": Infinity', f'"x": {"[" * 100_000}',
        f'"layer_norm_eps": 1{"0" * 400}',
    ],
)  # fmt: skip
def test_what_no_swins_config_says(tmp_path, said):
    (tmp_path / "config.json").write_text(f'{{"model_type": "swin", {said}}}')
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        read_beside(tmp_path / "m.safetensors")
