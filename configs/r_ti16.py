"""R+ViT-Ti/16 of google-research/vision_transformer: R_Ti_16. 6,337,704 parameters with a 1000-class head.

The public file, of 384 pixels, fine-tuned on ImageNet-1k, is downloaded to checkpoints/ unless it is there already;
vit_convert/checkpoint/published.py has its address.

  python -m vit_convert --config r_ti16.py --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import published_config


def get_config():
    return published_config("R+ViT-Ti/16")
