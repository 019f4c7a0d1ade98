"""Infers the sizes of a tower from the shapes of leaves in another project's layout."""

import pathlib
import re
from collections.abc import Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.checkpoint.match import require_blocks, require_size
from vit_convert.checkpoint.vote import count_numbers, most_common
from vit_convert.families.towers.architecture import Encoder
from vit_convert.families.towers.hub_config import HubConfig

_NORM = r"(layer_?norm|ln_)_?1[./](weight|scale)$"
_HIDDEN = r"(fc1|c_fc)[./]bias$"
_BLOCK = r".*?(?:layers|resblocks|encoderblock)[./_](\d{1,6})[./]"
_HEADS = r"attn/(query|key|value)/bias$"


def stored_encoder(
    leaves: Mapping[str, Leaf],
    file: pathlib.Path,
    config: HubConfig,
    heads: Mapping[int, int],
    activation: str,
    epsilon: float,
) -> Encoder:
    """Reads the sizes of a tower's blocks.

    Args:
        leaves: of the tower, by their names on disk.
        file: for messages.
        config: the file beside it, which takes precedence over what is known about the family.
        heads: by width, of the published models.
        activation: of the family.
        epsilon: of the family's LayerNorms.

    Raises:
        CheckpointError: a size is unknown, or blocks are missing.
    """
    require_blocks(leaves, _BLOCK, "block", str(file))
    blocks = {name: leaf for name, leaf in leaves.items() if re.match(_BLOCK, name)}
    width = most_common(blocks, (_NORM, -1))
    hidden = most_common(blocks, (_HIDDEN, -1))
    own = most_common({name: leaf for name, leaf in blocks.items() if len(leaf.shape) == 2}, (_HEADS, 0))
    require_size(file, "width", width, "the first block's norm")
    require_size(file, "mlp_dim", hidden, "the first block's MLP")
    num_heads = own or config.num_heads or heads.get(width, 0) or max(1, width // 64)
    depth = count_numbers(blocks, _BLOCK)
    return Encoder(width, depth, hidden, num_heads, config.activation or activation, config.norm_epsilon or epsilon)
