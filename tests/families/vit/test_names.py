"""Names of leaves alone, without a file: what is stripped, which layout they are, and what each is called on disk."""

import numpy as np
import pytest

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.select import select
from vit_convert.core.errors import CheckpointError
from vit_convert.families.registry import family_of
from vit_convert.families.vit import layouts
from vit_convert.families.vit.layouts import Layout, canonicalize, detect, fold_class_row, preprocessing, stored_name

BLOCK = "Transformer/encoderblock_"


def leaf(name, shape=(2,), values=None):
    return Leaf(name, shape, np.dtype(np.float32), lambda: values)


def leaves(*names, shape=(2,)):
    return {name: leaf(name, shape) for name in names}


# --- select -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "subtree", "prefix", "kept"),
    [
        (["cls", "head/bias"], "", "", ["cls", "head/bias"]),
        (["params/cls", "opt/0/mu/cls", "chrono/steps"], "", "params/", ["cls"]),
        (["opt/target/cls", "opt/state/step", "extra/x"], "", "opt/target/", ["cls"]),
        (["cls", "opt/state/step", "chrono/steps", "optics/x"], "", "", ["cls", "optics/x"]),
        (["params/cls", "opt/target/head"], "", "params/", ["cls"]),
        (["img/cls", "txt/cls", "t"], "img", "img/", ["cls"]),
        (["img/cls", "txt/cls"], "/img/", "img/", ["cls"]),
        (["params/img/vit/cls", "params/imgs/x", "img/vit/y"], "img/vit", "params/img/vit/", ["cls"]),
    ],
)
def test_what_is_stripped(names, subtree, prefix, kept):
    found, left = select(leaves(*names), subtree, "f.npz")
    assert (found, list(left)) == (prefix, kept)
    assert all(left[name].name == prefix + name for name in kept)


@pytest.mark.parametrize(
    ("names", "subtree", "said"),
    [
        ([], "", "f.npz: no parameters under '/'; it holds "),
        (["opt/x", "chrono/y"], "", "f.npz: no parameters under '/'; it holds chrono/y, opt/x"),
        (["params/a", "b", "c", "d"], "img", "f.npz: no parameters under 'params/img/'; it holds b, c, d, params/a"),
        (["e", "d", "c", "b", "a"], "img", "f.npz: no parameters under 'img/'; it holds a, b, c, d and 1 more"),
        (["f", "e", "d", "c", "b", "a"], "img", "f.npz: no parameters under 'img/'; it holds a, b, c, d and 2 more"),
    ],
)
def test_nothing_is_left(names, subtree, said):
    with pytest.raises(CheckpointError) as error:
        select(leaves(*names), subtree, "f.npz")
    assert str(error.value) == said and "what follows ':'" in error.value.fix


# --- detect -----------------------------------------------------------------------------------------------------------

IN_MODULE, IN_ENCODER = "Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding"


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        # one counter for all modules of a block, whichever of them is there
        (["embedding/kernel", f"{BLOCK}0/LayerNorm_2/bias", IN_MODULE], Layout.VIT_JAX),
        (["embedding/kernel", f"{BLOCK}11/MlpBlock_3/Dense_0/bias"], Layout.VIT_JAX),
        ([f"{BLOCK}7/MultiHeadDotProductAttention_1/query/bias"], Layout.VIT_JAX),
        (["embedding/kernel", f"{BLOCK}0/LayerNorm_1/bias", IN_MODULE], Layout.VIT_JAX_LINEN),
        (["embedding/kernel", f"{BLOCK}0/MlpBlock_0/Dense_0/bias", IN_ENCODER], Layout.BIG_VISION_OLD),
        (["embedding/kernel", f"{BLOCK}0/MlpBlock_0/Dense_0/bias", "pos_embedding"], Layout.BIG_VISION),
        (["embedding/kernel", f"{BLOCK}0/MlpBlock_0/Dense_0/bias"], Layout.BIG_VISION),  # sincos2d
        (["embedding/kernel"], Layout.BIG_VISION),
        ([f"{BLOCK}0/x"], Layout.BIG_VISION),
        (["embedding/kernel", "Transformer/encoderblock/LayerNorm_0/bias", "pos_embedding"], Layout.BIG_VISION_SCAN),
        (["Transformer/encoderblock/LayerNorm_2/bias"], Layout.BIG_VISION_SCAN),
    ],
)
def test_layouts(names, layout):
    assert detect(names) is layout
    assert detect(names[::-1]) is layout
    assert family_of(names, "f.npz")[1] is layout


