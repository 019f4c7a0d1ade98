"""ViT-S/16 of google-research/big_vision, trained on ImageNet-1k: mean pooling, fixed sincos2d positions, a tanh layer
before the head.

The public file has top-1 76.5 % at 224 pixels; it is looked for in checkpoints/ and fetched there otherwise:
vit_convert/checkpoint/published.py names it.

  python -m vit_convert --config bv_s16_i1k.py --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import published_config


def get_config():
    return published_config("bv_s16_i1k")
