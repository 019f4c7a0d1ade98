"""The towers of image-text models, in Flax Linen, with a tap after every block."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_convert.families import run as parts
from vit_convert.families.towers.architecture import Encoder, ImageTower, PatchTower, TextTower, Tower

Mask = jax.Array | None
MASKED = -1e4  # added to the score of a forbidden pair: its exp is 0 in float32, and it is finite in half precision


def attention(num_heads: int, mask: Mask) -> nn.Module:
    """Attention with a mask added to its scores, [batch or 1, 1, queries or 1, keys]."""
    function: Any = {} if mask is None else {"attention_fn": functools.partial(_masked_attention, added=mask)}
    return nn.MultiHeadDotProductAttention(
        num_heads=num_heads, deterministic=True, name="MultiHeadDotProductAttention_0", **function
    )


def _masked_attention(query: jax.Array, key: jax.Array, value: jax.Array, *, added: jax.Array, **_: Any) -> jax.Array:
    """softmax(q kᵀ / √d + added) v, each [batch, tokens, heads, size]."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key) + added.astype(query.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores, axis=-1), value)


class MlpBlock(nn.Module):
    """Two dense layers with an activation between them, or three, one of which is a gate."""

    encoder: Encoder

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, S, D] -> [B, S, D]
        e = self.encoder
        if e.activation == "swiglu":
            gate = nn.Dense(e.mlp_dim)(x)
            x = gate * nn.sigmoid(gate) * nn.Dense(e.mlp_dim)(x)
        else:
            x = _activate(nn.Dense(e.mlp_dim)(x), e.activation)
        return nn.Dense(e.width)(x)


