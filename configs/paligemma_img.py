"""The image tower of PaliGemma at 224 pixels: SigLIP-So400m/14, 256 tokens of Gemma's width 2048.

python -m vit_convert --config paligemma_img.py --config.checkpoint=paligemma-3b-pt-224.npz:img --workdir out
"""

from vit_convert.config import default_config


def get_config():
    config = default_config()
    config.checkpoint = "paligemma-3b-pt-224.npz:img"
    config.variant = "PaliGemma-So400m/14"
    return config
