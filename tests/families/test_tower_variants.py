"""Variants of towers by their names: what a file of one is read as, and what its texts begin, end and fill up with."""

import dataclasses

import numpy as np
import pytest

from vit_convert.core.errors import UsageError
from vit_convert.families.clip import variants as clip
from vit_convert.families.lit import variants as lit
from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint
from vit_convert.families.siglip import variants as siglip
from vit_convert.families.tips import variants as tips
from vit_convert.families.towers.architecture import parameter_count
from vit_convert.families.vit.variants import WIDTHS

NOT_OF_VIT = ("pool", "posemb", "pre_logits", "outlier_channels")


def lit_towers(name, size):
    row = lit.VARIANTS[name]
    return lit.image_tower(name, row, size), lit.text_tower(name, row, 16)


def siglip_towers(name, size):
    parsed = siglip.parse_variant(name)
    return siglip.image_tower(parsed, size), siglip.text_tower(parsed, 64, head=True)


def clip_towers(name, size):
    parsed = clip.parse_variant(name)
    encoders = (clip.encoder_of(parsed, tower) for tower in ("image", "text"))
    image = clip.image_tower(name, next(encoders), parsed.sizes.embedding, parsed.patch_size, size)
    return image, clip.text_tower(name, next(encoders), parsed.sizes.embedding, parsed.vocabulary, parsed.length)


@pytest.mark.parametrize(
    ("variant", "towers", "suffix"),
    [
        ("LiT-mu", lit_towers, ".npz"),
        ("LiT-muV", lit_towers, ".npz"),
        ("SigLIP-mu/16", siglip_towers, ".npz"),
        ("CLIP-mu/16", clip_towers, ".safetensors"),
        ("OpenCLIP-mu/16", clip_towers, ".safetensors"),
    ],
)
def test_a_file_of_a_variant_is_read_as_its_towers(tmp_path, variant, towers, suffix):
    """By the loader, which goes by the shapes and knows what a variant is from nowhere."""
    path = tmp_path / f"a{suffix}"
    write_random_checkpoint(path, variant, image_size=(48, 48))
    for part, tower in zip(("img", "txt"), towers(variant, (48, 48))):
        found = load_checkpoint(f"{path}:{part}").architecture
        assert dataclasses.replace(found, variant=tower.variant) == tower


@pytest.mark.parametrize("variant", ["TIPS-mu/14", "TIPSv2-mug/14", "TIPSv2-mu/14"])
def test_a_file_of_a_tips_is_read_as_its_tower(tmp_path, variant):
    parsed, path = tips.parse_variant(variant), tmp_path / "a.npz"
    size = (448, 448) if "v2" in variant else (56, 56)
    for kind, tower in (
        ("image", tips.image_tower(variant, parsed.image, 14, size)),
        ("text", tips.text_tower("TIPS-mu", parsed.text, parsed.vocabulary, 64)),  # of which every variant has the same
    ):
        write_random_checkpoint(path, variant, image_size=size, towers=kind)
        assert load_checkpoint(path).architecture == tower


def test_clips_tokens_are_those_of_its_vocabulary():
    """openai/CLIP's simple_tokenizer: <|startoftext|> and <|endoftext|> are the last two of 49,408."""
    text = clip_towers("CLIP-B/32", (224, 224))[1]
    assert (text.start, text.end, text.pad, text.vocabulary, text.length) == (49_406, 49_407, 0, 49_408, 77)


@pytest.mark.parametrize(("variant", "pad"), [("SigLIP-B/16", 1), ("SigLIP2-B/16", 0), ("SigLIP2-So400m/14", 0)])
def test_gemmas_vocabulary_fills_up_with_another_token(variant, pad):
    text = siglip.text_tower(siglip.parse_variant(variant), 64, head=True)
    assert (text.start, text.end, text.pad) == (-1, 1, pad)
    assert text.vocabulary == (256_000 if pad == 0 else 32_000)


@pytest.mark.parametrize("layout", ["clip_flax", "clip_openai"])
@pytest.mark.parametrize("suffix", [".msgpack", ".safetensors"])
def test_a_clip_is_written_in_the_container_that_its_name_says(tmp_path, layout, suffix):
    path = tmp_path / f"a{suffix}"
    write_random_checkpoint(path, "CLIP-mu/16", image_size=(48, 48), layout=layout)
    found = load_checkpoint(f"{path}:txt")
    assert found.layout.value == layout
    assert path.read_bytes()[:1] == b"\xdf" if suffix == ".msgpack" else path.read_bytes()[8:9] == b"{"


@pytest.mark.parametrize(
    ("vocabulary", "kind"),
    [
        (32_000, "SigLIP"),
        (250_000, "SigLIP"),
        (255_999, "SigLIP"),
        (256_000, "SigLIP2"),
        (256_001, "SigLIP"),
        (0, "SigLIP"),
    ],
)
def test_gemmas_vocabulary_makes_a_siglip_2(vocabulary, kind):
    """The multilingual SigLIP has mC4's 250,000 pieces."""
    assert siglip.kind_of(vocabulary) == kind


