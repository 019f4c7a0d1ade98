"""ViT-H/14 of google-research/vision_transformer: H_14, whose weights exceed 2 GB. 632,045,800 parameters with a 1000-class head.

Give the checkpoint, and for a meaningful INT8 engine a folder of calibration images; checkpoints/README.md lists the public files.

  python -m vit_convert --config vit_h14.py --config.checkpoint=CHECKPOINT.npz --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import default_config


def get_config():
    config = default_config()
    config.variant = "H/14"
    config.precision = "fp16,int8"
    config.batch.max = 32
    config.check.num_images = 2
    config.calibration.batch_size = 2
    return config