@pytest.mark.parametrize(
    ("names", "said", "fix"),
    [
        (
            ["img/embedding/kernel", "llm/x", "txt/y"],
            "a vision-language model (PaliGemma), which is not supported",
            ":img",
        ),
        (
            ["img/embedding/kernel", "txt/y"],
            "an image tower and a text tower (SigLIP, LiT or CLIP), which is not",
            "f.npz:img",
        ),
        (["img/embedding/kernel", "embedding/kernel"], "an image tower under img/ (CLIPPO)", "f.npz:img"),
        (["layers.0.blocks.0.mlp.fc1.weight"], "a PyTorch state dict", "Supported: hybrid, mixer, swin, vit"),
        (["head/x"], "no known layout; it holds head/x", "Supported: hybrid, mixer, swin, vit"),
        (
            ["Transformer/encoder_norm/bias", "embedding/bias"],
            "no known layout; it holds Transformer/encoder_norm/bias, embedding/",
            "",
        ),
    ],
)
def test_other_models(names, said, fix):
    with pytest.raises(CheckpointError) as error:
        family_of(names, "f.npz")
    assert str(error.value).startswith(f"f.npz: {said}") and fix in error.value.fix
    assert ("Supported" in error.value.fix) == ("img/embedding/kernel" not in names)


@pytest.mark.parametrize(
    ("prefix", "names", "family"),
    [
        ("img/", ["img/x", "txt/y", "t", "b"], "siglip"),
        ("img/", ["img/x", "txt/y", "t"], "lit"),
        ("img/", ["img/x", "t"], "siglip"),
        ("img/", ["img/x", "llm/y"], "paligemma"),
        # what lies elsewhere is not beside it
        ("params/img/", ["params/img/x", "params/txt/y", "params/t", "opt/b", "b"], "lit"),
        ("params/img/", ["params/img/x", "params/llm/y", "params/txt/z"], "paligemma"),
        ("params/", ["params/txt/x"], "big_vision"),
    ],
)
def test_preprocessing_by_what_lies_beside_a_tower(prefix, names, family):
    assert preprocessing(Layout.BIG_VISION, "gap", 10, prefix, names) == family


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("pool", ["tok", "gap", "map"])
@pytest.mark.parametrize("num_classes", [0, 1000])
def test_preprocessing_of_a_model_by_itself(layout, pool, num_classes):
    """SigLIP's tower has MAP pooling and no head; big_vision's classifiers have one."""
    siglip = layout.value in ("big_vision", "big_vision_scan") and pool == "map" and num_classes == 0
    assert preprocessing(layout, pool, num_classes, "", []) == ("siglip" if siglip else layout.value)


# --- canonical names --------------------------------------------------------------------------------------------------

MODULES = {  # of one block, in each era
    "vit_jax": ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),
    "linen": ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
}


def block(number, era, end="/bias"):
    return [f"{BLOCK}{number}/{module}{end}" for module in MODULES[era]]


@pytest.mark.parametrize("era", MODULES)
def test_modules_are_counted_kind_by_kind(era):
    names = [name for number in range(3) for name in block(number, era)]
    renamed = canonicalize(leaves(*names), "f.npz")
    assert {name: leaf.name for name, leaf in renamed.items()} == dict(
        zip((name for number in range(3) for name in block(number, "linen")), names, strict=True)
    )


@pytest.mark.parametrize("era", MODULES)
@pytest.mark.parametrize("missing", range(4))
def test_a_module_that_one_block_lacks_does_not_move_its_neighbours(era, missing):
    names, wanted = (
        [*block(0, e), *(name for i, name in enumerate(block(1, e)) if i != missing)] for e in (era, "linen")
    )
    assert list(canonicalize(leaves(*names), "f.npz")) == wanted


def test_a_map_head_counts_for_itself():
    inlined = ["probe", "MultiHeadDotProductAttention_0/out/bias", "LayerNorm_0/bias", "MlpBlock_0/Dense_1/bias"]
    renamed = canonicalize(leaves("embedding/bias", *inlined, *block(0, "vit_jax")), "f.npz")
    assert list(renamed) == ["embedding/bias", *(f"MAPHead_0/{name}" for name in inlined), *block(0, "linen")]
    old = [
        *block(0, "linen"),
        "MAPHead_0/MultiHeadDotProductAttention_0/out/bias",
        "MAPHead_0/LayerNorm_1/bias",
        "MAPHead_0/MlpBlock_2/Dense_1/bias",
    ]
    assert list(canonicalize(leaves(*old), "f.npz")) == [
        *block(0, "linen"),
        *(f"MAPHead_0/{name}" for name in inlined[1:]),
    ]


@pytest.mark.parametrize("place", ["pos_embedding", IN_MODULE, IN_ENCODER])
def test_the_position_table_is_on_top(place):
    assert list(canonicalize(leaves(place, f"{BLOCK}0/x"), "f.npz")) == ["pos_embedding", f"{BLOCK}0/x"]


def test_two_leaves_of_one_name():
    with pytest.raises(CheckpointError, match=f"f.npz: {IN_ENCODER} and pos_embedding are the same parameter"):
        canonicalize(leaves("pos_embedding", IN_ENCODER), "f.npz")


@pytest.mark.parametrize(
    ("numbers", "missing", "last"),
    [((1, 2), "0", 2), ((0, 2), "1", 2), ((0, 5), "1, 2", 5), ((3,), "0, 1", 3), ((0, 999_999), "1, 2", 999_999)],
)
def test_blocks_that_are_missing(numbers, missing, last):
    with pytest.raises(CheckpointError) as error:
        canonicalize(leaves(*(f"{BLOCK}{number}/x" for number in numbers)), "f.npz")
    assert str(error.value) == f"f.npz: encoder block {missing} missing, blocks up to {last} found" and error.value.fix


