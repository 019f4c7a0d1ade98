"""The towers of image-text models, one transformer with a few options: their structure, parameters and outputs."""

import dataclasses
import math

from vit_convert.core.signature import Dim, Signature, Tensor
from vit_convert.families.outputs import outputs_of

BLOCK = "Transformer/encoderblock_"
Shape = tuple[int, ...]
OF_TEXT = {"tokens": "token_features"}  # a text tower's name for an output, since `tokens` is its input


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A run of equal blocks.

    Attributes:
        width: size of the residual stream.
        depth: number of blocks.
        mlp_dim: hidden size of the MLP.
        num_heads: attention heads.
        activation: "tanh" or "erf" (GELU), "quick" (x · sigmoid(1.702 x)), "relu", or "swiglu" for a gated MLP of
            three layers.
        norm_epsilon: epsilon of every LayerNorm.
        post_norm: LayerNorms follow each sum, as in BERT, instead of preceding attention and MLP; there is then no
            final one.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    activation: str = "tanh"
    norm_epsilon: float = 1e-6
    post_norm: bool = False


@dataclasses.dataclass(frozen=True)
class Tower:
    """What both kinds of towers have in common.

    Attributes:
        family: name of the family.
        variant: such as "SigLIP-B/16"; "custom" if the shapes match no row of its table.
        encoder: its blocks.
        pool: how tokens are pooled to one vector; see the module.
        head: outputs of the last product; 0 for none.
        head_bias: whether it adds a bias.
        pre_norm: whether a LayerNorm precedes the first block.
        epsilon: added to the norm by which embeddings are divided.
        normalize: whether embeddings are divided by their norm.
        outputs: its outputs, see `families.outputs`; a tower without pooling applies its head to every token.
    """

    family: str
    variant: str
    encoder: Encoder
    pool: str
    head: int = 0
    head_bias: bool = True
    pre_norm: bool = False
    epsilon: float = 1e-8
    normalize: bool = True
    outputs: tuple[str, ...] = ("embedding",)

    @property
    def features(self) -> int:
        """Length of an embedding."""
        return self.head or self.encoder.width

    @property
    def pools(self) -> bool:
        """Whether the tokens are pooled to one vector."""
        return self.pool not in ("none", "avg4")


