"""CLIP-B/32 of OpenAI, as transformers saves it: 151,277,313 parameters in both towers. Put model.safetensors and the
config.json beside it, which tells the activation, into a folder of their own.

  python -m vit_convert --config clip_b32.py --config.checkpoint=clip_b32/model.safetensors:txt --workdir out
"""

from vit_convert.config import default_config


def get_config():
    config = default_config()
    config.checkpoint = "clip_b32/model.safetensors"
    config.variant = "CLIP-B/32"
    return config
