"""Files of towers from which something is missing, or in which something differs from tower to tower: every family
says what it is, by name."""

import math
import pathlib
import re

import numpy as np
import pytest
from family_files import rewrite, without

from vit_convert.checkpoint.containers import Leaf, read_container
from vit_convert.core.errors import CheckpointError
from vit_convert.core.model import POOLED
from vit_convert.families.clip.family import CLIP
from vit_convert.families.family import RandomOptions
from vit_convert.families.lit import layouts as lit_layouts
from vit_convert.families.lit.family import LIT
from vit_convert.families.load import load_checkpoint
from vit_convert.families.siglip.family import SIGLIP
from vit_convert.families.siglip.layouts import Layout, detect
from vit_convert.families.tips import layouts as tips_layouts
from vit_convert.families.tips.family import TIPS
from vit_convert.families.towers.load import class_row, infer_encoder, square_grid

FILE = pathlib.Path("x.npz")


def leaf(*shape: int) -> Leaf:
    return Leaf("leaf", shape, np.dtype(np.float32), lambda: np.zeros(shape, np.float32))


def lacking(arrays, pattern):
    return {name: value for name, value in arrays.items() if not re.search(pattern, name)}


def kept(path, change):
    """Saves the file with what `change` makes of its arrays, and nothing besides."""
    arrays = change(dict(np.load(path)))
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("family", "variant", "tower", "gone", "said"),
    [
        (LIT, "LiT-mu", "txt", f"^{lit_layouts.WORDS}$", "vocabulary"),
        (LIT, "LiT-mu", "txt", f"^{lit_layouts.POSITIONS}$", "number of positions"),
        (LIT, "LiT-mu", "txt", "layers_0/", "layers? 0|layer 0|0"),
        (SIGLIP, "SigLIP-mu/16", "txt", "Embed_0/embedding$", "model's vocabulary, txt/Embed_0/embedding is missing"),
        (SIGLIP, "SigLIP-mu/16", "txt", "txt/pos_embedding$", "model's number of tokens, txt/pos_embedding is missing"),
        (SIGLIP, "SigLIP-mu/16", "img", "encoderblock_0/", "0"),
    ],
)
def test_what_tells_a_size_is_missed_by_name(written, family, variant, tower, gone, said):
    path = kept(written(family, variant), lambda arrays: lacking(arrays, gone))
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(f"{path}:{tower}")


def test_a_vocabulary_without_words(written):
    path = written(TIPS, "TIPS-mu/14", image_size=(56, 56), towers="text")
    rewrite(path, lambda arrays: arrays | {tips_layouts.WORDS: np.zeros((0, 32), np.float32)})
    with pytest.raises(CheckpointError, match="vocabulary"):
        load_checkpoint(path)


def test_berts_tables_are_folded_into_one():
    """Positions as far as texts reach, and the first segment, which is that of all tokens."""
    generator = np.random.default_rng(0)
    positions, segments = (generator.standard_normal((1, rows, 8)).astype(np.float32) for rows in (20, 2))
    leaves = {
        name: Leaf(name, value.shape, value.dtype, lambda value=value: value)
        for name, value in (("pos_embedding", positions), ("segments", segments))
    }
    folded = lit_layouts.fold_tables(leaves, 16)["pos_embedding"]
    assert folded.shape == (1, 16, 8)
    np.testing.assert_array_equal(folded.read(), positions[:, :16] + segments[:, :1])


def test_the_temperature_of_a_file_that_has_none(written):
    """LiT's is the exponential of `t`: 1 where there is none."""
    path = kept(written(LIT, "LiT-mu"), lambda arrays: without(arrays, "t"))
    assert load_checkpoint(f"{path}:txt").pair.logit_scale == 1.0


def test_a_clip_without_its_scale_has_the_one_that_it_began_with(written):
    """openai/CLIP's own initial value: exp of log(1 / 0.07)."""
    from safetensors.numpy import load_file, save_file

    path = written(CLIP, "CLIP-mu/16", ".safetensors")
    save_file(without(load_file(path), "logit_scale"), path)
    assert load_checkpoint(f"{path}:txt").pair.logit_scale == pytest.approx(1 / 0.07, rel=1e-12)


@pytest.mark.parametrize("variant", ["LiT-mu", "LiT-muV"])
def test_the_vocabulary_is_the_number_of_rows(written, variant):
    path = written(LIT, variant)
    words = lit_layouts.WORDS if variant == "LiT-mu" else "txt/Embed_0/embedding"
    rows, width = np.load(path)[words].shape
    assert rows != width and load_checkpoint(f"{path}:txt").pair.vocabulary == rows


