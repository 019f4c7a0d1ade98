"""The ViT that ships with the project, trained on scikit-learn's handwritten digits: every stage with real weights and
real images.

Takes about 15 s on two cores. JAX, and ONNX in FP32, FP16 and INT8, classify all 450 held-out images:
checkpoints/DIGITS.md.

  python -m vit_convert --config vit_digits.py --workdir out
"""

import pathlib

from vit_convert.config import default_config

_CHECKPOINTS = pathlib.Path(__file__).parent.parent / "checkpoints"


def get_config():
    config = default_config()
    config.checkpoint = str(_CHECKPOINTS / "vit_digits.npz")
    config.precision = "fp32,fp16,int8"
    config.batch.opt = 16
    config.check.num_images = 16
    config.calibration.data = str(_CHECKPOINTS / "digits" / "calibration.zip")
    config.evaluation.data = str(_CHECKPOINTS / "digits" / "heldout.zip")
    return config
