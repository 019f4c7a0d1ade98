"""The canonical parameters: their names, shapes and number."""

import math

from vit_convert.families.vit.architecture import Architecture

BLOCK = "Transformer/encoderblock_"


def leaf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Lists every canonical parameter, in the order in which the model uses them.

    Args:
        architecture: the model.

    Returns:
        Shape by name; names are Flax Linen's, joined by "/".
    """
    a = architecture
    shapes: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (a.patch_size, a.patch_size, 3, a.width),
        "embedding/bias": (a.width,),
        "pos_embedding": (1, math.prod(a.grid), a.width),
    }
    if a.pool == "tok":
        shapes["cls"] = (1, 1, a.width)
    for i in range(a.depth):
        shapes |= _prefixed(f"{BLOCK}{i}/", _norm(a, 0) | _attention(a) | _norm(a, 1) | _mlp(a))
    shapes |= {"Transformer/encoder_norm/scale": (a.width,), "Transformer/encoder_norm/bias": (a.width,)}
    if not a.pools:
        return shapes
    if a.pool == "map":
        shapes |= _prefixed("MAPHead_0/", {"probe": (1, 1, a.width)} | _attention(a) | _norm(a, 0) | _mlp(a))
    if a.representation_size:
        shapes |= _prefixed("pre_logits/", _dense(a.width, a.representation_size))
    if a.num_classes:
        shapes |= _prefixed("head/", _dense(a.representation_size or a.width, a.num_classes))
    return shapes


def parameter_count(architecture: Architecture, posemb_rows: int) -> int:
    """Counts the parameters in closed form, without the list of leaves, so that each can check the other.

    Args:
        architecture: the model.
        posemb_rows: rows of the stored position table, including the class token's if it has one; 0 for sincos2d.

    Returns:
        Number of parameters that a file holds.
    """
    a = architecture
    d, m = a.width, a.mlp_dim
    attention, mlp = 4 * d * d + 4 * d, 2 * d * m + m + d
    count = 3 * a.patch_size**2 * d + d + posemb_rows * d + a.depth * (attention + mlp + 4 * d) + 2 * d
    if a.pool == "tok":
        count += d
    if not a.pools:
        return count
    if a.pool == "map":
        count += d + attention + 2 * d + mlp
    features = d
    if a.representation_size:
        features = a.representation_size
        count += (d + 1) * features
    return count + (features + 1) * a.num_classes


def _prefixed(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in shapes.items()}


def _dense(inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {"kernel": (inputs, outputs), "bias": (outputs,)}


def _norm(a: Architecture, number: int) -> dict[str, tuple[int, ...]]:
    return _prefixed(f"LayerNorm_{number}/", {"scale": (a.width,), "bias": (a.width,)})


def _attention(a: Architecture) -> dict[str, tuple[int, ...]]:
    heads = (a.num_heads, a.width // a.num_heads)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("query", "key", "value"):
        shapes |= {f"{name}/kernel": (a.width, *heads), f"{name}/bias": heads}
    return _prefixed(
        "MultiHeadDotProductAttention_0/", shapes | {"out/kernel": (*heads, a.width), "out/bias": (a.width,)}
    )


def _mlp(a: Architecture) -> dict[str, tuple[int, ...]]:
    return _prefixed("MlpBlock_0/Dense_0/", _dense(a.width, a.mlp_dim)) | _prefixed(
        "MlpBlock_0/Dense_1/", _dense(a.mlp_dim, a.width)
    )