@pytest.mark.parametrize(
    ("family", "variant", "folder"),
    [
        (LIT, "LiT-mu", "txt/"),
        (LIT, "LiT-muV", "txt/"),
        (LIT, "LiT-mu", "img/"),
        (SIGLIP, "SigLIP-mu/16", "txt/"),
        (SIGLIP, "SigLIP-mu/16", "img/"),
    ],
)
def test_the_parameters_of_a_tower_are_the_numbers_of_its_leaves(written, family, variant, folder):
    path = written(family, variant)
    if variant == "LiT-mu":  # a number of rows of which no bit is that of the two segments
        rewrite(path, lambda arrays: arrays | {lit_layouts.POSITIONS: np.zeros((22, 128), np.float32)})
    stored = sum(value.size for name, value in np.load(path).items() if name.startswith(folder))
    assert load_checkpoint(f"{path}:{folder[:-1]}").num_params == stored


def test_texts_are_no_longer_than_their_positions(written):
    path = written(LIT, "LiT-mu")
    rewrite(path, lambda arrays: arrays | {lit_layouts.POSITIONS: np.zeros((12, 128), np.float32)})
    loaded = load_checkpoint(f"{path}:txt")
    assert (loaded.pair.length, loaded.architecture.length) == (12, 12)


def test_which_texts_keep_their_end_when_they_are_cut(written):
    """BERT's tokenizer cuts what is too long; that of the ViT-like text tower keeps the end token."""
    sticky = {
        variant: load_checkpoint(f"{written(LIT, variant)}:txt").pair.sticky_end for variant in ("LiT-mu", "LiT-muV")
    }
    assert sticky == {"LiT-mu": False, "LiT-muV": True}


def test_an_image_tower_by_itself_knows_no_tokens(written):
    path = written(CLIP, "CLIP-mu/16", ".safetensors", layout="clip_transformers", towers="image")
    pair = load_checkpoint(path).pair
    assert (pair.vocabulary, pair.length, pair.start, pair.end) == (0, 0, -1, -1)


def test_a_text_without_a_position_table(written):
    path = written(CLIP, "CLIP-mu/16", ".safetensors", layout="clip_transformers")
    from safetensors.numpy import load_file, save_file

    save_file(lacking(load_file(path), "text_model.*position_embedding"), path)
    with pytest.raises(CheckpointError, match="number of tokens"):
        load_checkpoint(f"{path}:txt")


def test_each_tower_of_a_given_variant_has_its_own_sizes(written):
    """g-opt/16 pairs an image tower of 1536 with a text tower of So400m's 1152."""
    path = written(SIGLIP, "SigLIP-mu/16")
    for tower, width, other in (("img", 1536, 1152), ("txt", 1152, 1536)):
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(f"{path}:{tower}", variant="SigLIP-g-opt/16")
        assert str(width) in str(caught.value) and str(other) not in str(caught.value)


@pytest.mark.slow
def test_the_end_of_each_text_is_told(written):
    loaded = load_checkpoint(f"{written(CLIP, 'CLIP-mu/16', '.safetensors')}:txt")
    model, ends = loaded.family.model(loaded), [3, 9, 1, 6]
    taken = model.signature.inputs[0]
    tokens = np.full((4, taken.shape[1]), taken.pad, np.int32)
    for row, end in enumerate(ends):
        tokens[row, :end], tokens[row, end] = 5, taken.end
    assert model.run(tokens)[POOLED].tolist() == ends


@pytest.mark.slow
def test_a_tower_runs_at_another_size_as_one_of_that_size(written):
    path = f"{written(SIGLIP, 'SigLIP-mu/16')}:img"
    images = np.random.default_rng(0).uniform(-1, 1, (1, 32, 80, 3)).astype(np.float32)
    found = [load_checkpoint(path), load_checkpoint(path, image_size=(32, 80))]
    given, expected = (loaded.family.model(loaded).run(images)["embedding"] for loaded in found)
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-6)  # the same sums


@pytest.mark.parametrize("tower", ["img", "txt"])
def test_embeddings_are_divided_by_their_norm_unless_asked(written, tower):
    path = f"{written(SIGLIP, 'SigLIP-mu/16')}:{tower}"
    asked = [load_checkpoint(path), *(load_checkpoint(path, normalize=each) for each in (True, False))]
    assert [found.architecture.normalize for found in asked] == [True, True, False]


def test_the_table_of_a_naflex_need_not_be_square(written):
    path = written(SIGLIP, "SigLIP2-mu/16-naflex")
    table = np.random.default_rng(0).standard_normal((3, 5, 32)).astype(np.float32)
    rewrite(path, lambda arrays: arrays | {"img/pos_embedding": table})
    found = load_checkpoint(f"{path}:img").params["pos_embedding"]
    np.testing.assert_array_equal(found, table.reshape(1, 15, 32))


@pytest.mark.parametrize("shape", [(4, 32), (1, 4, 4, 1, 32)])
def test_a_table_of_tips_has_four_axes(written, shape):
    path = written(TIPS, "TIPS-mu/14", image_size=(56, 56), towers="image")
    name = next(name for name in np.load(path).files if name.endswith("posembed_input"))
    rewrite(path, lambda arrays: arrays | {name: np.zeros(shape, np.float32)})
    with pytest.raises(CheckpointError, match=r"needed is \(1, rows, columns, width\)"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        ({"img/a", "txt/a", "t", "b"}, Layout.SIGLIP),
        ({"img/a", "t"}, Layout.CLIPPO),
        ({"img/a", "txt/a", "t"}, None),  # LiT's
        ({"img/a", "txt/a", "b"}, None),
        ({"llm/a", "t", "b"}, None),
        ({"txt/Encoder_0/encoderblock/a", "t", "b"}, Layout.SIGLIP_SCAN),
    ],
)
def test_what_makes_a_siglip(names, layout):
    assert detect(names) is layout


