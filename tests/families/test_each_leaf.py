"""Every leaf of every layout, one at a time: without it, or with one more along an axis, the file is refused for that
leaf by its name on the disk, and for nothing else."""

import dataclasses
import pathlib
import re

import pytest

from vit_convert.checkpoint.containers import read_container
from vit_convert.checkpoint.select import select
from vit_convert.core.errors import ConvertError
from vit_convert.families.family import Asked
from vit_convert.families.random import write_random_checkpoint
from vit_convert.families.registry import FAMILIES, family_of, tower_family_of

FILE = pathlib.Path("f.npz")

# Variant, layout, side in pixels, further options: three blocks, so that two outvote one that is wrong.
CASES = {
    "vit": ("mu/16", "vit_jax", 48, {}),
    "vit_map": ("mu/16", "big_vision", 48, {"pool": "map"}),
    "hybrid": ("R8+ViT-mu/8", "vit_jax", 48, {}),
    "mixer": ("Mixer-mu/16", "mixer", 48, {}),
    "swin": ("Swin-mu/7", "swin_transformers", 56, {}),
    "swin_timm": ("Swin-mu/7", "swin_timm", 56, {}),
    "siglip": ("SigLIP-mu/16", "siglip", 48, {}),
    "siglip_transformers": ("SigLIP-mu/16", "siglip_transformers", 48, {}),
    "naflex": ("SigLIP2-mu/16-naflex", "siglip", 48, {}),
    "clippo": ("SigLIP-mu/16", "clippo", 48, {}),
    "lit_bert": ("LiT-mu", "lit", 48, {}),
    "lit": ("LiT-muV", "lit_linen", 48, {}),
    **{f"clip_{name}": ("CLIP-mu/16", f"clip_{name}", 48, {}) for name in ("transformers", "flax", "openai", "scenic")},
    "tips": ("TIPS-mug/14", "tips", 56, {"towers": "image"}),
    "tips_text": ("TIPS-mu/14", "tips", 56, {"towers": "text"}),
    "gemma3": ("Gemma3-mu/14", "gemma3", 112, {}),
}
# Of blocks that are alike one is enough.
LIKE_ANOTHER = re.compile(r"(encoderblock_|layers_|layers\.|layers/|resblocks\.|MixerBlock_|blocks\.)[02][/.]")
# Tables and last products of which nothing else in a file has a size: without one nothing tells it, and a longer one is
# that of another model.
SIZED_ALONE = re.compile(
    r"(pos_embedding|posembed_input|positional_embedding|cls|/embedding|(token|position)_embedding\.weight|emb_var"
    r"|(visual|text)_projection([./]\w+)?|proj/kernel|visual\.proj)$"
)
# Of two that tell the size of a head the bias goes first; a stem's channels fall into groups.
TELLS_A_SIZE = re.compile(r"((head([./]fc)?|classifier)[./]bias|gn_root/scale)$")
OF_THE_PAIR = ("t", "b", "logit_scale", "logit_bias", "temperature_contrastive")


def towers_of(stored):
    """The family of a file's leaves, their layout, and its towers."""
    if paired := tower_family_of(stored.keys(), asked="auto", known=FAMILIES):
        return paired
    return *family_of(stored.keys(), str(FILE)), ("",)


@pytest.fixture(scope="module", params=CASES)
def towers(request, tmp_path_factory):
    """(family, layout, tower, all leaves, names of the tower's own) of each tower of a file."""
    variant, layout, side, options = CASES[request.param]
    safe = layout.startswith(("clip_", "swin")) or layout == "siglip_transformers"
    path = tmp_path_factory.mktemp(request.param) / ("f.safetensors" if safe else "f.npz")
    write_random_checkpoint(path, variant, layout=layout, image_size=(side, side), **{"depth": 3, **options})
    _, stored = select(read_container(path).leaves, "", str(path))
    family, layout, kinds = towers_of(stored)
    found = []
    for kind in kinds:
        unused = family.load(stored, layout, Asked(FILE, tower=kind)).unused
        own = [name for name in stored if name not in unused and name not in OF_THE_PAIR]
        found.append((family, layout, kind, stored, [name for name in own if not LIKE_ANOTHER.search(name)]))
    return found


def refusal(family, layout, tower, leaves):
    """What is said of the leaves; "" where they are taken."""
    try:
        if towers_of(leaves)[:2] == (family, layout):  # else those of another model
            family.load(leaves, layout, Asked(FILE, tower=tower))
    except ConvertError as error:
        return str(error)
    return ""


def test_each_leaf_is_missed_by_its_name(towers):
    wrong = []
    for family, layout, tower, stored, own in towers:
        for name in own:
            said = refusal(family, layout, tower, {key: leaf for key, leaf in stored.items() if key != name})
            alone = SIZED_ALONE.search(name) or (name == "img/embedding/kernel" and len(stored[name].shape) == 2)
            told = re.fullmatch(rf"{FILE}: {re.escape(name)}: missing, variant \S+ needs \([\d, ]+\)\.", said)
            if not (told or (alone and said)):
                wrong.append((name, said))
    assert not wrong


def test_each_leaf_of_another_shape_is_told_by_it(towers):
    wrong = []
    for family, layout, tower, stored, own in towers:
        for name in (name for name in own if not TELLS_A_SIZE.search(name)):
            shape = stored[name].shape
            for axis in range(len(shape)):
                longer = tuple(size + (i == axis) for i, size in enumerate(shape))
                leaves = {**stored, name: dataclasses.replace(stored[name], shape=longer)}
                said = refusal(family, layout, tower, leaves)
                alone = SIZED_ALONE.search(name) and (said == "" or "square grid" in said)
                found = re.match(rf"{FILE}: {re.escape(name)}: checkpoint (\(.*?\)), variant custom needs ", said)
                told = found and found[1] in (str(longer), str(tuple(size for size in longer if size > 1)))
                if not (alone or told) or "more)" in said:
                    wrong.append((name, axis, said))
    assert not wrong


def test_a_missing_block_is_told_by_its_number(towers):
    """And not leaf for leaf, nor as a smaller model."""
    for family, layout, tower, stored, _ in towers:
        swin = family.name == "swin"
        block = re.compile(r"layers\.0\.blocks\.1\." if swin else LIKE_ANOTHER.pattern.replace("[02]", "1"))
        rest = {name: leaf for name, leaf in stored.items() if not block.search(name)}
        said = refusal(family, layout, tower, rest)
        assert re.fullmatch(rf"{FILE}: .*(block|layer) 1 missing, blocks up to 2 found", said), said


@pytest.mark.parametrize("case", CASES)
def test_a_named_variant_is_the_one_that_is_found(case, tmp_path):
    variant, layout, side, options = CASES[case]
    safe = layout.startswith(("clip_", "swin")) or layout == "siglip_transformers"
    path = tmp_path / ("f.safetensors" if safe else "f.npz")
    write_random_checkpoint(path, variant, layout=layout, image_size=(side, side), **options)
    _, stored = select(read_container(path).leaves, "", str(path))
    family, layout, kinds = towers_of(stored)
    for kind in kinds:
        found = family.load(stored, layout, Asked(path, tower=kind))
        named = family.load(stored, layout, Asked(path, tower=kind, variant=variant))
        same = dataclasses.replace(named.architecture, variant=found.architecture.variant)
        assert same == found.architecture and (named.pair is None) == (found.pair is None)
        own = [leaf.size for name, leaf in stored.items() if name not in found.unused and name not in OF_THE_PAIR]
        assert named.num_params == found.num_params == sum(own)
