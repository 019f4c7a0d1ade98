"""Handles a classifier's head, in the same way for every family: kept, left out on request, missing, or found to be
untrained."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

from vit_convert.checkpoint.containers import Leaf
from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.core.signature import Dim, Signature, Tensor
from vit_convert.families.outputs import outputs_of, settle_outputs

_HEAD = "head/"


@dataclasses.dataclass(frozen=True)
class Head:
    """The leaves of a model as requested.

    Attributes:
        leaves: without the head if it is not wanted.
        num_classes: outputs of the remaining head; 0 for none.
        is_zero: whether every class gets the same logit.
        warnings: what the user should know, one sentence each.
        outputs: of the model, in the graph's order; () for logits, or for features if there is no head.
    """

    leaves: dict[str, Leaf]
    num_classes: int
    is_zero: bool = False
    warnings: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        """The first output; "" for the usual one."""
        return self.outputs[0] if self.outputs else ""


def settle_head(
    leaves: Mapping[str, Leaf], num_classes: int, outputs: str, file: pathlib.Path, beside: Sequence[str] = ()
) -> Head:
    """Keeps the head, or leaves it out.

    Args:
        leaves: by canonical name; the head's are `head/kernel` and `head/bias`.
        num_classes: outputs of the stored head; 0 for none.
        outputs: "logits", "features", or "auto" for logits; several if the family offers more.
        file: for messages.
        beside: what else the family's models can output: "tokens", "grid". If empty, they have just one output.

    Returns:
        The Head.

    Raises:
        CheckpointError: logits are requested from a model without a head.
        UsageError: an output that the model lacks, or several from a family that gives one.
    """
    names = settle_outputs(outputs, ("logits", "features", *beside), file)
    if len(names) > 1 and not beside:
        raise UsageError(f"{file}: outputs={outputs!r}: this model gives one output", fix=f"Use {names[0]}.")
    others = names if names not in (("logits",), ("features",)) else ()
    if "logits" not in names:
        kept = {name: leaf for name, leaf in leaves.items() if not name.startswith(_HEAD)}
        return Head(kept, 0, outputs=others)
    if not num_classes:
        raise CheckpointError(f"{file}: no head/kernel, so there are no logits", fix="Set outputs='features'.")
    if leaves["head/kernel"].read().any():
        return Head(dict(leaves), num_classes, outputs=others)
    zero = (
        f"{file.name}: head/kernel is all zeros, so every class gets the same logit; outputs='features' leaves "
        f"the head out."
    )
    return Head(dict(leaves), num_classes, True, (zero,), others)


def classifier_signature(
    image_size: tuple[int, int],
    num_classes: int,
    width: int,
    tokens: tuple[int, ...] = (),
    outputs: Sequence[str] = (),
    patches: tuple[int, ...] = (),
) -> Signature:
    """The signature of a model of images.

    Args:
        image_size: (height, width) in pixels.
        num_classes: outputs of the head; 0 for none.
        width: of the features.
        tokens: number of tokens per image, if they are not pooled.
        outputs: from `Head.outputs`; () for logits, or features of a model without a head.
        patches: (rows, columns, width) of the outputs `tokens` and `grid`.
    """
    images = Tensor("images", "float32", ("batch", *image_size, 3), "NHWC")
    shapes: dict[str, tuple[Dim, ...]] = {"logits": (*tokens, num_classes), "features": (*tokens, width)}
    if patches:
        shapes |= {"tokens": (math.prod(patches[:2]), patches[2]), "grid": patches}
    return Signature((images,), outputs_of(outputs or given_usually(num_classes), shapes))


def given_usually(num_classes: int) -> tuple[str, ...]:
    """Logits, or features if there is no head."""
    return ("logits",) if num_classes else ("features",)
