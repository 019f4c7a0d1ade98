"""The smallest variant, width 32 and one block, with random weights: every stage in seconds, for trying things out.

python -m vit_convert.families.random --variant=mu/16 --output=mu16.npz
python -m vit_convert --config vit_mu16.py --workdir out
"""

from vit_convert.config import default_config


def get_config():
    config = default_config()
    config.checkpoint = "mu16.npz"
    config.variant = "mu/16"
    config.precision = "fp16,int8"
    return config
