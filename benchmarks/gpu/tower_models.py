"""The towers of transformers that PyTorch teams run in place of ours, random, and what each takes."""

from collections.abc import Callable
from typing import Any

import torch

from vit_convert.families.clip import variants as clip
from vit_convert.families.siglip import variants as siglip
from vit_convert.families.towers.architecture import Encoder

_ACTIVATIONS = {"quick": "quick_gelu", "erf": "gelu", "tanh": "gelu_pytorch_tanh"}
_LENGTH = 64  # tokens of SigLIP's texts


def is_tower(variant: str) -> bool:
    """Whether a variant names a tower: "CLIP-B/32:img", "SigLIP-B/16:txt"."""
    return ":" in variant


def create(variant: str, image_size: int) -> tuple[torch.nn.Module, Callable[[int], torch.Tensor]]:
    """A random tower in float32.

    Args:
        variant: "CLIP-B/32:img" or "SigLIP-So400m/14:txt".
        image_size: height and width in pixels, of an image tower.

    Returns:
        The module, and what makes its input of a batch size: images [batch, 3, height, width] or tokens [batch,
        length].
    """
    whole, _, part = variant.partition(":")
    if part == "img":
        return _image(whole, image_size).eval(), lambda batch: 2 * torch.rand(batch, 3, image_size, image_size) - 1
    model, vocabulary, length = _text(whole)

    def tokens(batch: int) -> torch.Tensor:
        words = torch.randint(2, vocabulary - 2, (batch, length))
        words[:, length // 2] = vocabulary - 1  # CLIP's end
        return words

    return model.eval(), tokens


def _sizes(encoder: Encoder) -> dict[str, Any]:
    return {
        "hidden_size": encoder.width,
        "intermediate_size": encoder.mlp_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
        "hidden_act": _ACTIVATIONS[encoder.activation],
    }


def _image(whole: str, image_size: int) -> torch.nn.Module:
    import transformers

    if "SigLIP" in whole:
        tower = siglip.image_tower(siglip.parse_variant(whole), (image_size, image_size))
        sizes = {**_sizes(tower.encoder), "image_size": image_size, "patch_size": tower.patch_size}
        return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes))
    parsed = clip.parse_variant(whole)
    sizes = {**_sizes(clip.encoder_of(parsed, "image")), "image_size": image_size, "patch_size": parsed.patch_size}
    config = transformers.CLIPVisionConfig(**sizes, projection_dim=parsed.sizes.embedding)
    return transformers.CLIPVisionModelWithProjection(config)


def _text(whole: str) -> tuple[torch.nn.Module, int, int]:
    import transformers

    if "SigLIP" in whole:
        tower = siglip.text_tower(siglip.parse_variant(whole), _LENGTH, head=True)
        sizes = {**_sizes(tower.encoder), "vocab_size": tower.vocabulary, "max_position_embeddings": _LENGTH}
        config = transformers.SiglipTextConfig(**sizes, projection_size=tower.head)
        return transformers.SiglipTextModel(config), tower.vocabulary, _LENGTH
    parsed = clip.parse_variant(whole)
    words = {"vocab_size": parsed.vocabulary, "max_position_embeddings": parsed.length}
    special = {"bos_token_id": parsed.vocabulary - 2, "eos_token_id": parsed.vocabulary - 1}
    sizes = {**_sizes(clip.encoder_of(parsed, "text")), **words, **special, "projection_dim": parsed.sizes.embedding}
    config = transformers.CLIPTextConfig(**sizes)
    return transformers.CLIPTextModelWithProjection(config), parsed.vocabulary, parsed.length
