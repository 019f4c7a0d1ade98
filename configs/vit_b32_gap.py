"""ViT-B/32-gap-norep of google-research/vision_transformer: B_32 with mean pooling and no class token (GSAM).
88,222,696 parameters with a 1000-class head.

The public file, of 224 pixels, trained on ImageNet-1k, is downloaded to checkpoints/ unless it is there already;
vit_convert/checkpoint/published.py has its address. A meaningful INT8 engine needs a folder of calibration images too.

  python -m vit_convert --config vit_b32_gap.py --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import published_config


def get_config():
    return published_config("B/32-gap-norep")
