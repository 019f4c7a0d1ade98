"""ViT-S/16 of google-research/big_vision, trained on ImageNet-1k: mean pooling, fixed sincos2d positions, a tanh layer before the head.

The file is gs://big_vision/vit_s16_i1k_90ep.npz, published top-1 76.5 % at 224.

  python -m vit_convert --config bv_s16_i1k.py --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import default_config


def get_config():
    config = default_config()
    config.checkpoint = "gs://big_vision/vit_s16_i1k_90ep.npz"
    config.image_size = 224  # a sincos2d file stores no table that would tell
    config.precision = "fp16,int8"
    return config
