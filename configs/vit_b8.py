"""ViT-B/8 of google-research/vision_transformer: B_8: 785 tokens at 224, the slowest of the B models. 86,576,872 parameters
with a 1000-class head.

Give the checkpoint, and for a meaningful INT8 engine a folder of calibration images; checkpoints/README.md lists the public files.

  python -m vit_convert --config vit_b8.py --config.checkpoint=CHECKPOINT.npz --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import default_config


def get_config():
    config = default_config()
    config.variant = "B/8"
    config.precision = "fp16,int8"
    config.batch.max = 32
    config.check.num_images = 2
    return config