def test_only_towers_of_one_size_are_not_resized(written):
    path = written(SIGLIP, "SigLIP-mu/16")
    assert load_checkpoint(f"{path}:img").resizable and not load_checkpoint(f"{path}:txt").resizable


def test_the_width_by_the_query_where_no_norm_has_one():
    block = "Transformer/encoderblock_0/"
    leaves = {
        f"{block}MultiHeadDotProductAttention_0/query/kernel": leaf(24, 2, 12),
        f"{block}MultiHeadDotProductAttention_0/query/bias": leaf(2, 12),
        f"{block}MlpBlock_0/Dense_0/bias": leaf(96),
    }
    found = infer_encoder(leaves, FILE)
    assert (found.width, found.num_heads, found.mlp_dim, found.depth) == (24, 2, 96, 1)


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({}, "width, Transformer/encoderblock_0/LayerNorm_0/scale is missing or empty"),
        (
            {"LayerNorm_0/scale": (24,)},
            "mlp_dim, Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias is missing or empty",
        ),
        (
            {"LayerNorm_1/scale": (24,), "MlpBlock_0/Dense_0/kernel": (24, 96)},
            "num_heads, Transformer/encoderblock_0/query/bias is missing or empty",
        ),
        (
            {"LayerNorm_0/scale": (24,), "MlpBlock_0/Dense_0/bias": (0,), "attn/query/bias": (2, 12)},
            "mlp_dim, Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias is missing or empty",
        ),
    ],
)
def test_a_size_that_nothing_tells_is_named(left, said):
    leaves = {f"Transformer/encoderblock_0/{name}": leaf(*shape) for name, shape in left.items()}
    with pytest.raises(CheckpointError, match=f"x.npz: nothing tells the model's {said}"):
        infer_encoder(leaves, FILE)


@pytest.mark.parametrize(
    ("names", "rows", "expected"),
    [(("cls",), 10, 1), (("cls",), 9, 0), ((), 10, 0), ((), 9, 0)],  # 10 rows are 3 x 3 and a class token
)
def test_whether_a_table_begins_with_a_class_token(names, rows, expected):
    leaves = {"pos_embedding": leaf(1, rows, 8)} | {name: leaf(1, 1, 8) for name in names}
    assert class_row(leaves) == expected and math.isqrt(9) == 3


@pytest.mark.parametrize(
    ("family", "variant", "layout"),
    [
        (LIT, "LiT-mu", "lit"),
        (LIT, "LiT-muV", "lit_linen"),
        (SIGLIP, "SigLIP-mu/16", "siglip"),
        (SIGLIP, "SigLIP2-mu/16-naflex", "siglip_scan"),
        (SIGLIP, "SigLIP-mu/16", "siglip_transformers"),
        *((CLIP, "CLIP-mu/16", f"clip_{name}") for name in ("transformers", "flax", "openai", "scenic")),
    ],
)
def test_a_tower_is_read_whole_and_the_other_one_not_at_all(tmp_path, family, variant, layout):
    """What is looked at for values that are not finite: all that a file of this tower alone holds."""
    safe = family is CLIP or layout == "siglip_transformers"
    options = {"image_size": (48, 48), "layout": layout}

    def write(name, **more):
        (tmp_path / name).mkdir()
        path = tmp_path / name / ("a.safetensors" if safe else "a.npz")
        family.write_random(path, variant, RandomOptions(**options, **more))
        return path

    path = write("both")
    stored = {*read_container(path).leaves}
    for tower in ("image", "text"):
        alone = {*read_container(write(tower, towers=tower)).leaves}
        assert stored - load_checkpoint(f"{path}:{tower}").unused == alone


@pytest.mark.parametrize(
    ("rows", "given", "grid"),
    [
        (9, None, (3, 3)),
        (1, None, (1, 1)),
        (6, (2, 3), (2, 3)),
        (9, (1, 9), (1, 9)),
        (10, None, None),
        (8, None, None),
        (9, (2, 3), None),
        (0, None, None),
        (-1, None, None),
        (0, (0, 4), None),
    ],
)
def test_the_grid_that_rows_stand_for(rows, given, grid):
    if grid:
        assert square_grid(leaf(1, rows, 8), rows, given, FILE) == grid
        return
    shape = "2x3 " if given == (2, 3) else "0x4 " if given else "square "
    with pytest.raises(CheckpointError, match=f"x.npz: leaf: {rows} rows for patches, no {shape}grid") as error:
        square_grid(leaf(1, 0, 8), rows, given, FILE)
    assert error.value.fix == "Set posemb_grid to its (rows, columns)."
