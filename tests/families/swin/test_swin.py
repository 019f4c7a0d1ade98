"""Swin's layouts, sizes and strictness."""

import itertools
import json

import numpy as np
import pytest
from family_files import load, outputs
from safetensors.numpy import load_file, save_file

from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families.family import RandomOptions
from vit_convert.families.swin import windows
from vit_convert.families.swin.architecture import SIZES, Swin, leaf_shapes, parameter_count
from vit_convert.families.swin.family import SwinFamily

FAMILY = SwinFamily()
# (letter, window, classes): parameters. T as its authors count it, the others by timm's modules.
COUNTS = {
    ("T", 7, 1000): 28_288_354,
    ("S", 7, 1000): 49_606_258,
    ("B", 7, 1000): 87_768_224,
    ("B", 12, 1000): 87_903_584,
    ("B", 7, 21841): 87_768_224 + (21_841 - 1_000) * (1_024 + 1),  # a row and a bias a class
    ("L", 7, 21841): 228_565_093,
    ("L", 12, 1000): 196_735_516,
}


@pytest.fixture
def tiny(tmp_path):
    def write(variant="Swin-mu/7", **options):
        path = tmp_path / "tiny.safetensors"
        FAMILY.write_random(path, variant, RandomOptions(**{"image_size": (56, 56), "num_classes": 10, **options}))
        return path

    return write


def changed(path, change):
    arrays = load_file(path)
    save_file(change(arrays) or arrays, path)
    return path


def described(letter, window, classes=1000, side=None):
    sizes = SIZES[letter]
    side = side or {7: 224, 12: 384}[window]
    return Swin("", sizes.width, sizes.depths, sizes.num_heads, window, (side, side), classes)


@pytest.mark.parametrize(("letter", "window", "classes"), COUNTS)
def test_published_counts(letter, window, classes):
    model = described(letter, window, classes)
    assert parameter_count(model) == COUNTS[letter, window, classes]
    assert sum(np.prod(shape) for shape in leaf_shapes(model).values()) == COUNTS[letter, window, classes]


@pytest.mark.parametrize("layout", FAMILY.layouts)
def test_sizes_are_read_from_the_shapes(tiny, layout):
    found = load(FAMILY, tiny(layout=layout), image_size=(56, 56))
    assert found.layout.value == layout
    assert (found.variant, found.num_classes, found.preprocess, found.patch_size) == ("Swin-mu/7", 10, "imagenet", 4)
    assert found.attentions == ((32, 49),)


@pytest.mark.slow
def test_all_layouts_are_one_model(tiny):
    images = np.random.default_rng(0).uniform(-2, 2, (2, 56, 56, 3)).astype(np.float32)
    first, *others = (outputs(FAMILY, tiny(layout=layout), images, image_size=(56, 56)) for layout in FAMILY.layouts)
    for other, (name, values) in itertools.product(others, first.items()):
        np.testing.assert_array_equal(other[name], values)


def test_the_window_tells_the_image_size(tmp_path):
    path = tmp_path / "t.safetensors"
    FAMILY.write_random(path, "swin_tiny_patch4_window7_224", RandomOptions(depth=2, num_classes=21841))
    found = load(FAMILY, path)
    assert (found.image_size, found.variant, found.num_classes) == ((224, 224), "custom", 21841)
    assert [stack.depth for stack in _stacks(found)] == [2, 2, 2, 2]


def _stacks(found):
    from vit_convert.families.swin.module import swin_model

    return swin_model(found.architecture, found.params).stacks