def _activate(x: jax.Array, activation: str) -> jax.Array:
    if activation == "quick":
        return x * nn.sigmoid(1.702 * x)
    return nn.relu(x) if activation == "relu" else nn.gelu(x, approximate=activation == "tanh")


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream; with a LayerNorm before each, or after each sum."""

    encoder: Encoder

    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask = None) -> jax.Array:  # [B, S, D] -> [B, S, D]
        e = self.encoder
        norms = [nn.LayerNorm(epsilon=e.norm_epsilon, name=f"LayerNorm_{i}") for i in range(2)]
        if e.post_norm:
            x = norms[0](x + attention(e.num_heads, mask)(x, x))
            return norms[1](x + MlpBlock(e, name="MlpBlock_0")(x))
        y = norms[0](x)
        x = x + attention(e.num_heads, mask)(y, y)
        return x + MlpBlock(e, name="MlpBlock_0")(norms[1](x))


class Blocks(nn.Module):
    """The blocks and the norm after them."""

    encoder: Encoder

    def setup(self) -> None:
        self.encoderblock = [Block(self.encoder) for _ in range(self.encoder.depth)]
        if not self.encoder.post_norm:
            self.encoder_norm = nn.LayerNorm(epsilon=self.encoder.norm_epsilon)

    def normalize(self, x: jax.Array) -> jax.Array:
        """[batch, tokens, width] -> the same."""
        return x if self.encoder.post_norm else self.encoder_norm(x)


class MAPHead(nn.Module):
    """Attention pooling: one learned probe attends to all tokens (big_vision, models/vit.py)."""

    encoder: Encoder

    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask = None) -> jax.Array:  # [B, S, D] -> [B, D]
        e = self.encoder
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, e.width))
        probe = jnp.tile(probe, [x.shape[0], 1, 1])
        x = attention(e.num_heads, mask)(probe, x)  # [B, 1, D]
        y = nn.LayerNorm(epsilon=e.norm_epsilon, name="LayerNorm_0")(x)
        x = x + MlpBlock(e, name="MlpBlock_0")(y)
        return x[:, 0]


class TowerModule(nn.Module):
    """What both towers share: blocks, head and norm of the embedding. A subclass has `embed`, `mask` and `pool`."""

    tower: Any

    def common(self) -> None:
        """The parts after the embedding; called by `setup`."""
        tower: Tower = self.tower
        if tower.pre_norm:
            self.pre_norm = nn.LayerNorm(epsilon=tower.encoder.norm_epsilon)
        self.Transformer = Blocks(tower.encoder)
        if tower.head:
            self.head = nn.Dense(tower.head, use_bias=tower.head_bias)

    def __call__(self, *inputs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Embeds images or texts.

        Args:
            inputs: of the tower, as in its signature.

        Returns:
            The first output of `finish`, and by name the others and the taps `embedded`, `block_00`… and
            `encoder_norm`, each [batch, tokens, width].
        """
        x, mask, taps = self.embed(*inputs), self.mask(*inputs), {}
        taps["embedded"] = x
        for i, block in enumerate(self.Transformer.encoderblock):
            x = taps[f"block_{i:02d}"] = block(x, mask)
        if not self.tower.encoder.post_norm:
            x = taps["encoder_norm"] = self.normalize(x)
        return parts.with_first(self.finish(x, *inputs), taps)

    def embed(self, *inputs: jax.Array) -> jax.Array:
        """Inputs -> [batch, tokens, width]."""
        raise NotImplementedError

    def mask(self, *inputs: jax.Array) -> Mask:
        """What is added to attention scores; None for nothing."""
        raise NotImplementedError

    def pool(self, x: jax.Array, *inputs: jax.Array) -> jax.Array:
        """[batch, tokens, width] -> [batch, width], or several tokens if they are not pooled to one."""
        raise NotImplementedError

    def normalize(self, x: jax.Array) -> jax.Array:
        """The encoder's last norm: [batch, tokens, width] -> the same."""
        return self.Transformer.normalize(x)

    def finish(self, x: jax.Array, *inputs: jax.Array) -> dict[str, jax.Array]:
        """The requested outputs, from [batch, tokens, width] after the last norm.

        Returns:
            `embedding` [batch, features]: pooling, head, and the division by the norm; `features`, before the head;
            `tokens` [batch, tokens, …] without class tokens, `grid` [batch, rows, columns, …] and `class_tokens`.
            Without pooling, `tokens` and `grid` are the head's outputs.
        """
        tower, found = self.tower, {}
        if not {"embedding", "features"}.isdisjoint(tower.outputs) or not tower.pools:
            found["features"] = self.pool(x, *inputs)
            found["embedding"] = self.head(found["features"]) if tower.head else found["features"]
        found["tokens"] = self.tokens(x) if tower.pools else found["embedding"]
        if tower.normalize and "embedding" in tower.outputs:
            norm = jnp.sqrt(jnp.sum(jnp.square(found["embedding"]), axis=-1, keepdims=True))
            found["embedding"] = found["embedding"] / (norm + tower.epsilon if tower.epsilon else norm)
        return {name: found[name] if name in found else self.shaped(name, x, found["tokens"]) for name in tower.outputs}

    def tokens(self, x: jax.Array) -> jax.Array:
        """[batch, tokens, width] -> the same without class tokens."""
        return x

    def shaped(self, name: str, x: jax.Array, tokens: jax.Array) -> jax.Array:
        """The tokens, under a text tower's name for them, and what only images have: `grid` and `class_tokens`."""
        return tokens


