"""The prompts of a text tower, which its calibration, reference and checks use in place of images."""

import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_convert.core.bundle import atomic
from vit_convert.core.errors import CalibrationError, UsageError
from vit_convert.core.pipeline import Context
from vit_convert.core.stage_results import ImagesResult
from vit_convert.core.text_length import sides_of
from vit_convert.core.token_samples import sample_texts

if TYPE_CHECKING:
    from vit_convert.text.prompting import Prompting


def takes_text(context: Context) -> bool:
    """Whether the model is a text tower."""
    return context.results.checkpoint.text


def prompting_of(context: Context) -> "Prompting":
    """How the text tower's training turned prompts into token ids."""
    from vit_convert.text.prompting import Prompting

    return Prompting.from_dict(context.results.checkpoint.pair or {})


def samples_file(context: Context, split: str) -> pathlib.Path:
    """The samples of a split: images uint8 [images, height, width, 3], or for a text tower ids int32 [prompts,
    length]."""
    return context.bundle.tokens(split) if takes_text(context) else context.bundle.images(split)


def evaluation_source(context: Context) -> str:
    """The file that a text tower is checked on: class names, prompts, or else its calibration data; "" for none."""
    config = context.config
    return config.evaluation.prompts or config.evaluation.data or config.calibration.data


def calibration_source(context: Context) -> str:
    """The file that a text tower is calibrated on: its own, or else the one that it is checked on; "" for none."""
    return context.config.calibration.data or evaluation_source(context)


def require_files(config: Any) -> None:
    """Refuses a text tower's config that names a file which is not there, before anything is converted.

    Args:
        config: of the text tower.

    Raises:
        CalibrationError: the first that is not there.
    """
    named = {
        "tokenizer": config.tokenizer,
        "evaluation.prompts": config.evaluation.prompts,
        "evaluation.data": config.evaluation.data,
        "calibration.data": config.calibration.data,
    }
    for key, path in named.items():
        if path and not os.path.exists(path):
            raise CalibrationError(f"config.{key} of the text tower: {path}: No such file", fix="Check the path.")


def identity(context: Context, source: str) -> Any:
    """Identifies the prompts of a file by the content of the file, the templates and the tokenizer."""
    from vit_convert.text.tokens import fingerprint

    config, evaluation = context.config, context.config.evaluation
    files = [path for path in (source, config.tokenizer, *evaluation.templates) if path and os.path.exists(path)]
    return [source, bool(evaluation.prompts), list(evaluation.templates), config.tokenizer, fingerprint(*files)]


def tokenize_evaluation(context: Context) -> ImagesResult:
    """Writes the token ids of the evaluation prompts: of all classes with all templates, or of a file's lines.

    Raises:
        UsageError: a number of prompts is given together with classes, or there is no tokenizer.
        CalibrationError: a file cannot be read, or belongs to another model.
    """
    from vit_convert.text.prompts import filled, read_classes, read_templates
    from vit_convert.text.tokens import tokens_of

    evaluation, source = context.config.evaluation, evaluation_source(context)
    if not source:
        require_files(context.config)  # a tokenizer that nothing reads
        return ImagesResult(num_images=0, summary="no prompts")
    if not evaluation.prompts:
        ids = _tokens(context, source, "evaluation", evaluation.num_images)
        return ImagesResult(num_images=len(ids), summary=f"{len(ids)} prompts")
    if evaluation.num_images or evaluation.data:
        key = "num_images" if evaluation.num_images else "data"
        raise UsageError(
            f"config.evaluation.{key}={evaluation[key]!r} of the text tower beside config.evaluation.prompts: the "
            "prompts of all classes are taken",
            fix=f"Leave config.text.evaluation.{key} out.",
        )
    classes, templates = read_classes(evaluation.prompts), read_templates(evaluation.templates)
    ids = tokens_of(filled(classes, templates), prompting_of(context), context.config.tokenizer)
    _write(context.bundle.tokens("evaluation"), ids)
    summary = f"{len(ids)} prompts: {len(classes)} classes, {len(templates)} template{'s' * (len(templates) > 1)}"
    return ImagesResult(num_images=len(ids), classes=len(classes), templates=len(templates), summary=summary)


def calibration_tokens(context: Context) -> tuple[np.ndarray, str] | None:
    """Writes the token ids of the calibration prompts, and returns them with the file that they come from; None if
    there is no such file."""
    if context.config.engine.calibrator:
        raise UsageError(
            "config.engine.calibrator: TensorRT's own calibrator takes images, a text tower takes tokens",
            fix="Set config.text.engine.calibrator=False: INT8 is then written into the graph.",
        )
    source = calibration_source(context)
    if not source:
        return None
    if not context.config.calibration.data and context.config.evaluation.prompts:
        # class names in their templates, which no other step tokenizes
        ids = np.load(context.bundle.tokens("evaluation"))
        from vit_convert.images.decode import pick

        ids = ids[pick(len(ids), context.config.calibration.num_images)]
        _write(context.bundle.tokens("calibration"), ids)
        return ids, source
    return _tokens(context, source, "calibration", context.config.calibration.num_images), source


def noise_tokens(context: Context, count: int) -> np.ndarray:
    """Seeded token ids for a text tower that has no prompts: int32 [prompts, length]."""
    from vit_convert.stages.common import signature_of

    tokens = next(tensor for tensor in signature_of(context).inputs if tensor.is_text)
    longest = sides_of(context.results.checkpoint.sizes, "largest").get("length")
    if longest is not None:
        tokens = dataclasses.replace(tokens, shape=(tokens.shape[0], longest))
    return sample_texts(tokens, count, np.random.default_rng(0))


def _tokens(context: Context, source: str, split: str, limit: int) -> np.ndarray:
    from vit_convert.images.decode import pick
    from vit_convert.text.tokens import read_tokens

    ids = read_tokens(source, prompting_of(context), context.config.tokenizer)
    ids = ids[pick(len(ids), limit)]
    _write(context.bundle.tokens(split), ids)
    return ids


def _write(path: pathlib.Path, ids: np.ndarray) -> None:
    with atomic(path) as temporary, open(temporary, "wb") as f:
        np.save(f, ids)
