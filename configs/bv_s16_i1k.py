"""ViT-S/16 of google-research/big_vision, trained on ImageNet-1k: mean pooling, fixed sincos2d positions, a tanh layer before the head.

The public file has top-1 76.5 % at 224 pixels; it is looked for in checkpoints/ and fetched there otherwise:
vit_convert/checkpoint/published.py names it.

  python -m vit_convert --config bv_s16_i1k.py --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.checkpoint.published import PUBLISHED
from vit_convert.config import default_config


def get_config():
    config = default_config()
    config.checkpoint = PUBLISHED["bv_s16_i1k"].address
    config.image_size = 224  # a sincos2d file stores no table that would tell
    config.precision = "fp16,int8"
    return config
