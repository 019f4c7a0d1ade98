"""The layouts in which CLIPs were saved: name and shape on disk of every canonical parameter. No array is read."""

import enum
import re
from collections.abc import Collection

from vit_convert.families.towers.architecture import ImageTower, Shape, Tower
from vit_convert.families.towers.naming import FLAX, FLAX_HEADS, TORCH, Names, Style, attention_names


class Layout(enum.Enum):
    """How a CLIP's parameters are named on disk."""

    TRANSFORMERS = "clip_transformers"
    """transformers: `vision_model.encoder.layers.3.self_attn.q_proj.weight`, `text_model.…`; also LAION's models."""

    FLAX = "clip_flax"
    """transformers' FlaxCLIP (to 2025): the same names with `/` and Flax's own leaves."""

    OPENAI = "clip_openai"
    """openai/CLIP's and open_clip's state dict: `visual.transformer.resblocks.3.attn.in_proj_weight`, text on top."""

    SCENIC = "clip_scenic"
    """google-research/scenic's parameters: `visual/transformer/resblocks.3/attn/query/kernel`; the dot is in the
    name."""


_DETECT = {
    Layout.TRANSFORMERS: r"(vision_model|text_model)\.(embeddings|encoder)\.",
    Layout.FLAX: r"(vision_model|text_model)/(embeddings|encoder)/",
    Layout.OPENAI: r"(visual\.)?transformer\.resblocks\.\d+\.",
    Layout.SCENIC: r"(visual|text)/transformer/resblocks[._]\d+/",
}
_OF_TOWER = {
    "image": re.compile(r"vision_model[./]|visual_projection[./]|visual[./]"),
    "text": re.compile(
        r"text_model[./]|text_projection|text/|transformer\.|token_embedding\.|positional_embedding$|ln_final\."
    ),
}
# Saved beside the parameters: row numbers, and the causal mask.
BUFFERS = re.compile(r"(position_ids|input_resolution|context_length|vocab_size|attn_mask|num_batches_tracked)$")


def detect(names: Collection[str]) -> Layout | None:
    """Recognises the layout by the names of all leaves; None if they are not a CLIP's."""
    if any(name.startswith(("vision_model.head.", "text_model.head.", "logit_bias")) for name in names):
        return None  # SigLIP's
    return next((layout for layout, start in _DETECT.items() if any(re.match(start, name) for name in names)), None)


def tower_of(name: str) -> str:
    """ "image" or "text"; "" for what belongs to the pair."""
    return next((tower for tower, start in _OF_TOWER.items() if start.match(name)), "")


def names_of(layout: Layout, tower: Tower, shapes: dict[str, Shape]) -> Names:
    """A layout's names for the parts of a tower.

    Args:
        layout: of the file.
        tower: image or text.
        shapes: as stored, from `naming.stored_tower`.
    """
    image = isinstance(tower, ImageTower)
    if layout in (Layout.TRANSFORMERS, Layout.FLAX):
        return _transformers(TORCH if layout is Layout.TRANSFORMERS else FLAX, image, shapes)
    return _openai(shapes, image) if layout is Layout.OPENAI else _scenic(shapes, image)


def _transformers(style: Style, image: bool, shapes: dict[str, Shape]) -> Names:
    dot, model = style.dot, "vision_model" if image else "text_model"
    attention = attention_names("", *(f"self_attn{dot}{part}_proj" for part in ("q", "k", "v", "out")))
    layers = {
        **attention,
        "LayerNorm_0": "layer_norm1",
        "LayerNorm_1": "layer_norm2",
        "MlpBlock_0/Dense_0": f"mlp{dot}fc1",
        "MlpBlock_0/Dense_1": f"mlp{dot}fc2",
    }
    table = f"{model}{dot}embeddings{dot}position_embedding{dot}{style.table}"
    outer = {"pos_embedding": table, "head": "visual_projection" if image else "text_projection"}
    arrays = {"pos_embedding": shapes["pos_embedding"][1:]}
    if image:
        outer |= {
            "embedding": f"{model}{dot}embeddings{dot}patch_embedding",
            "cls": f"{model}{dot}embeddings{dot}class_embedding",
            "pre_norm": f"{model}{dot}pre_layrnorm",  # so it is called
            "Transformer/encoder_norm": f"{model}{dot}post_layernorm",
        }
        arrays["cls"] = shapes["cls"][2:]
    else:
        outer |= {
            "Embed_0": f"{model}{dot}embeddings{dot}token_embedding",
            "Transformer/encoder_norm": f"{model}{dot}final_layer_norm",
        }
    return Names(style, f"{model}{dot}encoder{dot}layers{dot}{{}}", layers, outer, arrays)


def _openai(shapes: dict[str, Shape], image: bool) -> Names:
    model = "visual." if image else ""
    qkv = "attn.in_proj"
    layers = {
        **attention_names("", qkv, qkv, qkv, "attn.out_proj"),
        "LayerNorm_0": "ln_1",
        "LayerNorm_1": "ln_2",
        "MlpBlock_0/Dense_0": "mlp.c_fc",
        "MlpBlock_0/Dense_1": "mlp.c_proj",
    }
    outer = {
        "pos_embedding": f"{model}positional_embedding",
        "head/kernel": "visual.proj" if image else "text_projection",
        "Transformer/encoder_norm": "visual.ln_post" if image else "ln_final",
        "embedding": "visual.conv1",
        "cls": "visual.class_embedding",
        "pre_norm": "visual.ln_pre",
        "Embed_0": "token_embedding",
    }
    arrays = {"pos_embedding": shapes["pos_embedding"][1:], "head/kernel": shapes["head/kernel"]}
    if image:
        arrays["cls"] = shapes["cls"][2:]
    return Names(TORCH, f"{model}transformer.resblocks.{{}}", layers, outer, arrays)


def _scenic(shapes: dict[str, Shape], image: bool) -> Names:
    model = "visual" if image else "text"
    layers = {
        **attention_names("", *(f"attn/{part}" for part in ("query", "key", "value", "out"))),
        "LayerNorm_0": "ln_1",
        "LayerNorm_1": "ln_2",
        "MlpBlock_0/Dense_0": "mlp/c_fc",
        "MlpBlock_0/Dense_1": "mlp/c_proj",
    }
    outer = {
        "pos_embedding": f"{model}/positional_embedding",
        "head": "visual/proj" if image else "text/text_projection",
        "Transformer/encoder_norm": "visual/ln_post" if image else "text/ln_final",
        "embedding": "visual/conv1",
        "cls": "visual/class_embedding",
        "pre_norm": "visual/ln_pre",
        "Embed_0": "text/token_embedding",
    }
    arrays = {"pos_embedding": shapes["pos_embedding"][1:]}
    if image:
        arrays["cls"] = shapes["cls"][2:]
    return Names(FLAX_HEADS, f"{model}/transformer/resblocks.{{}}", layers, outer, arrays)
