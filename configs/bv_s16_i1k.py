"""ViT-S/16 of google-research/big_vision, trained on ImageNet-1k: mean pooling, fixed sincos2d positions, a tanh layer
before the head.

The public file has top-1 76.5 % at 224 pixels; it is downloaded to checkpoints/ unless it is there already;
vit_convert/checkpoint/published.py has its address.

  python -m vit_convert --config bv_s16_i1k.py --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import published_config


def get_config():
    return published_config("bv_s16_i1k")
