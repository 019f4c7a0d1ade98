"""SigLIP-B/16 of big_vision at 224 pixels: an image tower of 92,884,224 parameters, a text tower of 110,271,744.

The public file is downloaded to checkpoints/ unless it is there already. FILE:img or FILE:txt converts one tower:

  python -m vit_convert --config siglip_b16.py --config.checkpoint=siglip_b16_224.npz:img --workdir out
"""

from vit_convert.config import default_config


def get_config():
    config = default_config()
    config.checkpoint = "gs://big_vision/siglip/webli_en_b16_224_63724782.npz"
    config.variant = "SigLIP-B/16"
    return config
