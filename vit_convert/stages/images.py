"""The images stage: decodes the evaluation images once."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vit_convert.core.errors import UsageError
from vit_convert.core.pipeline import Context, Stage
from vit_convert.stages.common import decode, source_identity
from vit_convert.stages.text import evaluation_source, identity, takes_text, tokenize_evaluation

if TYPE_CHECKING:
    from vit_convert.images.sources import Labels


def _inputs(context: Context) -> Any:
    if takes_text(context):
        return [identity(context, evaluation_source(context)), context.config.evaluation.num_images]
    return [source_identity(context.config.evaluation.data, labelled=True), context.config.evaluation.num_images]


def _outputs(context: Context) -> list[pathlib.Path]:
    if takes_text(context):
        return [context.bundle.tokens("evaluation")]
    return (
        [context.bundle.images("evaluation"), context.bundle.labels("evaluation")]
        if context.config.evaluation.data
        else []
    )


def decode_images(context: Context) -> dict[str, Any]:
    """Decodes the evaluation images once, at the model's size; labels are left out where nothing has classes. Of a text
    tower, makes token ids of its prompts."""
    from vit_convert.images.sources import open_images

    if takes_text(context):
        return tokenize_evaluation(context)
    data, checkpoint = context.config.evaluation.data, context.results["checkpoint"]
    if context.config.evaluation.prompts:
        raise UsageError(
            f"config.evaluation.prompts={context.config.evaluation.prompts}: {checkpoint['path']} is no pair of "
            "towers, so that no image can be compared with a prompt",
            fix="Leave it out, or give a checkpoint of two towers.",
        )
    if not data:
        return {"num_images": 0, "summary": "no evaluation data"}
    source = open_images(data)
    in_pair = checkpoint.get("judge") == "embedding"  # the pair compares its images with the names of classes
    if source.labelling is not None and not in_pair and (reason := _no_classes(checkpoint)):
        context.progress.warn(f"evaluation.data has labels, and {reason}: no top-1 is measured")
        source = dataclasses.replace(source, labelling=None)
    split = decode(context, "evaluation", source, context.config.evaluation.num_images)
    return {
        "num_images": len(split.images),
        "labelled": source.labelling is not None and not in_pair,
        **_of_labels(source.labelling),
        "summary": f"{len(split.images)} evaluation images",
    }


def _of_labels(labelling: "Labels | None") -> dict[str, Any]:
    """What the head is held against: of all labels, also those of images that are not taken."""
    if labelling is None:
        return {}
    return {
        "label_range": [int(labelling.ids.min()), int(labelling.ids.max())],
        "class_folders": list(labelling.folders),
    }


def _no_classes(checkpoint: Mapping[str, Any]) -> str:
    """Why the output has no classes that a label could name; "" if it has."""
    if checkpoint["judge"] != "top1":
        return f"the output is {checkpoint['output']}"
    return "the head is all zeros" if checkpoint.get("zero_head") else ""


IMAGES = Stage("images", ("checkpoint",), decode_images, _inputs, _outputs)
