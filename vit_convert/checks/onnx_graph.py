"""Compares a graph under onnxruntime with the JAX reference, block by block, at several batch sizes."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.checks.extremes import append_extremes
from vit_convert.checks.shortened import shortened
from vit_convert.checks.typed import same_but_for_types
from vit_convert.core.check_results import TensorCheck
from vit_convert.core.compare import Tolerance, compare
from vit_convert.core.consistency import (
    Batch,
    Finding,
    check_consistency,
    findings,
    merged_batches,
    rows_of,
    structure_batches,
)
from vit_convert.core.onnx_file import open_proto, open_session, read_graph, run_session
from vit_convert.core.progress import Progress

Arrays = Mapping[str, np.ndarray]


def check_graph(
    path: str | os.PathLike[str],
    reference: Arrays,
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
        pooled_token: index of the pooled token, or one per image [images]; a graph's last block may compute only that
            token.

    Returns:
        A row per tensor, in the reference's order: the worst over the batch sizes.
    """
    known = _Known(reference, inputs or list(reference)[:1], judged, tolerance, pooled_token)
    known.run(open_session(path, known.tensors), batches)
    return known.worst()


@dataclasses.dataclass(frozen=True)
class Checked:
    """What checking a graph found.

    Attributes:
        rows: a row per tensor, in the reference's order: the worst over the batches.
        alone: the findings of `core.consistency`; empty without probes.
        answers: by output name, the graph's values for each row of the reference.
        left_out: the blocks without which the graph was checked against itself; see `checks.shortened`.
        extremes: the smallest and the largest value of each measured tensor on all rows of the reference; empty if no
            run had all of them.
        like: the name of the graph that it is but for types; "" if it was checked against itself, or not at all.
    """

    rows: list[TensorCheck]
    alone: list[Finding]
    answers: dict[str, np.ndarray]
    left_out: tuple[str, ...] = ()
    extremes: Mapping[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    like: str = ""


def check_graph_and_itself(
    path: str | os.PathLike[str],
    reference: Arrays,
    probes: Arrays | None,
    tolerance: Tolerance,
    *,
    judged: Sequence[str],
    outputs: Sequence[str],
    inputs: Sequence[str],
    pooled_token: int | np.ndarray | None = None,
    measured: Sequence[str] = (),
    like: str | os.PathLike[str] | None = None,
) -> Checked:
    """Checks a graph against its reference and against itself.

    If some of its blocks are equal but for weights, the whole graph runs once on all rows of the reference, and a graph
    with one of each is checked against itself. Otherwise the whole graph runs in batches that serve both.

    Args:
        path, reference, tolerance, judged, inputs, pooled_token: see `check_graph`.
        probes: from `images.probes.probe_inputs`; None checks it only against its reference.
        outputs: those that must agree with themselves.
        measured: names of float32 values whose extremes are wanted, if a run has all rows of the reference.
        like: a graph that agrees with itself; one that is the same but for types is checked only against the reference,
            with all rows at once.
    """
    known = _Known(reference, inputs, judged, tolerance, pooled_token, outputs)
    count = len(reference[inputs[0]])
    proto = read_graph(path)
    if probes is not None and like is not None and same_but_for_types(read_graph(like), proto):
        known.run_whole(path, proto, ())
        return Checked(known.worst(), [], known.answers(), like=os.path.basename(like))
    if probes is not None and (short := shortened(proto)) is not None:
        extremes = known.run_whole(path, proto, measured)
        alone = _check_structure(short.proto, path, probes, tolerance, outputs, count)
        return Checked(known.worst(), alone, known.answers(), short.left_out, extremes)
    session = open_session(path, known.tensors, proto=proto)
    if probes is None:
        known.run(session, batch_sizes(count))
        return Checked(known.worst(), [], known.answers())
    if any(probes[name][0].shape != reference[name][0].shape for name in inputs):  # texts of a range of lengths
        known.run(session, batch_sizes(count))
        alone = check_consistency(
            lambda feeds: run_session(session, feeds, outputs), probes, outputs, tolerance, largest=count
        )
        return Checked(known.worst(), alone, known.answers())
    batches, answers = merged_batches(count), []
    for batch in batches:
        results = run_session(session, rows_of(batch, probes, reference), known.tensors)
        known.compare(batch, results)
        answers.append({name: results[name] for name in outputs})
    return Checked(known.worst(), findings(batches, answers, outputs, tolerance), known.answers())


def _check_structure(
    proto: Any,
    path: str | os.PathLike[str],
    probes: Arrays,
    tolerance: Tolerance,
    outputs: Sequence[str],
    largest: int,
) -> list[Finding]:
    """Checks against itself a graph in memory whose weights lie beside another one."""
    session, batches = open_proto(proto, pathlib.Path(path).parent), structure_batches(largest)
    answers = [run_session(session, rows_of(batch, probes), outputs) for batch in batches]
    return findings(batches, answers, outputs, tolerance)


class _Known:
    """A reference, and the worst differences from it so far.

    Args:
        reference, inputs, judged, tolerance, pooled_token: see `check_graph`.
        outputs: those whose values are kept.

    Attributes:
        inputs: names of the graph's inputs.
        tensors: names of what is compared.
    """

    def __init__(
        self,
        reference: Arrays,
        inputs: Sequence[str],
        judged: Sequence[str],
        tolerance: Tolerance,
        pooled_token: int | np.ndarray | None,
        outputs: Sequence[str] = (),
    ):
        self.inputs, self.tensors = inputs, [name for name in reference if name not in inputs]
        self._reference, self._judged, self._tolerance = reference, judged, tolerance
        count = len(reference[inputs[0]])
        self._token = np.broadcast_to(0 if pooled_token is None else pooled_token, count)
        self._worst: dict[str, TensorCheck] = {}
        self._answers: dict[str, dict[int, np.ndarray]] = {name: {} for name in outputs}

    def run(self, session: Any, sizes: Sequence[int]) -> None:
        """Runs the first rows in batches of each of these sizes, and compares them."""
        for size in sizes:
            feeds = {name: self._reference[name][:size] for name in self.inputs}
            self.compare(tuple(range(size)), run_session(session, feeds, self.tensors))

    def run_whole(
        self, path: str | os.PathLike[str], proto: Any, measured: Sequence[str]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Runs a graph on all rows at once, compares them, and returns the extremes of the measured tensors; `proto` is
        what `read_graph` gives of it, and is extended."""
        names = append_extremes(proto, measured)
        session = open_session(path, self.tensors, proto=proto)
        asked = [*self.tensors, *itertools.chain.from_iterable(names)]
        results = run_session(session, {name: self._reference[name] for name in self.inputs}, asked)
        self.compare(tuple(range(len(self._token))), results)
        return {tensor: (results[low], results[high]) for tensor, (high, low) in zip(measured, names)}

    def compare(self, batch: Batch, results: Arrays) -> None:
        """Compares the rows of a batch that the reference contains.

        Args:
            batch: its rows.
            results: what the graph gave.
        """
        places = [place for place, row in enumerate(batch) if isinstance(row, int)]
        if not places:
            return
        rows = [row for row in batch if isinstance(row, int)]
        for tensor in self.tensors:
            expected, got = self._reference[tensor][rows], results[tensor]
            if got.size * len(rows) != expected.size * len(batch):
                # the last block computes only the pooled token
                expected = expected[np.arange(len(rows)), self._token[rows]][:, None]
            if got.size * len(rows) == expected.size * len(batch):
                got = got.reshape(len(batch), *expected.shape[1:])[places]  # a graph may merge tokens into it
            if tensor in self._answers:
                self._answers[tensor].update(zip(rows, got))
            result = compare(expected, got)
            passed = self._tolerance.met_by(result) if tensor in self._judged else None
            row = TensorCheck(
                tensor=tensor,
                batch=len(batch),
                max_abs=result.max_abs,
                max_rel=result.max_rel,
                cosine=result.cosine,
                passed=passed,
            )
            self._worst[tensor] = row if tensor not in self._worst else _worse(self._worst[tensor], row)

    def answers(self) -> dict[str, np.ndarray]:
        """The graph's values for each row of the reference."""
        return {name: np.stack([row for _, row in sorted(rows.items())]) for name, rows in self._answers.items()}

    def worst(self) -> list[TensorCheck]:
        """A row per tensor, in the reference's order: the worst over the batches."""
        return [self._worst[tensor] for tensor in self.tensors]


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
