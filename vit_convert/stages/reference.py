"""The reference stage: JAX's outputs, by which every later stage is judged."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_convert.core.bundle import atomic
from vit_convert.core.compare import top1_accuracy
from vit_convert.core.errors import CalibrationError, CheckError, ExportError
from vit_convert.core.image_size import ImageRange
from vit_convert.core.model import missing_results
from vit_convert.core.pipeline import Context, Stage
from vit_convert.core.signature import Tensor
from vit_convert.core.stage_results import ReferenceResult
from vit_convert.core.text_length import TextRange, shortened
from vit_convert.stages.checkpoint import model_of
from vit_convert.stages.common import EVALUATION_BATCH, evaluation, inputs_beside, noise, preprocess_of
from vit_convert.stages.text import samples_file, takes_text

_SHOWN = 8  # number of class folders named in a message


def _inputs(context: Context) -> Any:
    return [context.config.check.num_images, context.config.layout, context.config.input]


def reference_files(context: Context) -> dict[tuple[int, ...], pathlib.Path]:
    """The file of each image size or text length: one, or three of a range, the one that engines are tuned for
    first."""
    sizes = context.results.checkpoint.sizes
    if not isinstance(sizes, ImageRange | TextRange):
        return {sizes: context.bundle.reference}
    return {
        size: context.bundle.reference if size == sizes.optimal else context.bundle.reference_at(size)
        for size in sizes.sizes()
    }


def _outputs(context: Context) -> list[pathlib.Path]:
    labelled = [context.bundle.predictions] if context.results.images.labelled else []
    embedded = [context.bundle.embeddings] if _embeds(context) else []
    return [*reference_files(context).values(), *labelled, *embedded]


def _embeds(context: Context) -> bool:
    """Whether all evaluation images or prompts are embedded: only by towers of a pair, which compares them with each
    other."""
    return context.results.checkpoint.judge == "embedding" and bool(context.results.images.num_images)


def compute_reference(context: Context) -> ReferenceResult:
    """Computes JAX outputs and taps on a few images, at each size, and JAX's top-1 on the labelled ones."""
    from vit_convert.images.decode import pick

    model, count = model_of(context), context.config.check.num_images
    if context.results.images.num_images:
        images = np.load(samples_file(context, "evaluation"), mmap_mode="r")
        source = "evaluation prompts" if takes_text(context) else "evaluation images"
        raw = np.asarray(images[pick(len(images), count)])
    else:
        source, raw = "seeded noise", noise(context, count)
    labelled, num_classes = evaluation(context), context.results.checkpoint.num_classes
    # the classes of a head are known before anything runs, those of a user's own model only from its output
    if labelled and num_classes:
        _require_classes(context, num_classes)
    files = reference_files(context)
    for size, path in files.items():
        tensors = _write(context, path, raw, size, model, source)
    shown = f", at {', '.join(map(size_name, files))}" if len(files) > 1 else ""
    what = "texts" if takes_text(context) else "images"
    summary, top1 = f"{len(raw)} {what}, {source}{shown}", None
    if _embeds(context):
        _save(context.bundle.embeddings, _outputs_of_all(context, model, images, model.output))
    if labelled:
        predictions = _outputs_of_all(context, model, labelled[0], model.signature.classes.name, has_classes=True)
        _save(context.bundle.predictions, predictions)
        top1 = top1_accuracy(predictions, labelled[1])
        summary += f", top-1 {top1:.2f} %"
    return ReferenceResult(source=source, num_images=len(raw), tensors=tuple(tensors), top1=top1, summary=summary)


