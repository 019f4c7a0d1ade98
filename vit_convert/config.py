"""What a config file imports; the keys, their defaults and their checks are in `vit_convert.core.config`."""

from vit_convert.core.config import default_config as default_config
