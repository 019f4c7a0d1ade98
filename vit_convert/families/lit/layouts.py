"""The layouts in which LiTs were saved. No array is read."""

import enum
from collections.abc import Collection, Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.families.towers.architecture import Shape
from vit_convert.families.towers.naming import FLAX, Names, attention_names, places_of
from vit_convert.families.towers.places import Place
from vit_convert.families.vit import layouts as vit

FOLDERS = {"image": "img/", "text": "txt/"}
BERT = "txt/BertEncoder_0/"
_EMBEDDER = f"{BERT}embedder/"
SEGMENTS = f"{_EMBEDDER}embedders_segment_ids/embedding"
POSITIONS = f"{_EMBEDDER}embedders_position_ids/embedding"
WORDS = f"{_EMBEDDER}embedders_token_ids/embedding"
BERT_BLOCK = rf"{BERT}encoder_block/layer_sequence/layers_(\d{{1,6}})/"


class Layout(enum.Enum):
    """How a LiT's parameters are named on disk: a ViT of vit_jax under `img/`, the text tower under `txt/`."""

    LIT = "lit"
    """One counter for all parts of a ViT's block, as in vit_jax's other files."""

    LIT_LINEN = "lit_linen"
    """One counter for each kind of module, as Flax Linen counts."""


FORMS = {Layout.LIT: vit.Layout.VIT_JAX, Layout.LIT_LINEN: vit.Layout.VIT_JAX_LINEN}


def detect(names: Collection[str]) -> Layout | None:
    """Recognises the layout by the names of all leaves; None if they are not a LiT's, which has a temperature without a
    bias."""
    folders = {name.partition("/")[0] for name in names}
    if "txt" not in folders or "b" in folders:
        return None
    old = any("/LayerNorm_2/" in name or "/MlpBlock_3/" in name for name in names)
    return Layout.LIT if old else Layout.LIT_LINEN


def is_bert(names: Collection[str]) -> bool:
    """Whether the text tower is BERT."""
    return any(name.startswith(BERT) for name in names)


def bert_places(shapes: Mapping[str, Shape]) -> dict[str, Place]:
    """Where BERT's parameters are stored (flaxformer's names); `shapes` has the stored tables besides the tower's own
    leaves."""
    inner = "attention_block/attention_layer"
    layers = {
        **attention_names("", f"{inner}/query", f"{inner}/key", f"{inner}/value", "attention_block/dense_layer"),
        "LayerNorm_0": "attention_block/layer_norm",
        "MlpBlock_0/Dense_0": "mlp_block/mlp/dense_layer",
        "MlpBlock_0/Dense_1": "mlp_block/dense_layer",
        "LayerNorm_1": "mlp_block/layer_norm",
    }
    outer = {
        "Embed_0": f"{_EMBEDDER}embedders_token_ids",
        "pos_embedding": POSITIONS,
        "segments": SEGMENTS,
        "pre_norm": f"{_EMBEDDER}layer_norm",
        "head": "txt/head",
    }
    arrays = {name: shapes[name][1:] for name in ("pos_embedding", "segments")}
    names = Names(FLAX, f"{BERT}encoder_block/layer_sequence/layers_{{}}", layers, outer, arrays)
    return places_of(shapes, names)


def fold_tables(leaves: dict[str, Leaf], length: int) -> dict[str, Leaf]:
    """Merges BERT's two tables into one: all of a text is in the first segment, with at most `length` tokens."""
    table, segments = leaves["pos_embedding"].as_float32(), leaves["segments"].as_float32()
    shape = (1, length, table.shape[-1])
    folded = table.derive(shape, lambda value: value[:, :length] + segments.read()[:, :1])
    return {name: leaf for name, leaf in leaves.items() if name != "segments"} | {"pos_embedding": folded}
