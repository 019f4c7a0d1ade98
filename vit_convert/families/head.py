"""What becomes of a classifier's head, the same for every family: kept, left out on request, missed, or found
untrained."""

import dataclasses
import pathlib
from collections.abc import Mapping

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.core.signature import Output, Signature, Tensor

_HEAD = "head/"


@dataclasses.dataclass(frozen=True)
class Head:
    """The leaves of a model as it is asked for.

    Attributes:
        leaves: without the head where it is not wanted.
        num_classes: outputs of the head that is left, 0 for none.
        is_zero: whether every class gets the same logit.
        warnings: what a person should know, one sentence each.
    """

    leaves: dict[str, Leaf]
    num_classes: int
    is_zero: bool = False
    warnings: tuple[str, ...] = ()


def settle_head(leaves: Mapping[str, Leaf], num_classes: int, outputs: str, file: pathlib.Path) -> Head:
    """Keeps the head, or leaves it out.

    Args:
        leaves: by canonical name; the head's are `head/kernel` and `head/bias`.
        num_classes: outputs of the stored head, 0 for none.
        outputs: "logits", "features", or "auto" for logits.
        file: for messages.

    Returns:
        The Head.

    Raises:
        CheckpointError: logits of a model without a head.
        UsageError: an output that only towers have.
    """
    if outputs not in ("auto", "logits", "features"):
        raise UsageError(
            f"{file}: outputs={outputs!r}: a classifier has none of that name", fix="Use logits or features."
        )
    if outputs == "features":
        return Head({name: leaf for name, leaf in leaves.items() if not name.startswith(_HEAD)}, 0)
    if not num_classes:
        raise CheckpointError(f"{file}: no head/kernel, so there are no logits", fix="Set outputs='features'.")
    if leaves["head/kernel"].read().any():
        return Head(dict(leaves), num_classes)
    zero = (
        f"{file.name}: head/kernel is all zeros, so every class gets the same logit; outputs='features' leaves "
        f"the head out."
    )
    return Head(dict(leaves), num_classes, True, (zero,))


def classifier_signature(
    image_size: tuple[int, int], num_classes: int, width: int, tokens: tuple[int, ...] = ()
) -> Signature:
    """Of a model of images that gives logits, or features where it has no head; of each token where `tokens` says how
    many."""
    images = Tensor("images", "float32", ("batch", *image_size, 3), "NHWC")
    if num_classes:
        return Signature((images,), (Output("logits", "float32", ("batch", *tokens, num_classes), judge="top1"),))
    return Signature((images,), (Output("features", "float32", ("batch", *tokens, width)),))
