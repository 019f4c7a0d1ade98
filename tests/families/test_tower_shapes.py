"""Towers of every option: parameters listed one by one, their count in closed form and by hand, and what goes in and
out."""

import dataclasses
import math

import pytest

from vit_convert.core.signature import Output, Tensor
from vit_convert.families.towers.architecture import (
    Encoder,
    ImageTower,
    PatchTower,
    TextTower,
    leaf_shapes,
    parameter_count,
    signature_of,
)

ENCODER = Encoder(width=6, depth=2, mlp_dim=5, num_heads=3)
IMAGE = ImageTower("f", "v", ENCODER, "map", patch_size=4, image_size=(8, 12))
PATCHES = PatchTower("f", "v", ENCODER, "map", patch_size=2, grid=(3, 7), length=11)
TEXT = TextTower("f", "v", ENCODER, "last", vocabulary=13, length=9, start=1, end=2, pad=3)
# by hand: four products of 6 by 6 with biases; two of 6 by 5; two norms
ATTENTION, MLP, NORM = 4 * (36 + 6), 30 + 5 + 30 + 6, 12
BLOCK = ATTENTION + MLP + 2 * NORM
POOLING = 6 + ATTENTION + NORM + MLP


def changed(tower, encoder=None, **fields):
    return dataclasses.replace(tower, encoder=dataclasses.replace(tower.encoder, **(encoder or {})), **fields)


@pytest.mark.parametrize(
    ("tower", "count"),
    [
        # 4 x 4 x 3 values of a patch and a bias, 2 x 3 patches
        (IMAGE, (48 + 1 + 6) * 6 + 2 * BLOCK + NORM + POOLING),
        (changed(IMAGE, pool="gap"), (48 + 1 + 6) * 6 + 2 * BLOCK + NORM),
        (changed(IMAGE, pool="tok", class_tokens=2), (48 + 1 + 6 + 2) * 6 + 2 * BLOCK + NORM),
        (changed(IMAGE, pool="gap", patch_bias=False), (48 + 6) * 6 + 2 * BLOCK + NORM),
        (changed(IMAGE, pool="gap", pre_norm=True), (48 + 1 + 6) * 6 + 2 * BLOCK + 2 * NORM),
        (changed(IMAGE, pool="gap", head=4), (48 + 1 + 6) * 6 + 2 * BLOCK + NORM + 7 * 4),
        (changed(IMAGE, pool="gap", head=4, head_bias=False), (48 + 1 + 6) * 6 + 2 * BLOCK + NORM + 6 * 4),
        (changed(IMAGE, {"depth": 3}, pool="gap"), (48 + 1 + 6) * 6 + 3 * BLOCK + NORM),
        # two products in, one out
        (changed(IMAGE, {"activation": "swiglu"}, pool="gap"),
            (48 + 1 + 6) * 6 + 2 * (BLOCK + 30 + 5) + NORM),
        (changed(IMAGE, {"activation": "swiglu"}),
            (48 + 1 + 6) * 6 + 2 * (BLOCK + 30 + 5) + NORM + POOLING + 30 + 5),
        (PATCHES, (12 + 1 + 21) * 6 + 2 * BLOCK + NORM + POOLING),
        (TEXT, (13 + 9) * 6 + 2 * BLOCK + NORM),
        (changed(TEXT, {"post_norm": True}), (13 + 9) * 6 + 2 * BLOCK),
        (changed(TEXT, {"post_norm": True}, pre_norm=True), (13 + 9) * 6 + 2 * BLOCK + NORM),
        (changed(TEXT, head=4), (13 + 9) * 6 + 2 * BLOCK + NORM + 7 * 4),
    ],
)  # fmt: skip
def test_parameters_one_by_one_and_in_closed_form(tower, count):
    assert sum(map(math.prod, leaf_shapes(tower).values())) == parameter_count(tower) == count


def test_a_table_of_another_size_counts_as_it_is_stored():
    assert parameter_count(IMAGE, 50) == parameter_count(IMAGE) + (50 - 6) * 6
    assert parameter_count(TEXT, 4) == parameter_count(TEXT) + (4 - 9) * 6
    assert parameter_count(IMAGE, 0) == parameter_count(IMAGE) - 6 * 6