def test_config_beside_the_file_is_read(tiny):
    path = tiny()
    beside = path.with_name("config.json")
    beside.write_text(
        json.dumps({"model_type": "swin", "image_size": 112, "layer_norm_eps": 1e-6, "hidden_act": "gelu"})
    )
    found = load(FAMILY, path)
    assert (found.image_size, found.architecture.norm_epsilon) == ((112, 112), 1e-6)
    assert load(FAMILY, path, image_size=(56, 56)).image_size == (56, 56)
    beside.write_text(
        json.dumps({"architecture": "swin_tiny_patch4_window7_224", "pretrained_cfg": {"input_size": [3, 56, 112]}})
    )
    assert load(FAMILY, path).image_size == (56, 112)
    beside.write_text(json.dumps({"model_type": "vit", "image_size": 384}))
    assert load(FAMILY, path).image_size == (224, 224)
    beside.write_text(json.dumps({"model_type": "swin", "hidden_act": "relu"}))
    with pytest.raises(CheckpointError, match="hidden_act 'relu'"):
        load(FAMILY, path)
    for damaged in (
        '"image_size": "large"',
        '"image_size": []',
        '"pretrained_cfg": 1',
        '"layer_norm_eps": [1]',
        '"image_size": 56,',
    ):
        beside.write_text(f'{{"model_type": "swin", {damaged}}}')
        with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
            load(FAMILY, path)


def test_one_size_and_it_says_so(tiny):
    with pytest.raises(
        UsageError, match=r"100x56: a Swin takes one size, its windows of 7 tokens tile multiples of 56"
    ) as refusal:
        load(FAMILY, tiny(), image_size=(100, 56))
    assert "multiple of 56 pixels" in refusal.value.fix
    five = tiny("Swin-mu/5", image_size=(40, 40))
    with pytest.raises(UsageError, match="windows of 5 do not tell the image size"):
        load(FAMILY, five)
    with pytest.raises(UsageError, match="no position table"):
        load(FAMILY, tiny(), posemb_grid=(4, 4))


def test_without_a_head(tiny):
    images = np.zeros((1, 56, 56, 3), np.float32)
    assert outputs(FAMILY, tiny(), images, image_size=(56, 56), outputs="features")["features"].shape == (1, 64)
    with pytest.raises(CheckpointError, match="no head/kernel"):
        load(FAMILY, tiny(num_classes=0), image_size=(56, 56))


def test_buffers_are_left_out_and_a_base_model_has_no_prefix(tiny):
    index = windows.relative_index(7)
    buffers = {
        "layers.0.blocks.0.attn.relative_position_index": index,
        "layers.0.blocks.1.attn_mask": np.zeros((4, 49, 49), np.float32),
    }
    path = changed(
        tiny(layout="swin_microsoft"),
        lambda arrays: {f"model.{name}": array for name, array in (arrays | buffers).items()},
    )
    assert load(FAMILY, path, image_size=(56, 56)).num_params == load(FAMILY, tiny(), image_size=(56, 56)).num_params
    base = changed(
        tiny(num_classes=0), lambda arrays: {name.removeprefix("swin."): array for name, array in arrays.items()}
    )
    assert load(FAMILY, base, image_size=(56, 56), outputs="features").num_classes == 0


@pytest.mark.parametrize(
    ("layout", "leaf"),
    [
        ("swin_microsoft", "layers.0.downsample.reduction.weight"),
        ("swin_microsoft", "layers.1.blocks.1.attn.qkv.bias"),
        ("swin_timm", "layers.1.downsample.norm.bias"),
        ("swin_timm", "head.fc.bias"),
        ("swin_timm", "layers.0.blocks.1.attn.relative_position_bias_table"),
        ("swin_transformers", "swin.encoder.layers.1.blocks.0.attention.self.key.weight"),
        ("swin_transformers", "swin.encoder.layers.0.blocks.0.output.dense.bias"),
        ("swin_transformers", "swin.layernorm.weight"),
        ("swin_transformers", "classifier.bias"),
    ],
)
def test_missing(tiny, layout, leaf):
    path = changed(tiny(layout=layout), lambda arrays: {name: array for name, array in arrays.items() if name != leaf})
    with pytest.raises(CheckpointError, match=rf"{leaf.removeprefix('swin.')}: missing"):
        load(FAMILY, path, image_size=(56, 56))


