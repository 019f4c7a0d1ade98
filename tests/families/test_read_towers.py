"""What is known of a tower that was read: how its texts become tokens, its sizes, its names and its outputs."""

import pytest

from vit_convert.checkpoint.containers import read_container
from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.core.model import POOLED
from vit_convert.families.clip.family import CLIP
from vit_convert.families.family import RandomOptions
from vit_convert.families.lit.family import LIT
from vit_convert.families.load import load_checkpoint, towers_in
from vit_convert.families.random import write_random_checkpoint
from vit_convert.families.siglip.family import SIGLIP
from vit_convert.families.tips.family import TIPS
from vit_convert.families.towers.load import image_size_of
from vit_convert.families.towers.model import _gives_norm


@pytest.mark.parametrize(
    ("family", "variant", "suffix", "options", "expected"),
    [
        (SIGLIP, "SigLIP-mu/16", ".npz", {}, ("sentencepiece", -1, 1, 1, True, True, "sigmoid")),
        (
            SIGLIP,
            "SigLIP-mu/16",
            ".safetensors",
            {"layout": "siglip_transformers"},
            ("sentencepiece", -1, 1, 1, True, True, "sigmoid"),
        ),
        (CLIP, "CLIP-mu/16", ".safetensors", {}, ("clip", 94, 95, 0, True, True, "softmax")),
        (LIT, "LiT-mu", ".npz", {}, ("bert", 101, -1, 0, True, False, "softmax")),
        (LIT, "LiT-muV", ".npz", {}, ("sentencepiece", -1, 1, 1, False, True, "softmax")),
        (TIPS, "TIPS-mu/14", ".npz", {"towers": "text"}, ("sentencepiece", -1, -1, 0, True, False, "softmax")),
    ],
)
def test_how_a_familys_texts_become_tokens(written, family, variant, suffix, options, expected):
    """As each project's own tokenizer has it: start, end and padding tokens, whether texts are lower-cased, and whether
    the end stays where they are cut."""
    path = written(family, variant, suffix, **options)
    loaded = load_checkpoint(f"{path}:txt")
    pair, tower = loaded.pair, loaded.architecture
    assert (tower.start, tower.end, tower.pad) == (pair.start, pair.end, pair.pad)
    said = (pair.tokenizer, pair.start, pair.end, pair.pad, pair.lower, pair.sticky_end, pair.similarity)
    assert said == expected
    assert pair.towers == (("text",) if family is TIPS else ("image", "text")) and pair.family == family.name


