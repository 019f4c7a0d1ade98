"""The models of timm that PyTorch teams run in place of ours."""

from typing import Any

import timm
import torch

_SIZES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}
_SIDES = {"7": 224, "12": 384}  # pixels that a Swin's window is for
_HYBRIDS = {
    "R+ViT-Ti/16": "vit_tiny_r_s16_p8_224",
    "R26+ViT-S/32": "vit_small_r26_s32_224",
    "R26+ViT-B/32": "vit_base_r26_s32_224",
    "R50+ViT-B/16": "vit_base_r50_s16_224",
    "R50+ViT-L/32": "vit_large_r50_s32_224",
}


def timm_name(variant: str) -> str:
    """The name under which timm has the model of a variant.

    Example:
        >>> timm_name("Swin-T/7")
        'swin_tiny_patch4_window7_224'
    """
    if variant in _HYBRIDS:
        return _HYBRIDS[variant]
    name, patch = variant.split("/")
    family, _, letters = name.rpartition("-")
    if family == "Mixer":
        return f"mixer_{letters.lower()}{patch}_224"
    if family == "Swin":
        return f"swin_{'tiny' if letters == 'T' else _SIZES[letters]}_patch4_window{patch}_{_SIDES[patch]}"
    return f"vit_{_SIZES[name]}_patch{patch}_224"


def create(variant: str, image_size: int) -> torch.nn.Module:
    """timm's model of a variant for images of a size, random, with 1000 classes, in float32."""
    name = timm_name(variant)
    options: dict[str, Any] = {"num_classes": 1000}
    if name.startswith("mixer"):  # takes one size, and a class
        options["act_layer"] = timm.layers.GELUTanh
    else:
        options["img_size"] = image_size
    if name.startswith("vit"):  # Swin has erf's GELU, as its checkpoints were trained with
        options["act_layer"] = "gelu_tanh"
    if name.startswith("vit") and not timm.is_model(name):  # a patch that timm has no name for: DINOv2's 14
        name, patch = "_patch".join((name.partition("_patch")[0], "16_224")), variant.partition("/")[2]
        options["patch_size"] = int(patch)
    return timm.create_model(name, **options).eval()
