"""What a config file imports; the keys, their defaults and their checks are in `vit_convert.core.config`."""

import ml_collections

from vit_convert.core.config import default_config as default_config
from vit_convert.core.errors import UsageError, nearest


def published_config(name: str) -> ml_collections.ConfigDict:
    """The config of a public checkpoint, which is downloaded to `checkpoints/` unless it is there already.

    Args:
        name: from `vit_convert/checkpoint/published.py`: "B/32", also written "ViT-B_32"; "bv_s16_i1k".

    Returns:
        The config, for FP16 and INT8; if the checkpoint's head was never trained, for its features.

    Raises:
        UsageError: no public checkpoint has that name.

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
        config.image_size = published.image_size  # the file stores no position table from which to infer it
    if published.zero_head:
        config.outputs = "features"
    return config
