"""The images stage: decodes the evaluation images once."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from vit_convert.core.errors import UsageError
from vit_convert.core.pipeline import Context, Stage
from vit_convert.core.stage_results import CheckpointResult, ImagesResult
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


def decode_images(context: Context) -> ImagesResult:
    """Decodes the evaluation images once, at the model's size, without labels if the output has no classes. For a text
    tower, tokenizes its prompts."""
    from vit_convert.images.sources import open_images

    if takes_text(context):
        return tokenize_evaluation(context)
    data, checkpoint = context.config.evaluation.data, context.results.checkpoint
    if context.config.evaluation.prompts:
        raise UsageError(
            f"config.evaluation.prompts={context.config.evaluation.prompts}: {checkpoint.path} is not a pair of "
            "towers, so no image can be compared with a prompt",
            fix="Leave it out, or give a checkpoint of two towers.",
        )
    if not data:
        return ImagesResult(num_images=0, summary="no evaluation data")
    source = open_images(data)
    in_pair = checkpoint.judge == "embedding"  # the pair compares its images with the class names
    if source.labelling is not None and not in_pair and (reason := _no_classes(checkpoint)):
        context.progress.warn(f"evaluation.data has labels, and {reason}: no top-1 is measured")
        source = dataclasses.replace(source, labelling=None)
    split = decode(context, "evaluation", source, context.config.evaluation.num_images)
    found = ImagesResult(num_images=len(split.images), summary=f"{len(split.images)} evaluation images")
    return found if source.labelling is None else _with_labels(found, source.labelling, judged=not in_pair)


def _with_labels(found: ImagesResult, labelling: "Labels", *, judged: bool) -> ImagesResult:
    """Adds what the head must agree with: from all labels, including those of images that are not used."""
    smallest, largest = int(labelling.ids.min()), int(labelling.ids.max())
    folders = tuple(labelling.folders)
    return dataclasses.replace(found, labelled=judged, label_range=(smallest, largest), class_folders=folders)


def _no_classes(checkpoint: CheckpointResult) -> str:
    """Why the output has no classes for labels to name; "" if it has."""
    if checkpoint.judge != "top1":
        return f"the output is {checkpoint.output}"
    return "the head is all zeros" if checkpoint.zero_head else ""


IMAGES = Stage("images", ("checkpoint",), ImagesResult, decode_images, _inputs, _outputs)
