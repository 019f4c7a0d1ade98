"""ViT-H/14 of google-research/vision_transformer: H_14, whose weights exceed 2 GB. 632,045,800 parameters with a
1000-class head.

The public file, of 224 pixels and pretrained on ImageNet-21k, has a head of zeros: its features are converted. It is
downloaded to checkpoints/ unless it is there already; vit_convert/checkpoint/published.py has its address. A
meaningful INT8 engine needs a folder of calibration images too.

  python -m vit_convert --config vit_h14.py --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import published_config


def get_config():
    config = published_config("H/14")
    config.batch.max = 32
    config.check.num_images = 2
    config.calibration.batch_size = 2
    return config
