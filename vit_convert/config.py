"""What a config file imports; the keys, their defaults and their checks are in `vit_convert.core.config`."""

import ml_collections

from vit_convert.core.config import default_config as default_config
from vit_convert.core.errors import UsageError, nearest


def published_config(name: str) -> ml_collections.ConfigDict:
    """The config of a public checkpoint, which is looked for in `checkpoints/` and fetched there otherwise.

    Args:
        name: in `vit_convert/checkpoint/published.py`: "B/32", or in any of its other forms ("ViT-B_32"); "bv_s16_i1k".

    Returns:
        The config: FP16 and INT8; of a checkpoint whose head was never trained, its features.

    Raises:
        UsageError: there is none of that name.

    Example:
        >>> published_config("B/32").checkpoint
        'gs://vit_models/imagenet21k+imagenet2012/ViT-B_32.npz'
    """
    from vit_convert.checkpoint.published import PUBLISHED

    given, name = name, name.removeprefix("ViT-").replace("_", "/") if name not in PUBLISHED else name
    if name not in PUBLISHED:
        raise UsageError(
            f"variant {given!r}: no public checkpoint is known.{nearest(name, PUBLISHED)}",
            fix="Set config.checkpoint to a file of your own.",
        )
    published, config = PUBLISHED[name], default_config()
    config.checkpoint = published.address
    config.precision = "fp16,int8"
    if published.stores_positions:
        config.variant = name
    else:
        config.image_size = published.image_size  # the file stores no table that would tell
    if published.zero_head:
        config.outputs = "features"
    return config
