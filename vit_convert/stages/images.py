"""The images stage: what a model is evaluated on, decoded once."""

import pathlib
from typing import Any

from vit_convert.pipeline import Context, Stage
from vit_convert.stages.common import decode, source_identity


def _inputs(context: Context) -> Any:
    return [source_identity(context.config.evaluation.data), context.config.evaluation.num_images]


def _outputs(context: Context) -> list[pathlib.Path]:
    return [context.bundle.images("evaluation")] if context.config.evaluation.data else []


def decode_images(context: Context) -> dict[str, Any]:
    """Decodes the evaluation images once, at the model's size."""
    data = context.config.evaluation.data
    if not data:
        return {"num_images": 0, "summary": "no evaluation data"}
    split = decode(context, "evaluation", data, context.config.evaluation.num_images)
    labelled = split.labels is not None
    return {"num_images": len(split.images), "labelled": labelled, "summary": f"{len(split.images)} evaluation images"}


IMAGES = Stage("images", ("checkpoint",), decode_images, _inputs, _outputs)
