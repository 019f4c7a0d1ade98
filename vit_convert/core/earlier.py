"""The signature of a bundle, reconstructed for bundles of earlier versions, which have none."""

from collections.abc import Mapping
from typing import Any

from vit_convert.core.bundle import Bundle, read_json
from vit_convert.core.errors import UsageError
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.core.stage_results import Checkpoint


def read_signature(bundle: Bundle, checkpoint: Checkpoint, config: Mapping[str, Any]) -> Signature:
    """Reads the inputs and outputs of a bundle's graphs.

    Args:
        bundle: converted, at least up to its export.
        checkpoint: what its checkpoint stage left.
        config: its config.

    Raises:
        UsageError: the file is damaged.
    """
    found = read_json(bundle.signature)
    if found is None and not bundle.signature.exists():
        return earlier_signature(checkpoint, config)
    try:
        return Signature.from_dict(found or {})
    except UsageError as e:
        raise UsageError(f"{bundle.signature}: {e}", fix="Copy the whole bundle, or convert again.") from e


def earlier_signature(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Signature:
    """The signature of a bundle from before signatures were stored: one image input, one output.

    Args:
        checkpoint: what its checkpoint stage left.
        config: its config.

    Returns:
        The Signature; the size of its output is unknown.
    """
    height, width = checkpoint.image_size
    name = checkpoint.output
    images = Tensor("images", "float32", ("batch", height, width, 3), "NHWC")
    output = Output(name, "float32", ("batch", "values"), judge="top1" if name == "logits" else "cosine")
    layout, uint8 = config.get("layout", "NHWC"), config.get("input") == "uint8"
    return Signature((images,), (output,)).of_graph(layout, uint8=uint8, dynamic=checkpoint.image_range is not None)