@pytest.mark.parametrize("patch", [14, 16, 32])
def test_the_size_that_a_table_stands_for(patch):
    """A size that models are trained at where that many patches, and a rest, fit in it; else just the patches."""
    for rows in range(1, 66):
        fitting = [side for side in (224, 256, 336, 384, 448, 512, 896) if side // patch == rows]
        assert image_size_of((rows, 16), patch)[0] == (fitting or [rows * patch])[0]


@pytest.mark.parametrize(
    ("family", "variant", "suffix", "tower"),
    [
        (SIGLIP, "SigLIP-mu/16", ".npz", "txt"),
        (CLIP, "CLIP-mu/16", ".safetensors", "img"),
        (LIT, "LiT-mu", ".npz", "txt"),
    ],
)
@pytest.mark.parametrize(
    ("outputs", "head"), [("embedding", 1), ("features", 0), ("tokens", 0), ("embedding,tokens", 1)]
)
def test_what_stands_behind_the_outputs_is_left_out(written, family, variant, suffix, tower, outputs, head):
    whole = load_checkpoint(f"{written(family, variant, suffix)}:{tower}")
    found = load_checkpoint(f"{whole.path}:{tower}", outputs=outputs)
    assert found.architecture.head == whole.architecture.head * head
    assert any(name.startswith("head/") for name in found.params) == bool(head)
    gone = {name for name in whole.params if name.startswith("head/") and not head}
    assert {*whole.params} - {*found.params} == gone and {*found.params} <= {*whole.params}
    assert found.judge == ("embedding" if "embedding" in outputs else "cosine")


@pytest.mark.parametrize(
    ("family", "variant", "layout", "names"),
    [
        (
            LIT,
            "LiT-mu",
            "lit",
            "img/Transformer/posembed_input/pos_embedding img/cls img/embedding/kernel t txt/head/kernel "
            "img/Transformer/encoder_norm/bias txt/BertEncoder_0/embedder/layer_norm/scale",
        ),
        (
            LIT,
            "LiT-muV",
            "lit_linen",
            "img/Transformer/posembed_input/pos_embedding txt/pos_embedding txt/Embed_0/embedding "
            "txt/Encoder_0/encoderblock_0/LayerNorm_0/scale txt/Encoder_0/encoder_norm/bias",
        ),
        (
            SIGLIP,
            "SigLIP-mu/16",
            "siglip",
            "img/pos_embedding img/MAPHead_0/probe img/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel "
            "txt/pos_embedding txt/Encoder_0/encoder_norm/scale txt/head/bias t b",
        ),
        (
            SIGLIP,
            "SigLIP-mu/16",
            "siglip_transformers",
            "vision_model.embeddings.patch_embedding.weight vision_model.embeddings.position_embedding.weight "
            "vision_model.head.attention.in_proj_weight vision_model.post_layernorm.bias text_model.head.weight "
            "text_model.embeddings.token_embedding.weight text_model.final_layer_norm.weight logit_scale logit_bias",
        ),
        (
            CLIP,
            "CLIP-mu/16",
            "clip_transformers",
            "vision_model.embeddings.class_embedding vision_model.embeddings.position_embedding.weight "
            "vision_model.pre_layrnorm.weight visual_projection.weight text_projection.weight logit_scale "
            "text_model.encoder.layers.0.self_attn.q_proj.weight text_model.final_layer_norm.bias",
        ),
        (
            CLIP,
            "CLIP-mu/16",
            "clip_flax",
            "vision_model/embeddings/class_embedding vision_model/embeddings/position_embedding/embedding "
            "vision_model/pre_layrnorm/scale visual_projection/kernel text_projection/kernel",
        ),
        (
            CLIP,
            "CLIP-mu/16",
            "clip_openai",
            "visual.class_embedding visual.positional_embedding visual.conv1.weight visual.ln_pre.weight visual.proj "
            "visual.ln_post.bias positional_embedding text_projection token_embedding.weight ln_final.weight "
            "transformer.resblocks.0.attn.in_proj_weight transformer.resblocks.1.mlp.c_fc.bias",
        ),
        (
            CLIP,
            "CLIP-mu/16",
            "clip_scenic",
            "visual/class_embedding visual/positional_embedding visual/proj/kernel text/text_projection/kernel "
            "text/positional_embedding text/transformer/resblocks.0/attn/query/kernel",
        ),
    ],
)
def test_names_as_each_project_saves_them(tmp_path, family, variant, layout, names):
    """Written out here: what the writer of random files and the loader share would hide a name that both have wrong."""
    path = tmp_path / ("a.safetensors" if family is CLIP or layout == "siglip_transformers" else "a.npz")
    family.write_random(path, variant, RandomOptions(image_size=(48, 48), layout=layout))
    assert {*names.split()} - {*read_container(path).leaves} == set()


def test_which_tower_of_a_file_is_meant(written, tmp_path):
    path = written(SIGLIP, "SigLIP-mu/16")
    both = f"{path}:img and {path}:txt."
    assert towers_in(path) == ("image", "text")
    for name, tower in (("img", "image"), ("image", "image"), ("txt", "text"), ("text/", "text")):
        assert towers_in(f"{path}:{name}") == (tower,) and load_checkpoint(f"{path}:{name}").text == (tower == "text")
    for ask in (towers_in, load_checkpoint):
        with pytest.raises(UsageError, match=":params: the checkpoint has no such tower") as error:
            ask(f"{path}:params")
        assert error.value.fix == f"It has {both}"
    with pytest.raises(CheckpointError, match="an image tower and a text tower") as error:
        load_checkpoint(path)
    assert error.value.fix == f"Name one: {both}"
    for tower, name, other in (("image", "img", "txt"), ("text", "txt", "img")):
        alone = written(SIGLIP, "SigLIP-mu/16", towers=tower)
        assert towers_in(alone) == towers_in(f"{alone}:{name}") == (tower,)
        assert load_checkpoint(alone).text == (tower == "text")
        with pytest.raises(UsageError) as error:
            load_checkpoint(f"{alone}:{other}")
        assert error.value.fix == f"It has {alone}:{name}."
    write_random_checkpoint(tmp_path / "vit.npz", "mu/16", image_size=(32, 32))
    assert towers_in(tmp_path / "vit.npz") == () == towers_in(f"{tmp_path / 'vit.npz'}:params")


@pytest.mark.parametrize(
    ("family", "variant", "suffix", "tower", "pooled"),
    [
        (SIGLIP, "SigLIP-mu/16", ".npz", "img", None),  # by attention over all
        (SIGLIP, "SigLIP-mu/16", ".npz", "txt", 63),
        (LIT, "LiT-mu", ".npz", "img", 0),
        (LIT, "LiT-mu", ".npz", "txt", 0),
        (LIT, "LiT-muV", ".npz", "txt", 15),
        (CLIP, "CLIP-mu/16", ".safetensors", "img", 0),
        (CLIP, "CLIP-mu/16", ".safetensors", "txt", POOLED),  # the end of each text
    ],
)
def test_what_an_export_needs_to_know_of_a_tower(written, family, variant, suffix, tower, pooled):
    loaded = load_checkpoint(f"{written(family, variant, suffix)}:{tower}")
    model, depth = family.model(loaded), loaded.architecture.encoder.depth
    assert model.pooled_token == pooled and model.kind == loaded.architecture
    assert model.position_table == "pos_embedding"
    padded = variant == "LiT-mu" and tower == "txt"  # whose mask is made of the tokens, beside the stream
    norm = [] if padded else ["encoder_norm"]
    assert model.taps == [*["embedded"][: int(padded)], *(f"block_{i:02d}" for i in range(depth)), *norm]
    assert {*model.params} == {*loaded.params} and {*model.traced_shapes} <= {*loaded.params}


@pytest.mark.parametrize(
    ("variant", "suffix", "tower", "outputs", "is_norm"),
    [
        ("SigLIP-mu/16", ".npz", "img", "embedding", False),
        ("SigLIP-mu/16", ".npz", "img", "features", False),
        ("SigLIP-mu/16", ".npz", "img", "tokens", True),
        ("SigLIP-mu/16", ".npz", "img", "embedding,tokens", True),
        ("SigLIP-mu/16", ".npz", "img", "grid", False),
        ("SigLIP-mu/16", ".npz", "txt", "features", False),
        ("SigLIP-mu/16", ".npz", "txt", "tokens", True),
        ("SigLIP-mu/16", ".npz", "txt", "embedding,tokens", True),
        ("LiT-mu", ".npz", "img", "tokens", False),  # without the class token
        ("CLIP-mu/16", ".safetensors", "img", "features", False),
        ("PaliGemma-mu/14", ".npz", "img", "tokens", False),  # behind a product
        ("Gemma3-mu/14", ".npz", "img", "tokens", False),  # means of four by four
    ],
)
def test_whether_an_output_is_the_last_norm_as_it_is(tmp_path, variant, suffix, tower, outputs, is_norm):
    """Which then is no tap, as a value has one name."""
    path, side = tmp_path / f"a{suffix}", 112 if variant.endswith("/14") else 48
    write_random_checkpoint(path, variant, image_size=(side, side))
    assert _gives_norm(load_checkpoint(f"{path}:{tower}", outputs=outputs).architecture) is is_norm


def test_a_length_of_texts_has_no_meaning_for_images(written, tmp_path):
    write_random_checkpoint(tmp_path / "vit.npz", "mu/16", image_size=(32, 32))
    for path in (tmp_path / "vit.npz", f"{written(CLIP, 'CLIP-mu/16', '.safetensors')}:img"):
        with pytest.raises(UsageError, match="text_length=5") as error:
            load_checkpoint(path, text_length=5)
        assert error.value.fix