class ImageModule(TowerModule):
    """An image tower on the canonical parameters of `families.towers`."""

    tower: ImageTower

    def setup(self) -> None:
        tower = self.tower
        width, patch = tower.encoder.width, (tower.patch_size, tower.patch_size)
        self.embedding = nn.Conv(width, patch, strides=patch, padding="VALID", use_bias=tower.patch_bias)
        rows, columns = tower.grid
        self.pos_embedding = self.param(
            "pos_embedding", nn.initializers.normal(width**-0.5), (1, rows * columns, width)
        )
        if tower.class_tokens:
            self.cls = self.param("cls", nn.initializers.zeros, (1, tower.class_tokens, width))
        self.common()
        if tower.pool == "map":
            self.MAPHead_0 = MAPHead(tower.encoder)

    def embed(self, images: jax.Array) -> jax.Array:  # type: ignore[override]
        """[batch, height, width, 3] -> [batch, tokens, width]; the part of an image that its patches do not tile is
        ignored."""
        x = self.embedding(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.pos_embedding
        if self.tower.class_tokens:
            x = jnp.concatenate([jnp.tile(self.cls, [x.shape[0], 1, 1]), x], axis=1)
        return self.pre_norm(x) if self.tower.pre_norm else x

    def mask(self, *inputs: jax.Array) -> Mask:
        """An image has none."""
        return None

    def pool(self, x: jax.Array, *inputs: jax.Array) -> jax.Array:
        """See `TowerModule.pool`."""
        if self.tower.pool == "map":
            return self.MAPHead_0(x)
        if self.tower.pool == "avg4":
            rows, columns = self.tower.grid
            x = x.reshape(x.shape[0], rows // 4, 4, columns // 4, 4, x.shape[-1])
            return jnp.mean(x, axis=(2, 4)).reshape(x.shape[0], rows * columns // 16, x.shape[-1])
        if self.tower.pool == "gap":
            return jnp.mean(x, axis=1)
        return self.tokens(x) if self.tower.pool == "none" else x[:, 0]

    def tokens(self, x: jax.Array) -> jax.Array:
        """See `TowerModule.tokens`."""
        return x[:, self.tower.class_tokens :] if self.tower.class_tokens else x

    def shaped(self, name: str, x: jax.Array, tokens: jax.Array) -> jax.Array:
        """See `TowerModule.shaped`."""
        if name == "class_tokens":
            return x[:, : self.tower.class_tokens]
        side = 4 if self.tower.pool == "avg4" else 1
        rows, columns = self.tower.grid
        return tokens.reshape(x.shape[0], rows // side, columns // side, tokens.shape[-1])


class PatchModule(TowerModule):
    """An image tower over patches with their places, on the canonical parameters of `families.towers`."""

    tower: PatchTower

    def setup(self) -> None:
        tower, width = self.tower, self.tower.encoder.width
        self.embedding = nn.Dense(width)
        rows = tower.grid[0] * tower.grid[1]
        self.pos_embedding = self.param("pos_embedding", nn.initializers.normal(width**-0.5), (1, rows, width))
        self.common()
        if tower.pool == "map":
            self.MAPHead_0 = MAPHead(tower.encoder)

    def embed(self, patches: jax.Array, coordinates: jax.Array, mask: jax.Array) -> jax.Array:  # type: ignore[override]
        """Patches [batch, length, values], (row, column) [batch, length, 2] and mask [batch, length] -> tokens.

        The table is resampled between half-pixel centres to each image's own rows and columns, as by `jax.image.resize`
        with antialiasing, in a single product with the weights of all positions.
        """
        valid = _float(mask > 0)
        rows, columns = self.tower.grid
        down = _weights(_float(coordinates[:, :, 0]), valid, rows)  # [batch, length, rows]
        across = _weights(_float(coordinates[:, :, 1]), valid, columns)
        both = down[:, :, :, None] * across[:, :, None, :]
        table = jnp.matmul(both.reshape(-1, self.tower.length, rows * columns), self.pos_embedding[0])
        return self.embedding(patches) + table

    def mask(self, patches: jax.Array, coordinates: jax.Array, mask: jax.Array) -> Mask:  # type: ignore[override]
        """[batch, 1, 1, length]: no token attends to padding."""
        return (1 - _float(mask > 0)).reshape(-1, 1, 1, self.tower.length) * np.float32(MASKED)

    def pool(self, x: jax.Array, *inputs: jax.Array) -> jax.Array:
        """See `TowerModule.pool`."""
        return self.MAPHead_0(x, self.mask(*inputs)) if self.tower.pool == "map" else x


def _weights(places: jax.Array, valid: jax.Array, old: int) -> jax.Array:
    """The weights of the `old` positions of the table's side for each new one: [batch, length] -> [batch, length,
    old]."""
    places = places * valid  # padding counts as the first position, whatever its coordinates say
    count = jnp.max(places, axis=1, keepdims=True) + 1  # of the image's side, in patches
    ratio = np.float32(old) / count
    centres = (places + np.float32(0.5)) * ratio - np.float32(0.5)
    width = nn.relu(ratio - 1) + 1  # width of the triangle: wider if the image has fewer patches
    distance = jnp.abs(centres[:, :, None] - jnp.arange(old, dtype=jnp.float32))
    weights = nn.relu(1 - distance / width[:, :, None])
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


class TextModule(TowerModule):
    """A text tower on the canonical parameters of `families.towers`."""

    tower: TextTower

    def setup(self) -> None:
        tower, width = self.tower, self.tower.encoder.width
        self.Embed_0 = nn.Embed(tower.vocabulary, width)
        self.pos_embedding = self.param("pos_embedding", nn.initializers.normal(width**-0.5), (1, tower.length, width))
        self.common()

    def embed(self, tokens: jax.Array) -> jax.Array:  # type: ignore[override]
        """[batch, length] -> [batch, length, width]."""
        x = self.Embed_0(tokens) + self.pos_embedding
        return self.pre_norm(x) if self.tower.pre_norm else x

    def mask(self, tokens: jax.Array) -> Mask:  # type: ignore[override]
        """[1, 1, length, length] for a causal tower, [batch, 1, 1, length] for one that ignores padding."""
        length = self.tower.length
        if self.tower.mask == "causal":
            return jnp.asarray(np.triu(np.full((1, 1, length, length), MASKED, np.float32), 1))
        if self.tower.mask == "padding":
            return _float(tokens == self.tower.pad).reshape(-1, 1, 1, length) * np.float32(MASKED)
        return None

    def pool(self, x: jax.Array, tokens: jax.Array) -> jax.Array:  # type: ignore[override]
        """See `TowerModule.pool`."""
        if self.tower.pool == "end":
            return _weighted(first_of(tokens, self.tower.end), x)
        if self.tower.pool == "mean":
            kept = 1 - _float(tokens == self.tower.pad)
            return _weighted(kept / (jnp.sum(kept, axis=1, keepdims=True) + np.float32(1e-8)), x)
        return x if self.tower.pool == "none" else x[:, 0 if self.tower.pool == "first" else self.tower.length - 1]


def first_of(tokens: jax.Array, token: int) -> jax.Array:
    """1 at the first occurrence of a token (at the last position if it does not occur), otherwise 0: [batch, length] ->
    float32 [batch, length].

    Computed by a product with a triangular matrix, which counts earlier occurrences: TensorRT has no ArgMax for 64-bit
    integers.
    """
    length = tokens.shape[1]
    found = jnp.maximum(_float(tokens == token), jnp.asarray(np.eye(length, dtype=np.float32)[-1:]))
    before = jnp.matmul(found, jnp.asarray(np.triu(np.ones((length, length), np.float32), 1)))
    return found * nn.relu(1 - before)


def _float(condition: jax.Array) -> jax.Array:
    return condition.astype(jnp.float32)


def _weighted(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Sum of tokens: [batch, length], [batch, length, width] -> [batch, width]."""
    return jnp.matmul(weights[:, None], x)[:, 0]


def module_of(tower: Tower) -> TowerModule:
    """The module of a tower."""
    if isinstance(tower, ImageTower):
        return ImageModule(tower)
    if isinstance(tower, PatchTower):
        return PatchModule(tower)
    assert isinstance(tower, TextTower)
    return TextModule(tower)