def test_names_and_shapes_in_their_order():
    shapes = leaf_shapes(changed(IMAGE, {"depth": 1}, class_tokens=2, pre_norm=True, head=4))
    block = "Transformer/encoderblock_0/"
    parts = [f"{block}LayerNorm_0", f"{block}MultiHeadDotProductAttention_0", f"{block}LayerNorm_1"]
    owners = [*dict.fromkeys(name.rpartition("/")[0] for name in shapes)]
    attention = [f"MultiHeadDotProductAttention_0/{name}" for name in ("query", "key", "value", "out")]
    mlp = ["MlpBlock_0/Dense_0", "MlpBlock_0/Dense_1"]
    assert owners == [
        "embedding", "", "pre_norm", parts[0], *(block + name for name in attention), parts[2],
        *(block + name for name in mlp), "Transformer/encoder_norm", "MAPHead_0",
        *(f"MAPHead_0/{name}" for name in (*attention, "LayerNorm_0", *mlp)), "head",
    ]  # fmt: skip
    query, out = (shapes[f"{parts[1]}/{name}/kernel"] for name in ("query", "out"))
    assert (query, out, shapes[f"{parts[1]}/key/bias"]) == ((6, 3, 2), (3, 2, 6), (3, 2))
    assert (shapes["embedding/kernel"], shapes["embedding/bias"]) == ((4, 4, 3, 6), (6,))
    assert (shapes["pos_embedding"], shapes["cls"], shapes["MAPHead_0/probe"]) == ((1, 6, 6), (1, 2, 6), (1, 1, 6))
    dense = [shapes[f"{block}MlpBlock_0/Dense_{i}/{name}"] for i in (0, 1) for name in ("kernel", "bias")]
    assert dense == [(6, 5), (5,), (5, 6), (6,)] and shapes["head/kernel"] == (6, 4)
    assert leaf_shapes(PATCHES)["embedding/kernel"] == (12, 6) and leaf_shapes(PATCHES)["pos_embedding"] == (1, 21, 6)
    text = leaf_shapes(TEXT)
    assert (text["Embed_0/embedding"], text["pos_embedding"]) == ((13, 6), (1, 9, 6)) and "head/kernel" not in text


def test_what_goes_in():
    assert signature_of(IMAGE).inputs == (Tensor("images", "float32", ("batch", 8, 12, 3), "NHWC"),)
    patches, coordinates, mask = signature_of(PATCHES).inputs
    assert (patches.name, patches.dtype, patches.shape) == ("patches", "float32", ("batch", 11, 12))
    assert (coordinates.name, coordinates.dtype, coordinates.shape, coordinates.below) == (
        "coordinates", "int32", ("batch", 11, 2), 7,
    )  # fmt: skip
    assert (mask.name, mask.dtype, mask.shape, mask.below) == ("mask", "int32", ("batch", 11), 2)
    (tokens,) = signature_of(TEXT).inputs
    assert tokens == Tensor("tokens", "int32", ("batch", 9), "", 13, 1, 2, 3)


def test_what_comes_out():
    assert (IMAGE.features, changed(IMAGE, head=4).features, IMAGE.grid, IMAGE.num_tokens) == (6, 4, (2, 3), 6)
    assert changed(IMAGE, class_tokens=2).num_tokens == 8
    for tower, width in ((IMAGE, 6), (PATCHES, 6), (changed(TEXT, head=4), 4)):
        assert signature_of(tower).outputs == (Output("embedding", "float32", ("batch", width), judge="embedding"),)
    square = changed(IMAGE, image_size=(32, 48), class_tokens=2)  # 8 x 12 patches
    for tower, shapes in (
        (
            changed(square, pool="tok"),
            {"features": (6,), "tokens": (96, 6), "grid": (8, 12, 6), "class_tokens": (2, 6)},
        ),
        (changed(square, pool="gap", head=4), {"embedding": (4,), "features": (6,), "tokens": (96, 6)}),
        # nothing is pooled: the head's product is each token's
        (changed(square, pool="none", head=4), {"features": (96, 6), "tokens": (96, 4), "grid": (8, 12, 4)}),
        # of each 4 x 4 tokens one
        (changed(square, pool="avg4"), {"features": (6, 6), "tokens": (6, 6), "grid": (2, 3, 6)}),
        (changed(PATCHES, pool="none"), {"features": (11, 6), "tokens": (11, 6)}),
        (changed(TEXT, head=4), {"features": (6,), "embedding": (4,), "tokens": (9, 6)}),
    ):
        found = signature_of(dataclasses.replace(tower, outputs=tuple(shapes))).outputs
        judges = {"embedding": "embedding"}
        assert found == tuple(
            Output(name, "float32", ("batch", *shape), judge=judges.get(name, "cosine"))
            for name, shape in shapes.items()
        )


def test_what_a_tower_is_unless_its_family_says_otherwise():
    """An image tower as most are published; a text whose tokens mean nothing yet, without a first or a last one."""
    image, text = ImageTower("x", "y", ENCODER, "map"), TextTower("x", "y", ENCODER, "last")
    assert (image.grid, image.num_tokens, image.patch_bias, image.table) == ((14, 14), 196, True, "aligned")
    patches = PatchTower("x", "y", ENCODER, "map")  # SigLIP 2's NaFlex
    assert (patches.patch_size, patches.grid, patches.length) == (16, (16, 16), 256)
    for tower in (image, text, patches):
        assert tower.normalize and tower.head_bias and not tower.pre_norm
        assert (tower.head, tower.epsilon, tower.outputs) == (0, 1e-8, ("embedding",))
    assert (text.start, text.end, text.pad, text.length, text.mask, text.vocabulary) == (-1, -1, 0, 64, "none", 0)
