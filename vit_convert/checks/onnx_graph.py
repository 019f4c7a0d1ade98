"""Compares a graph under onnxruntime with the JAX reference, block by block, at several batch sizes."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.core.check_results import TensorCheck
from vit_convert.core.compare import Tolerance, compare
from vit_convert.core.consistency import Finding, check_consistency
from vit_convert.core.onnx_file import open_session, run_session
from vit_convert.core.progress import Progress


def check_graph(
    path: str | os.PathLike[str],
    reference: Mapping[str, np.ndarray],
    batches: Sequence[int],
    tolerance: Tolerance,
    *,
    judged: Sequence[str],
    inputs: Sequence[str] = (),
    pooled_token: int | np.ndarray | None = None,
) -> list[TensorCheck]:
    """Runs a graph on the reference images and compares every output and tap.

    Args:
        path: the `.onnx` file.
        reference: the inputs as the graph takes them, and per tensor the JAX result, all [images, ...].
        batches: batch sizes to run, each with the first images.
        tolerance: for the judged tensors.
        judged: tensors that must meet it; the others are only reported.
        inputs: names of the graph's inputs; if empty, only the first array is used.
        pooled_token: index of the pooled token, or of each image's [images]; a graph's last block may compute that
            token alone.

    Returns:
        A row per tensor, in the reference's order: the worst over the batch sizes.
    """
    inputs = inputs or list(reference)[:1]
    tensors = [name for name in reference if name not in inputs]
    session = open_session(path, tensors)
    worst: dict[str, TensorCheck] = {}
    for batch in batches:
        results = run_session(session, {name: reference[name][:batch] for name in inputs}, tensors)
        for tensor in tensors:
            expected = reference[tensor][:batch]
            got = results[tensor]
            if got.size != expected.size:
                # the last block computes only the pooled token
                token = np.broadcast_to(0 if pooled_token is None else pooled_token, len(reference[tensor]))
                expected = expected[np.arange(batch), token[:batch]][:, None]
            if got.size == expected.size:
                got = got.reshape(expected.shape)  # a graph may merge tokens into the batch axis, see tokens.py
            result = compare(expected, got)
            passed = tolerance.met_by(result) if tensor in judged else None
            row = TensorCheck(
                tensor=tensor,
                batch=batch,
                max_abs=result.max_abs,
                max_rel=result.max_rel,
                cosine=result.cosine,
                passed=passed,
            )
            worst[tensor] = row if tensor not in worst else _worse(worst[tensor], row)
    return [worst[tensor] for tensor in tensors]


def check_alone(
    path: str | os.PathLike[str],
    probes: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    tolerance: Tolerance,
    *,
    largest: int,
) -> list[Finding]:
    """Checks of a graph that need no reference.

    Args:
        path: the `.onnx` file.
        probes: from `images.probes.probe_inputs`.
        outputs: the judged ones.
        tolerance: of the graph's precision.
        largest: maximum number of rows per run.
    """
    session = open_session(path)
    return check_consistency(
        lambda feeds: run_session(session, feeds, list(outputs)), probes, outputs, tolerance, largest=largest
    )


def _worse(a: TensorCheck, b: TensorCheck) -> TensorCheck:
    base = b if b.max_rel > a.max_rel else a
    passed = None if a.passed is None else bool(a.passed and b.passed)
    return dataclasses.replace(base, cosine=min(a.cosine, b.cosine), passed=passed)


def batch_sizes(num_images: int) -> list[int]:
    """One image, an odd number and the largest, so that a graph with a frozen batch fails."""
    return sorted({1, min(3, num_images), num_images})


def graph_scores(
    path: str | os.PathLike[str],
    images: np.ndarray,
    prepare: Any,
    output: str,
    *,
    batch_size: int,
    label: str,
    progress: Progress,
) -> np.ndarray:
    """Runs a graph over a set of images.

    Args:
        path: the `.onnx` file.
        images: uint8 [images, height, width, 3]; may be memory-mapped.
        prepare: maps a uint8 batch to the graph's input.
        output: name of the output.
        batch_size: images per call.
        label: for the progress bar.
        progress: shows the bar.

    Returns:
        [images, classes] float32.
    """
    session = open_session(path)
    results = []
    with progress.bar(label, total=len(images)) as advance:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            results.append(run_session(session, prepare(batch), [output])[output].astype(np.float32))
            advance(len(batch))
    return np.concatenate(results)
