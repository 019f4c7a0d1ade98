"""vit_convert: pretrained Flax/JAX vision models to TensorRT engines, with the numbers proved at every step.

The public names are imported when they are first used, so that each needs only what it works with:

>>> import vit_convert
>>> config = vit_convert.default_config()
>>> config.precision = "fp16,int8"
>>> sorted(vit_convert.__all__)
['Bundle', 'ConvertError', 'Session', 'default_config', 'published_config']
"""

import importlib
from typing import TYPE_CHECKING, Any

from vit_convert.core.version import __version__ as __version__

if TYPE_CHECKING:
    from vit_convert.config import default_config, published_config
    from vit_convert.core.bundle import Bundle
    from vit_convert.core.errors import ConvertError
    from vit_convert.serve.open_session import open_session as Session


__all__ = ["Bundle", "ConvertError", "Session", "default_config", "published_config"]

_WHERE = {
    "Bundle": "vit_convert.core.bundle:Bundle",
    "ConvertError": "vit_convert.core.errors:ConvertError",
    "Session": "vit_convert.serve.open_session:open_session",
    "default_config": "vit_convert.config:default_config",
    "published_config": "vit_convert.config:published_config",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