def test_extra_and_wrong_shape(tiny):
    def widen(arrays):
        return arrays | {"layers.0.blocks.0.attn.qkv.weight": np.zeros((64, 32), np.float32)}

    with pytest.raises(
        CheckpointError, match=r"attn\.qkv\.weight: checkpoint \(64, 32\), variant Swin-mu/7 needs \(96, 32\)"
    ):
        load(FAMILY, changed(tiny(layout="swin_timm"), widen), image_size=(56, 56))
    path = changed(
        tiny(layout="swin_timm"), lambda arrays: arrays | {"layers.0.blocks.0.gamma": np.zeros(32, np.float32)}
    )
    with pytest.raises(CheckpointError, match=r"layers\.0\.blocks\.0\.gamma: belongs to no part of variant Swin-mu/7"):
        load(FAMILY, path, image_size=(56, 56))
    path = changed(
        tiny(layout="swin_timm"),
        lambda arrays: arrays | {"layers.0.blocks.0.attn.logit_scale": np.zeros(1, np.float32)},
    )
    with pytest.raises(CheckpointError, match="a Swin V2"):
        load(FAMILY, path, image_size=(56, 56))


def test_heads_that_do_not_divide_the_width(tiny):
    def three(arrays):
        return {
            name: np.zeros((169, 3), np.float32) if name.endswith("bias_table") else array
            for name, array in arrays.items()
        }

    with pytest.raises(CheckpointError, match=r"stages of \(2, 2\) blocks and \(3, 3\) heads, width 32, .*: no Swin"):
        load(FAMILY, changed(tiny(), three))


def test_a_given_variant_is_held_against_the_file(tiny):
    with pytest.raises(CheckpointError, match=r"variant Swin-T/7 needs .* Did you mean Swin-mu/7\?"):
        load(FAMILY, tiny(), variant="Swin-T")
    with pytest.raises(UsageError, match="variant 'Swin-Q': no Swin"):
        load(FAMILY, tiny(), variant="Swin-Q")


def test_spellings():
    for name in ("Swin-T", "Swin-B/12", "swin_large_patch4_window12_384"):
        assert FAMILY.has_variant(name)
    for name in ("T", "B/16", "swinv2_tiny"):
        assert not FAMILY.has_variant(name)


def test_relative_index():
    """The corner cases by hand: of a window of 2, the table's 9 rows are the differences (-1 … 1, -1 … 1), row by
    row."""
    np.testing.assert_array_equal(windows.relative_index(2), [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]])


def test_mask_joins_only_what_were_neighbours():
    """Tokens of one window of the rolled image see each other only where no edge of the image lies between them."""
    grid, window, shift = (6, 9), 3, 1
    rows, columns = np.indices(grid)
    rolled = np.roll(np.stack([rows, columns], -1), (-shift, -shift), (0, 1))
    mask = windows.shift_mask(grid, window, shift)
    for number, (i, j) in enumerate(itertools.product(range(2), range(3))):
        places = rolled[3 * i : 3 * i + 3, 3 * j : 3 * j + 3].reshape(9, 2)
        near = (np.abs(places[:, None] - places[None]) < window).all(-1)
        np.testing.assert_array_equal(mask[number], np.where(near, 0, -100))


def test_shift():
    model = described("T", 7)
    assert [model.shift(stage, block) for stage in (0, 3) for block in (0, 1)] == [0, 3, 0, 0]
    assert model.windows(0) == (8, 8)


def test_canonical_names_are_what_the_module_reads(tiny):
    from vit_convert.families.run import param_shapes
    from vit_convert.families.swin.module import SwinTransformer

    found = load(FAMILY, tiny(), image_size=(56, 56))
    shapes = param_shapes(SwinTransformer(found.architecture), (56, 56))
    assert {name: leaf.shape for name, leaf in found.params.leaves.items()} == shapes
