"""Mixer-S/8 of google-research/vision_transformer. 20,646,504 parameters with a 1000-class head; 224x224 pixels and no
other size.

The public file, trained on ImageNet-1k with GSAM, is downloaded to checkpoints/ unless it is there already;
vit_convert/checkpoint/published.py has its address.

  python -m vit_convert --config mixer_s8.py --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import published_config


def get_config():
    return published_config("Mixer-S/8")
