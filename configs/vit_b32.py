"""ViT-B/32 of google-research/vision_transformer: B_32. 88,224,232 parameters with a 1000-class head.

Give the checkpoint, and for a meaningful INT8 engine a folder of calibration images; checkpoints/README.md lists the public files.

  python -m vit_convert --config vit_b32.py --config.checkpoint=CHECKPOINT.npz --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import default_config


def get_config():
    config = default_config()
    config.variant = "B/32"
    config.precision = "fp16,int8"
    return config
