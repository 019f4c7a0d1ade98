"""SigLIP-So400m/14 of big_vision at 384 pixels: both towers together have 877,960,496 parameters.

The public file is downloaded to checkpoints/ unless it is there already. FILE:img or FILE:txt converts one tower:

  python -m vit_convert --config siglip_so400m14.py --config.checkpoint=siglip_so400m14_384.npz:img --workdir out
"""

from vit_convert.config import default_config


def get_config():
    config = default_config()
    config.checkpoint = "gs://big_vision/siglip/webli_en_so400m_384_58765454.npz"
    config.variant = "SigLIP-So400m/14"
    return config
