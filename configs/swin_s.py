"""Swin-S/7 of microsoft/Swin-Transformer, windows of 7. 49,606,258 parameters with a 1000-class head; 224x224 pixels
and no other size.

The public file, trained on ImageNet-1k, is timm's: it is downloaded to checkpoints/ unless it is there already;
vit_convert/checkpoint/published.py has its address.

  python -m vit_convert --config swin_s.py --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import published_config


def get_config():
    return published_config("Swin-S/7")