@dataclasses.dataclass(frozen=True)
class ImageTower(Tower):
    """A vision transformer.

    Attributes:
        patch_size: side of a patch in pixels.
        image_size: (height, width) in pixels that the position table is for, after any resampling.
        patch_bias: whether the patch embedding adds a bias.
        class_tokens: learned tokens in front of the patches.
        table: how its position table is resampled for other sizes, a key of `tables.RESAMPLERS`.
        pool: "map" (attention pooling), "tok" (first class token), "gap" (mean), "none", or "avg4" (mean of each 4 x
            4 tokens).
    """

    patch_size: int = 16
    image_size: tuple[int, int] = (224, 224)
    patch_bias: bool = True
    class_tokens: int = 0
    table: str = "aligned"

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens in the encoder."""
        return math.prod(self.grid) + self.class_tokens


@dataclasses.dataclass(frozen=True)
class PatchTower(Tower):
    """A vision transformer over patches of images of any aspect, as in SigLIP 2's NaFlex; padding is masked.

    Attributes:
        patch_size: side of a patch in pixels.
        grid: (rows, columns) of the position table, which is resampled for each image.
        length: patches of an image, including padding.
    """

    patch_size: int = 16
    grid: tuple[int, int] = (16, 16)
    length: int = 256


@dataclasses.dataclass(frozen=True)
class TextTower(Tower):
    """A transformer over tokens.

    Attributes:
        vocabulary: number of different tokens.
        length: tokens per text.
        mask: "none", "causal", or "padding": no token attends to padding.
        start: the token that begins a text; -1 for none.
        end: the token after a text; -1 for none.
        pad: the padding token.
        pool: "last" or "first" token, "end" (the end token), or "mean" of all but padding.
    """

    vocabulary: int = 0
    length: int = 64
    mask: str = "none"
    start: int = -1
    end: int = -1
    pad: int = 0


def image_shapes(tower: ImageTower) -> dict[str, Shape]:
    """Lists every canonical parameter of an image tower, in the order in which it uses them."""
    width, patch = tower.encoder.width, tower.patch_size
    shapes: dict[str, Shape] = {"embedding/kernel": (patch, patch, 3, width)}
    if tower.patch_bias:
        shapes["embedding/bias"] = (width,)
    shapes["pos_embedding"] = (1, math.prod(tower.grid), width)
    if tower.class_tokens:
        shapes["cls"] = (1, tower.class_tokens, width)
    shapes |= _encoder(tower)
    if tower.pool == "map":
        shapes |= _pooling(tower.encoder)
    return shapes | _head(tower)


def text_shapes(tower: TextTower) -> dict[str, Shape]:
    """Lists every canonical parameter of a text tower, in the order in which it uses them."""
    width = tower.encoder.width
    shapes: dict[str, Shape] = {
        "Embed_0/embedding": (tower.vocabulary, width),
        "pos_embedding": (1, tower.length, width),
    }
    return shapes | _encoder(tower) | _head(tower)


def leaf_shapes(tower: Tower) -> dict[str, Shape]:
    """Shape of every canonical parameter of a tower, in its order."""
    if isinstance(tower, ImageTower):
        return image_shapes(tower)
    if isinstance(tower, PatchTower):
        width, values = tower.encoder.width, 3 * tower.patch_size**2
        shapes: dict[str, Shape] = {"embedding/kernel": (values, width), "embedding/bias": (width,)}
        shapes["pos_embedding"] = (1, math.prod(tower.grid), width)
        return shapes | _encoder(tower) | _pooling(tower.encoder)
    assert isinstance(tower, TextTower)
    return text_shapes(tower)


def parameter_count(tower: Tower, table_rows: int | None = None) -> int:
    """Counts a tower's parameters in closed form, without the list of leaves, so that each can check the other.

    Args:
        tower: the tower.
        table_rows: rows of the stored position table; None for as many as the tower has tokens.

    Returns:
        Number of parameters that a file holds for it.
    """
    e = tower.encoder
    d, m = e.width, e.mlp_dim
    attention, mlp = 4 * (d * d + d), (3 * d * m + 2 * m + d) if e.activation == "swiglu" else (2 * d * m + m + d)
    count = e.depth * (attention + mlp + 4 * d) + 2 * d * ((not e.post_norm) + tower.pre_norm)
    if isinstance(tower, ImageTower):
        rows = math.prod(tower.grid) if table_rows is None else table_rows
        count += (3 * tower.patch_size**2 + tower.patch_bias + rows + tower.class_tokens) * d
        count += (d + attention + 2 * d + mlp) * (tower.pool == "map")
    elif isinstance(tower, PatchTower):
        count += (3 * tower.patch_size**2 + 1 + math.prod(tower.grid)) * d + d + attention + 2 * d + mlp
    elif isinstance(tower, TextTower):
        count += (tower.vocabulary + (tower.length if table_rows is None else table_rows)) * d
    return count + (d + tower.head_bias) * tower.head


def signature_of(tower: Tower) -> Signature:
    """Images, patches or tokens in; one embedding out, or one vector per token if nothing is pooled."""
    width, count = tower.encoder.width, _num_tokens(tower)
    each = width if tower.pools else tower.features  # of a token
    shapes: dict[str, tuple[Dim, ...]] = {
        "embedding": (tower.features,),
        "features": (width,) if tower.pools else (count, width),
        **dict.fromkeys(("tokens", *OF_TEXT.values()), (count, each)),
    }
    if isinstance(tower, ImageTower):
        side = 4 if tower.pool == "avg4" else 1
        shapes |= {"grid": (tower.grid[0] // side, tower.grid[1] // side, each)}
        shapes |= {"class_tokens": (tower.class_tokens, width)}
    return Signature(_taken(tower), outputs_of(tower.outputs, shapes))


def _taken(tower: Tower) -> tuple[Tensor, ...]:
    if isinstance(tower, ImageTower):
        return (Tensor("images", "float32", ("batch", *tower.image_size, 3), "NHWC"),)
    if isinstance(tower, PatchTower):
        places = ("batch", tower.length)
        return (
            Tensor("patches", "float32", (*places, 3 * tower.patch_size**2)),
            Tensor("coordinates", "int32", (*places, 2), below=max(tower.grid)),
            Tensor("mask", "int32", places, below=2),
        )
    assert isinstance(tower, TextTower)
    special = (tower.start, tower.end, tower.pad)
    return (Tensor("tokens", "int32", ("batch", tower.length), "", tower.vocabulary, *special),)


def _num_tokens(tower: Tower) -> int:
    """Number of vectors for an image or a text if nothing is pooled, not counting class tokens."""
    if isinstance(tower, TextTower | PatchTower):
        return tower.length
    assert isinstance(tower, ImageTower)
    return math.prod(tower.grid) // (16 if tower.pool == "avg4" else 1)


def _encoder(tower: Tower) -> dict[str, Shape]:
    e = tower.encoder
    shapes: dict[str, Shape] = {}
    if tower.pre_norm:
        shapes |= _prefixed("pre_norm/", _scale_bias(e.width))
    for i in range(e.depth):
        shapes |= _prefixed(f"{BLOCK}{i}/", _norm(e, 0) | _attention(e) | _norm(e, 1) | _mlp(e))
    return shapes | ({} if e.post_norm else _prefixed("Transformer/encoder_norm/", _scale_bias(e.width)))


def _pooling(e: Encoder) -> dict[str, Shape]:
    return _prefixed("MAPHead_0/", {"probe": (1, 1, e.width)} | _attention(e) | _norm(e, 0) | _mlp(e))


def _head(tower: Tower) -> dict[str, Shape]:
    if not tower.head:
        return {}
    shapes = _dense(tower.encoder.width, tower.head)
    return _prefixed("head/", shapes if tower.head_bias else {"kernel": shapes["kernel"]})


def _attention(e: Encoder) -> dict[str, Shape]:
    heads = (e.num_heads, e.width // e.num_heads)
    shapes: dict[str, Shape] = {}
    for name in ("query", "key", "value"):
        shapes |= {f"{name}/kernel": (e.width, *heads), f"{name}/bias": heads}
    return _prefixed(
        "MultiHeadDotProductAttention_0/", shapes | {"out/kernel": (*heads, e.width), "out/bias": (e.width,)}
    )


def _mlp(e: Encoder) -> dict[str, Shape]:
    hidden = 2 if e.activation == "swiglu" else 1  # a gate and the values that it multiplies
    layers = [*(_dense(e.width, e.mlp_dim) for _ in range(hidden)), _dense(e.mlp_dim, e.width)]
    return {f"MlpBlock_0/Dense_{i}/{name}": shape for i, layer in enumerate(layers) for name, shape in layer.items()}


def _norm(e: Encoder, number: int) -> dict[str, Shape]:
    return _prefixed(f"LayerNorm_{number}/", _scale_bias(e.width))


def _scale_bias(width: int) -> dict[str, Shape]:
    return {"scale": (width,), "bias": (width,)}


def _dense(inputs: int, outputs: int) -> dict[str, Shape]:
    return {"kernel": (inputs, outputs), "bias": (outputs,)}


def _prefixed(prefix: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    return {prefix + name: shape for name, shape in shapes.items()}