def _outputs_of_all(
    context: Context, model: Any, samples: np.ndarray, output: str, *, has_classes: bool = False
) -> np.ndarray:
    """JAX's output for all evaluation images or prompts: [samples, …].

    Raises:
        CalibrationError: it has classes, and the labels do not fit them.
        CheckError: an output is not finite, so nothing can be compared with it.
    """
    normalize, taken, found = preprocess_of(context).normalize, model.signature.inputs, []
    with context.progress.bar(f"JAX {output}", total=len(samples)) as advance:
        for start in range(0, len(samples), EVALUATION_BATCH):
            some = np.asarray(samples[start : start + EVALUATION_BATCH])
            batch = model.run(*inputs_beside(taken, some, normalize))[output]
            if has_classes and not start:
                _require_classes(context, batch.shape[-1])
            if not np.isfinite(batch).all():
                raise CheckError(
                    f"{output}: the JAX model itself gives NaN or infinity on evaluation images {start} to "
                    f"{start + len(batch) - 1}",
                    fix="Check the checkpoint and the preprocessing.",
                )
            found.append(batch)
            advance(len(batch))
    return np.concatenate(found)


def _save(path: pathlib.Path, values: np.ndarray) -> None:
    with atomic(path) as temporary, open(temporary, "wb") as f:
        np.save(f, values)


def _require_classes(context: Context, num_classes: int) -> None:
    """Refuses labels outside the head's classes.

    Raises:
        CalibrationError: see above.
    """
    data, folders = context.config.evaluation.data, context.results.images.class_folders or ()
    assert context.results.images.label_range is not None  # there are labels
    smallest, largest = context.results.images.label_range
    if smallest < 0 or largest >= num_classes:
        hint = " A label of 1000 is ILSVRC's own numbering." if num_classes == 1000 else ""
        raise CalibrationError(
            f"evaluation.data={data}: label {smallest if smallest < 0 else largest}, the head has classes 0 to "
            f"{num_classes - 1}",
            fix=f"Labels count from 0, in the order of the head.{hint}",
        )
    if folders and len(folders) != num_classes:
        shown = ", ".join(folders[:_SHOWN]) + (", …" if len(folders) > _SHOWN else "")
        raise CalibrationError(
            f"evaluation.data={data}: {len(folders)} class folders ({shown}), the head has {num_classes} classes, "
            "so their places in sorted order need not be its numbers",
            fix="Name the folders by class number, list the head's classes in a classes.txt beside them, or give a "
            "labels.csv.",
        )


def size_name(size: tuple[int, ...]) -> str:
    """ "224x224" for images, "16 tokens" for texts, "" for texts of one length."""
    return f"{size[0]} tokens" if len(size) == 1 else "x".join(map(str, size))


def _resized(images: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    from vit_convert.images.resize import resize

    if len(size) != 2 or images.shape[1:3] == size:
        return images
    return np.stack([resize(image, *size) for image in images])


def _cut(taken: Sequence[Tensor], inputs: Sequence[np.ndarray], size: tuple[int, ...]) -> list[np.ndarray]:
    """A model's inputs, with texts cut to a size of texts."""
    if len(size) != 1:
        return list(inputs)
    return [shortened(tensor, array, size[0]) if tensor.is_text else array for tensor, array in zip(taken, inputs)]


def _write(
    context: Context, path: pathlib.Path, raw: np.ndarray, size: tuple[int, ...], model: Any, source: str
) -> list[str]:
    """Writes one size's file and returns the names of its tensors."""
    preprocess, config, taken = preprocess_of(context), context.config, model.signature.inputs
    raw = _resized(raw, size)
    outputs = model.run(*_cut(taken, inputs_beside(taken, raw, preprocess.normalize), size))
    if wrong := missing_results(model, outputs, len(raw)):
        raise ExportError(
            f"the run of the {context.results.checkpoint.family} model: {wrong}",
            fix="Model.run returns every output of its signature and every one of its taps, as arrays [batch, …].",
        )
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            raise CheckError(
                f"{name}: the JAX model itself gives NaN or infinity on {source}",
                fix="Check the checkpoint and the preprocessing.",
            )
    with atomic(path) as temporary, open(temporary, "wb") as f:
        options = {"dtype": config.input, "channels_first": config.layout == "NCHW"}
        inputs = _cut(taken, inputs_beside(taken, raw, functools.partial(preprocess.graph_input, **options)), size)
        arrays: dict[str, Any] = dict(zip((tensor.name for tensor in taken), inputs))
        np.savez(f, **arrays, **outputs)
    return list(outputs)


REFERENCE = Stage("reference", ("checkpoint", "images"), ReferenceResult, compute_reference, _inputs, _outputs)
