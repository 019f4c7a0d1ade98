"""ViT-S/16-gap of google-research/vision_transformer: S_16 with mean pooling and no class token (GSAM). 22,049,896
parameters with a 1000-class head.

Give the checkpoint, and for a meaningful INT8 engine a folder of calibration images; checkpoints/README.md lists the public files.

  python -m vit_convert --config vit_s16_gap.py --config.checkpoint=CHECKPOINT.npz --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import default_config


def get_config():
    config = default_config()
    config.variant = "S/16-gap"
    config.precision = "fp16,int8"
    return config
