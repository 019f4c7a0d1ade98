"""ViT-S/32 of google-research/vision_transformer: AugReg S_32. 22,878,952 parameters with a 1000-class head.

The public file, of 384 pixels, fine-tuned on ImageNet-1k, is downloaded to checkpoints/ unless it is there already;
vit_convert/checkpoint/published.py has its address. A meaningful INT8 engine needs a folder of calibration images too.

  python -m vit_convert --config vit_s32.py --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import published_config


def get_config():
    return published_config("S/32")
