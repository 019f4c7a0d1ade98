"""ViT-B/8 of google-research/vision_transformer: B_8: 785 tokens at 224, the slowest of the B models. 86,576,872
parameters with a 1000-class head.

The public file, of 384 pixels, fine-tuned on ImageNet-1k, is downloaded to checkpoints/ unless it is there already;
vit_convert/checkpoint/published.py has its address. A meaningful INT8 engine needs a folder of calibration images too.

  python -m vit_convert --config vit_b8.py --config.calibration.data=IMAGES --workdir out
"""

from vit_convert.config import published_config


def get_config():
    config = published_config("B/8")
    config.batch.max = 32
    config.check.num_images = 2
    return config
