"""R26+ViT-B/32 of google-research/vision_transformer: R26+ViT-B_32. 101,383,976 parameters with a 1000-class head.

The public file, of 224 pixels and ImageNet-21k, has a head of zeros, so features are converted. It is downloaded to
checkpoints/ unless it is there already; vit_convert/checkpoint/published.py has its address.

  python -m vit_convert --config r26_b32.py --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import published_config


def get_config():
    return published_config("R26+ViT-B/32")
