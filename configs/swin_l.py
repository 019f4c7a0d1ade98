"""Swin-L/7 of microsoft/Swin-Transformer, windows of 7. 196,532,476 parameters with a 1000-class head; 224x224 pixels
and no other size.

The public file, fine-tuned on ImageNet-1k after 22k, is timm's: it is downloaded to checkpoints/ unless it is there
already; vit_convert/checkpoint/published.py has its address.

  python -m vit_convert --config swin_l.py --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import published_config


def get_config():
    return published_config("Swin-L/7")
