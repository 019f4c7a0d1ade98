"""Ensembles from what clients have, image files or pixels of any size, to the best classes with their names."""

import dataclasses
import json

from vit_convert.core.signature import Output, Tensor
from vit_convert.core.text_length import optimal_of
from vit_convert.core.version import __version__
from vit_convert.serve.triton import pbtxt
from vit_convert.serve.triton.models.preprocess import ENCODED, PATCHES, PIXELS
from vit_convert.serve.triton.models.top import LABELS
from vit_convert.serve.triton.offered import Offered, class_names
from vit_convert.serve.triton.parts import Asked, head, known
from vit_convert.serve.triton.pbtxt import Chosen, parameter, quoted, step
from vit_convert.serve.triton.repository import HEADER, Content, ModelFolder, shim

_SOURCES = {
    ENCODED: (Tensor(ENCODED, "bytes", ("batch", 1)), "JPEG, PNG, … as a file holds them"),
    PIXELS: (Tensor(PIXELS, "uint8", ("batch", "height", "width", 3)), "RGB pixels of any size"),
}


def ensembles(offered: Offered, asked: Asked) -> list[ModelFolder]:
    """The ensembles of a model that takes images, or patches of them, preceded by the models that they need.

    Args:
        offered: of the bundle.
        asked: by the command line.
    """
    batch, classes, found = offered.max_batch, offered.signature.classes, []
    results: list[Tensor] = [known(offered, output) for output in offered.signature.outputs]
    if classes is not None:
        count = min(asked.top_k, int(offered.expected[classes.name].shape[-1]))
        results = _top_outputs(count)
        found.append(_top(offered, asked, classes, results, batch))
    for source in _SOURCES:
        found.append(_preprocess(offered, asked, source, batch))
        found.append(_ensemble(offered, asked, source, results, batch))
    return found


def _ensemble(offered: Offered, asked: Asked, source: str, results: list[Tensor], batch: int) -> ModelFolder:
    tensor, words = _SOURCES[source]
    classes, name = offered.signature.classes, f"{asked.name}_{source}"
    taken = {given.name: given.name for given in offered.signature.inputs}
    steps = [
        step(f"{name}_preprocess", {source: source}, taken),
        step(asked.model, taken, {output.name: output.name for output in offered.signature.outputs}),
    ]
    if classes is not None:
        steps.append(
            step(f"{asked.name}_top", {classes.name: classes.name}, {result.name: result.name for result in results})
        )
    parts = [
        Chosen(f"{HEADER} {__version__} from {offered.bundle.root.name}."),
        Chosen(f'name: {quoted(name)}\nplatform: "ensemble"', f"From {words}, by the checkpoint's own preprocessing."),
        _max_batch(batch),
        pbtxt.tensor("input", tensor),
        *(pbtxt.tensor("output", result) for result in results),
        Chosen("ensemble_scheduling {\n  step [\n" + ",\n".join(steps) + "\n  ]\n}"),
    ]
    return ModelFolder(name, pbtxt.document(parts), asked.version)


def _max_batch(batch: int) -> Chosen:
    return Chosen(f"max_batch_size: {batch}", "config.batch.max of the conversion.")


def takes_patches(offered: Offered) -> bool:
    """Whether a model takes images cut into patches, with their places and a mask."""
    return bool(offered.facts.patches[0])


def _fitted(offered: Offered) -> Tensor:
    """The input of the network, at the size to which images are brought."""
    image, size = offered.signature.image, offered.facts.image_size
    assert image is not None
    sides = optimal_of(size)
    return dataclasses.replace(image, shape=("batch", *sides, 3) if image.layout == "NHWC" else ("batch", 3, *sides))


def _top_outputs(count: int) -> list[Tensor]:
    kinds = {"class_ids": "int32", "class_names": "bytes", "scores": "float32"}
    return [Tensor(name, dtype, ("batch", count)) for name, dtype in kinds.items()]


def _top(offered: Offered, asked: Asked, classes: Output, results: list[Tensor], batch: int) -> ModelFolder:
    top_k = parameter("top_k", results[0].shape[1])
    parts = [
        *head(offered, f"{asked.name}_top", "python"),
        _max_batch(batch),
        pbtxt.tensor("input", known(offered, classes)),
        *(pbtxt.tensor("output", result) for result in results),
        Chosen("instance_group [ { count: 1 kind: KIND_CPU } ]", "One process, since it only sorts scores."),
        dataclasses.replace(top_k, why="--top_k; scores are the model's own, no probabilities."),
    ]
    names = "".join(f"{name}\n" for name in class_names(offered, asked.labels))
    files: dict[str, Content] = {"model.py": shim("top"), LABELS: names}
    return ModelFolder(f"{asked.name}_top", pbtxt.document(parts), asked.version, files)


def _preprocess(offered: Offered, asked: Asked, source: str, batch: int) -> ModelFolder:
    name, fitted = f"{asked.name}_{source}_preprocess", list(offered.signature.inputs)
    given: dict[str, object] = {}
    if takes_patches(offered):
        count, side = offered.facts.patches
        why = f"Of an image as many as the largest of its sizes with {count} or fewer has; the others are masked."
        given |= {"patch_size": side}
        record = dataclasses.replace(parameter(PATCHES, count), why=why)
    else:
        fitted = [_fitted(offered)]
        height, width = fitted[0].shape[1:3] if fitted[0].layout == "NHWC" else fitted[0].shape[2:4]
        record = parameter("preprocess", json.dumps(offered.facts.preprocess, sort_keys=True))
        record = dataclasses.replace(record, why="The checkpoint's own preprocessing, as report.json has it.")
        given |= {"height": height, "width": width, "dtype": fitted[0].dtype, "layout": fitted[0].layout}
    processes = "Two processes: decoding is the CPU's work, give it as many as cores are free."
    parts = [
        *head(offered, name, "python"),
        _max_batch(batch),
        pbtxt.tensor("input", _SOURCES[source][0]),
        *(pbtxt.tensor("output", tensor) for tensor in fitted),
        Chosen("instance_group [ { count: 2 kind: KIND_CPU } ]", processes),
        record,
        *(parameter(key, value) for key, value in given.items()),
    ]
    return ModelFolder(name, pbtxt.document(parts), asked.version, {"model.py": shim("preprocess")})
