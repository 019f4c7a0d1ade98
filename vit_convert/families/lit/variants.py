"""LiT: its five published models and their sizes."""

import dataclasses

from vit_convert.core.errors import UsageError, nearest
from vit_convert.families.towers.architecture import Encoder, ImageTower, TextTower
from vit_convert.families.vit.variants import WIDTHS, Width

LENGTH = 16  # tokens of a text, in all of them
BERT_EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class Text:
    """A text tower.

    Attributes:
        sizes: of its blocks.
        bert: whether it is BERT; otherwise a ViT's blocks over tokens.
        vocabulary: number of different tokens.
        positions: rows of the position table on disk.
    """

    sizes: Width
    bert: bool
    vocabulary: int
    positions: int


@dataclasses.dataclass(frozen=True)
class Variant:
    """One model.

    Attributes:
        image: sizes of the image tower's blocks.
        patch_size: side of a patch in pixels.
        image_head: whether the image tower ends in a product.
        text: the text tower.
    """

    image: Width
    patch_size: int
    image_head: bool
    text: Text


_BASE = Text(WIDTHS["B"], True, 30_522, 512)
_LARGE = Text(WIDTHS["L"], True, 30_522, 512)
# vit_jax/configs/models.py; "mu" and "muV" are ours, for tests.
VARIANTS = {
    "LiT-B16B": Variant(WIDTHS["B"], 16, True, _BASE),
    "LiT-B16B_2": Variant(WIDTHS["B"], 16, False, _BASE),
    "LiT-L16L": Variant(WIDTHS["L"], 16, False, _LARGE),
    "LiT-L16S": Variant(WIDTHS["L"], 16, False, Text(WIDTHS["S"], False, 16_000, LENGTH)),
    "LiT-L16Ti": Variant(WIDTHS["L"], 16, False, Text(WIDTHS["Ti"], False, 16_000, LENGTH)),
    "LiT-mu": Variant(WIDTHS["mu"], 16, True, Text(Width(128, 2, 96, 2), True, 120, 24)),
    "LiT-muV": Variant(WIDTHS["mu"], 16, False, Text(Width(24, 2, 48, 2), False, 60, LENGTH)),
}
PUBLISHED = tuple(name for name in VARIANTS if not name.startswith("LiT-mu"))


def parse_variant(text: str) -> tuple[str, Variant]:
    """Reads a variant's name, such as "LiT-B16B_2".

    Raises:
        UsageError: no such variant.
    """
    if text not in VARIANTS:
        raise UsageError(f"variant {text!r}: no LiT.{nearest(text, PUBLISHED)}", fix=f"Use {', '.join(PUBLISHED)}.")
    return text, VARIANTS[text]


def name_of(
    tower: str, encoder: Encoder, patch_size: int = 0, *, image_head: bool | None = None, other: int = 0
) -> str:
    """The first model that has this tower, or "custom".

    Args:
        tower: "image" or "text".
        encoder: its blocks.
        patch_size: of an image tower.
        image_head: whether the image tower ends in a product, by which B16B differs from B16B_2; None if the file has
            no image tower.
        other: width of the other tower, by which the three L16 differ; 0 if the file has none.
    """
    sizes = Width(encoder.width, encoder.depth, encoder.mlp_dim, encoder.num_heads)
    same = [
        (name, row)
        for name, row in VARIANTS.items()
        if ((row.image, row.patch_size) == (sizes, patch_size) if tower == "image" else row.text.sizes == sizes)
    ]
    for name, row in same:
        width = (row.text.sizes if tower == "image" else row.image).width
        if image_head in (None, row.image_head) and other in (0, width):
            return name
    return same[0][0] if same else "custom"


def encoder_of(width: Width, *, bert: bool = False) -> Encoder:
    """The blocks of a row; in BERT's, norms follow each sum."""
    encoder = Encoder(width.width, width.depth, width.mlp_dim, width.num_heads)
    return dataclasses.replace(encoder, norm_epsilon=BERT_EPSILON, post_norm=True) if bert else encoder


def image_tower(name: str, variant: Variant, image_size: tuple[int, int]) -> ImageTower:
    """vit_jax's ViT: the class token, and perhaps a product."""
    embedding = variant.image.width if variant.image_head else 0
    encoder, patch = encoder_of(variant.image), variant.patch_size
    tower = ImageTower("lit", name, encoder, "tok", head=embedding, patch_size=patch, image_size=image_size)
    return dataclasses.replace(tower, class_tokens=1)


def text_tower(name: str, variant: Variant, length: int) -> TextTower:
    """BERT with its first token, or a ViT's blocks with the last one; a product to the image tower's width."""
    row, head = variant.text, variant.image.width
    if row.bert:
        return bert_tower(name, encoder_of(row.sizes, bert=True), head, row.vocabulary, length)
    encoder = encoder_of(row.sizes)
    tower = TextTower("lit", name, encoder, "last", head=head, vocabulary=row.vocabulary, length=length)
    return dataclasses.replace(tower, end=1, pad=1)


def bert_tower(name: str, encoder: Encoder, head: int, vocabulary: int, length: int) -> TextTower:
    """BERT: a norm before the blocks, no attention to padding, and pooling by its first token, [CLS]."""
    start = min(101, vocabulary - 1)  # in BERT's vocabularies
    return TextTower(
        "lit",
        name,
        encoder,
        "first",
        head=head,
        pre_norm=True,
        vocabulary=vocabulary,
        length=length,
        mask="padding",
        start=start,
        pad=0,
    )