def test_a_file_without_a_block():
    with pytest.raises(CheckpointError, match=r"f\.npz: encoder block 0 missing, no block found"):
        canonicalize(leaves("embedding/kernel", "cls"), "f.npz")


def test_blocks_that_are_all_there():
    names = [f"{BLOCK}{number}/x" for number in (10, 0, 2, 1, 3, 4, 5, 6, 7, 8, 9)]
    # the last two are no numbers
    assert list(canonicalize(leaves(*names, f"{BLOCK}1234567/x", f"{BLOCK}y/x"), "f.npz"))[:11] == names


def test_naflex_is_told_by_its_embedding():
    with pytest.raises(CheckpointError, match=r"f\.npz: a NaFlex model"):
        canonicalize(leaves("embedding/kernel", shape=(768, 768)), "f.npz")
    for shape in ((16, 16, 3, 8), (8,), (3, 4, 5)):
        assert "embedding/kernel" in canonicalize(leaves("embedding/kernel", f"{BLOCK}0/x", shape=shape), "f.npz")


def test_a_stack_becomes_its_blocks():
    stack, values = "Transformer/encoderblock/MlpBlock_0/Dense_0/bias", np.arange(6, dtype=np.float32).reshape(3, 2)
    renamed = canonicalize({stack: leaf(stack, (3, 2), values), "cls": leaf("cls")}, "f.npz")
    assert list(renamed) == ["cls", *(f"{BLOCK}{i}/MlpBlock_0/Dense_0/bias" for i in range(3))]
    for i in range(3):
        one = renamed[f"{BLOCK}{i}/MlpBlock_0/Dense_0/bias"]
        assert (one.name, one.shape, one.dtype, one.read().tolist()) == (
            f"{stack}[{i}]",
            (2,),
            np.float32,
            [2 * i, 2 * i + 1],
        )


@pytest.mark.parametrize("shape", [(2, 5), (4, 5), (), (5, 3)])
def test_stacks_that_disagree(shape):
    names = [f"Transformer/encoderblock/{name}" for name in ("a", "b", "c")]
    stacks = leaves(*names, shape=(3, 5)) | {names[1]: leaf(names[1], shape)}
    with pytest.raises(CheckpointError) as error:
        canonicalize(stacks, "f.npz")
    assert str(error.value) == f"f.npz: {names[1]}: checkpoint {shape}, the other leaves are stacks of 3 blocks"


def test_the_class_tokens_row_is_folded_into_it():
    cls, table = np.array([[[1.0, 2.0]]], np.float16), np.arange(8, dtype=np.float32).reshape(1, 4, 2)
    held = {
        "cls": Leaf("cls", (1, 1, 2), cls.dtype, lambda: cls),
        "pos_embedding": leaf("p", (1, 4, 2), table),
        "head/bias": leaf("head/bias"),
    }
    folded = fold_class_row(held)
    assert folded["cls"].read().tolist() == [[[1.0, 3.0]]] and folded["cls"].shape == (1, 1, 2)
    assert folded["cls"].dtype == folded["cls"].read().dtype == np.float32
    assert folded["pos_embedding"].read().tolist() == table[:, 1:].tolist() and folded["pos_embedding"].shape == (
        1,
        3,
        2,
    )
    assert folded["head/bias"] is held["head/bias"] and list(folded) == list(held)


CANONICAL = [f"{name}{end}" for name in block(4, "linen", "") for end in ("/scale", "/Dense_0/kernel", "/query/kernel")]
CANONICAL += [
    "cls",
    "pos_embedding",
    "Transformer/encoder_norm/bias",
    "MAPHead_0/LayerNorm_0/bias",
    "MAPHead_0/MlpBlock_0/x",
    "head/bias",
]


@pytest.mark.parametrize(
    ("layout", "era", "table"),
    [
        (Layout.VIT_JAX, "vit_jax", IN_MODULE),
        (Layout.VIT_JAX_LINEN, "linen", IN_MODULE),
        (Layout.BIG_VISION, "linen", "pos_embedding"),
        (Layout.BIG_VISION_OLD, "linen", IN_ENCODER),
    ],
)
def test_names_on_disk(layout, era, table):
    modules = dict(zip(MODULES["linen"], MODULES[era], strict=True))
    for name in CANONICAL:
        parts = name.split("/")
        wanted = table if name == "pos_embedding" else name
        if name.startswith(BLOCK):
            wanted = "/".join([*parts[:2], modules[parts[2]], *parts[3:]])
        assert stored_name(name, layout) == wanted


def test_names_of_stacks():
    assert [
        stored_name(name, Layout.BIG_VISION_SCAN) for name in (f"{BLOCK}11/LayerNorm_1/bias", "pos_embedding", "cls")
    ] == [
        "Transformer/encoderblock/LayerNorm_1/bias",
        "pos_embedding",
        "cls",
    ]
    assert layouts.BLOCK == BLOCK
