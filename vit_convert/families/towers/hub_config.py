"""The `config.json` beside a file of transformers: it gives what shapes do not, such as heads and activation."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from vit_convert.core.errors import CheckpointError

_ACTIVATIONS = {
    "quick_gelu": "quick",
    "gelu": "erf",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_fast": "tanh",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """What the file says about one tower.

    Attributes:
        found: whether there is such a file.
        num_heads: attention heads; 0 if it does not say.
        activation: see `towers.architecture.Encoder`; "" if it does not say.
        norm_epsilon: of every LayerNorm; 0 if it does not say.
    """

    found: bool = False
    num_heads: int = 0
    activation: str = ""
    norm_epsilon: float = 0.0


def read_hub_config(file: pathlib.Path, tower: str) -> HubConfig:
    """Reads the file beside a checkpoint.

    Args:
        file: the checkpoint.
        tower: "image" or "text".

    Raises:
        CheckpointError: it is not such a file, or has an unknown activation.
    """
    path = file.with_name("config.json")
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return HubConfig()
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: cannot be read ({e})", fix="Fetch it again, or move it away.") from e
    part = record.get("vision_config" if tower == "image" else "text_config") if isinstance(record, Mapping) else None
    if not isinstance(part, Mapping):
        return HubConfig()
    heads, epsilon = part.get("num_attention_heads", 0), part.get("layer_norm_eps", 0.0)
    named = part.get("hidden_act") or ""
    if not isinstance(named, str) or (named and named not in _ACTIVATIONS):
        raise CheckpointError(f"{path}: hidden_act {named!r} is not known", fix=f"Known: {', '.join(_ACTIVATIONS)}.")
    # with an epsilon of 1 or more, nothing would remain of the normalised values; NaN is not below anything
    if not isinstance(heads, int) or not isinstance(epsilon, int | float) or not (heads >= 0 and 0 <= epsilon < 1):
        raise CheckpointError(
            f"{path}: num_attention_heads {heads!r}, layer_norm_eps {epsilon!r}: no such numbers",
            fix="Fetch it again, or move it away.",
        )
    return HubConfig(True, heads, _ACTIVATIONS.get(named, ""), float(epsilon))
