"""The Flax modules of our families, which JAX teams run as they are."""

from vit_convert.families.hybrid.module import module_of as hybrid
from vit_convert.families.mixer.module import MlpMixer
from vit_convert.families.swin.module import SwinTransformer
from vit_convert.families.towers.module import module_of as tower
from vit_convert.families.vit.module import ViT

MODULES = {"vit": ViT, "hybrid": hybrid, "mixer": MlpMixer, "swin": SwinTransformer, "siglip": tower, "clip": tower}
"""By family: what makes the module of an architecture."""