def test_words_of_a_random_tips_are_of_size_one_in_the_model(tmp_path):
    """Which takes them times the root of their width; other kernels are of variance one over their inputs."""
    write_random_checkpoint(tmp_path / "a.npz", "TIPS-mu/14", towers="text")
    arrays = np.load(tmp_path / "a.npz")
    # of 2560 and 2048 normal values the deviation is known to 1.6 %
    assert arrays["token_emb/emb_var"].std() * np.sqrt(32) == pytest.approx(1, rel=0.06)
    assert arrays["transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"].std() * np.sqrt(32) == pytest.approx(
        1, rel=0.06
    )


@pytest.mark.parametrize(
    ("parse", "wrong", "near"),
    [
        (siglip.parse_variant, "SigLIP-B", "SigLIP-B/16"),
        (siglip.parse_variant, "SigLIP-B/", "SigLIP-B/16"),
        (clip.parse_variant, "CLIP-B/", "CLIP-B/32"),
        (lit.parse_variant, "LiT-B16", "LiT-B16B"),
        (tips.parse_variant, "TIPS-B/", "TIPS-B/14"),
    ],
)
def test_other_names_are_refused_and_the_nearest_proposed(parse, wrong, near):
    with pytest.raises(UsageError) as error:
        parse(wrong)
    assert f"variant {wrong!r}: no " in str(error.value) and f"Did you mean {near}" in str(error.value)
    assert error.value.fix.startswith("Use ")


@pytest.mark.parametrize(("variant", "millions"), [("H/14", 986.11), ("g/14", 1366.68), ("bigG/14", 2539.57)])
def test_open_clips_larger_models_have_its_numbers_of_parameters(variant, millions):
    """As open_clip's docs/model_profile.csv has them: both towers and the logit scale, at 224 pixels."""
    image, text = clip_towers(f"OpenCLIP-{variant}", (224, 224))
    count = parameter_count(image, (224 // 14) ** 2 + 1) + parameter_count(text) + 1
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("variant", "image", "text"), [("H/14", 16, 16), ("g/14", 16, 16), ("bigG/14", 16, 20), ("L/14", 16, 12)]
)
def test_heads_of_clips_that_no_shape_tells(variant, image, text):
    """open_clip's model_configs: widths of heads are 80, 88 and 104 in the larger image towers, and 64 in any other."""
    towers = clip_towers(f"OpenCLIP-{variant}", (224, 224))
    assert [tower.encoder.num_heads for tower in towers] == [image, text]
    for kind, tower in zip(("image", "text"), towers):
        assert clip.HEADS[kind][tower.encoder.width] == tower.encoder.num_heads


@pytest.mark.parametrize("letters", ["S", "B", "L", "So400m"])
def test_tips_image_towers_are_vits(letters):
    assert tips.SIZES[letters] == WIDTHS[letters]
    blocks = 27 if letters == "So400m" else 12
    assert tips.parse_variant(f"TIPS-{letters}/14").text == dataclasses.replace(
        tips.parse_variant(f"TIPS-{letters}/14").image, depth=blocks, activation="relu"
    )


@pytest.mark.parametrize(
    ("variant", "suffix", "meaningless"),
    [
        ("mu/16", ".npz", ("towers", "length", "text_head")),
        ("R8+ViT-mu/8", ".npz", ("pool", "posemb", "outlier_channels", "towers", "length", "text_head")),
        ("Mixer-mu/16", ".npz", (*NOT_OF_VIT, "towers", "length", "text_head")),
        ("Swin-mu/7", ".safetensors", (*NOT_OF_VIT, "towers", "length", "text_head")),
        ("SigLIP-mu/16", ".npz", NOT_OF_VIT),
        ("CLIP-mu/16", ".safetensors", (*NOT_OF_VIT, "text_head")),
        ("LiT-mu", ".npz", (*NOT_OF_VIT, "length", "text_head")),
        ("TIPS-mu/14", ".npz", (*NOT_OF_VIT, "length", "text_head")),
        (
            "PaliGemma-mu/14",
            ".npz",
            (*NOT_OF_VIT, "towers", "length", "text_head"),
        ),
    ],
)
def test_options_without_a_meaning_are_refused(tmp_path, variant, suffix, meaningless):
    values = {"pool": "gap", "posemb": "sincos2d", "pre_logits": True, "outlier_channels": 2, "length": 8}
    values |= {"text_head": False, "towers": "text"}
    for name in meaningless:
        with pytest.raises(UsageError, match=f"{name}=.*: has no meaning for family"):
            write_random_checkpoint(tmp_path / f"a{suffix}", variant, **{name: values[name]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("named", ["img", "txt", "both"])
def test_a_tower_that_is_none_is_refused(tmp_path, named):
    with pytest.raises(UsageError, match=f"towers='{named}': neither image nor text"):
        write_random_checkpoint(tmp_path / "a.npz", "SigLIP-mu/16", towers=named)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variant", "layout", "said"),
    [
        ("mu/16", "big_visio", r"layout 'big_visio': vit has .*big_vision.*\. Did you mean big_vision"),
        ("SigLIP-mu/16", "vit_jax", "layout 'vit_jax': siglip has siglip, siglip_scan, siglip_transformers, clippo"),
    ],
)
def test_a_layout_that_a_family_has_not_is_refused(tmp_path, variant, layout, said):
    with pytest.raises(UsageError, match=said) as error:
        write_random_checkpoint(tmp_path / "a.npz", variant, layout=layout)
    assert error.value.fix == "Leave it out for the usual one." and not list(tmp_path.iterdir())
