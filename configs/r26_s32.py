"""R26+ViT-S/32 of google-research/vision_transformer: R26_S_32. 36,431,912 parameters with a 1000-class head.

The public file, of 384 pixels, fine-tuned on ImageNet-1k, is downloaded to checkpoints/ unless it is there already;
vit_convert/checkpoint/published.py has its address.

  python -m vit_convert --config r26_s32.py --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import published_config


def get_config():
    return published_config("R26+ViT-S/32")
