"""Any published ViT of google-research/vision_transformer, by its name: --config vit.py:B/16, vit.py:L/16,
vit.py:B/32-gap-norep.

  python -m vit_convert --config vit.py:B/16 --config.calibration.data=IMAGES --workdir out

The public file is downloaded to checkpoints/ unless it is there already. The other files of this folder name one each.
"""

from vit_convert.config import published_config


def get_config(variant="B/32"):
    return published_config(variant)
