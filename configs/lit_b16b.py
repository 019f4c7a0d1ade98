"""LiT-B16B of vision_transformer: a ViT-B/16 at 224 pixels and BERT base over 16 tokens, 195,871,489 parameters.

The public file is downloaded to checkpoints/ unless it is there already; LiT-B16B.txt beside it is BERT's vocabulary.

  python -m vit_convert --config lit_b16b.py --workdir out
"""

from vit_convert.config import default_config


def get_config():
    config = default_config()
    config.checkpoint = "gs://vit_models/lit/LiT-B16B.npz"
    config.variant = "LiT-B16B"
    return config
