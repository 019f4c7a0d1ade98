"""The check stage: compares a graph under onnxruntime with JAX, at every size and on the labelled images."""

import contextlib
import dataclasses
import gc
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_convert.core import config as configs
from vit_convert.core.advice import advice
from vit_convert.core.check_results import Distance, GraphCheck, LoweringCheck, TensorCheck
from vit_convert.core.compare import Tolerance, top1_accuracy
from vit_convert.core.config import QUANTIZED
from vit_convert.core.errors import CheckError
from vit_convert.core.onnx_file import is_rotated
from vit_convert.core.pipeline import Context, Stage
from vit_convert.core.text_length import optimal_of
from vit_convert.core.tolerance import judges_blocks, tolerance_for, top1_miss
from vit_convert.core.warm import keeps
from vit_convert.stages.common import EVALUATION_BATCH, dialect_for, evaluation, plain, prepare, signature_of
from vit_convert.stages.reference import reference_files, size_name

if TYPE_CHECKING:
    from vit_convert.checks.onnx_graph import Checked


ANSWERS = "answers"
"""Key of `scratch`: by file name of a checked graph, its values for the rows of the reference, by output."""
EXTREMES = "extremes"
"""Key of `scratch`: by file name of a checked graph, the smallest and largest values of its activations on these rows,
by tensor, if they were measured."""


def check(context: Context) -> GraphCheck:
    """Checks model.onnx against JAX, block by block, measures its top-1, and then checks the output of each
    lowering."""
    _let_go_of_model(context)
    result = check_precision(context, "fp32")
    lowerings, misses = {}, []
    for name in context.results.export.lowerings:
        lowerings[name], miss = _check_lowering(context, name)
        misses += [f"lowering {name}: {miss}"] if miss else []
    summary = "".join([result.summary, *(f"; {name}: cosine {row.cosine:.7f}" for name, row in lowerings.items())])
    result = dataclasses.replace(result, passed=not misses, lowerings=lowerings, summary=summary)
    if misses:
        raise _missed(context, "; ".join(misses), result)
    return result


def _let_go_of_model(context: Context) -> None:
    """Frees the checkpoint and JAX's copies of it before onnxruntime allocates its own memory."""
    context.scratch.clear()
    if "jax" in sys.modules and not keeps():
        sys.modules["jax"].clear_caches()
    gc.collect()  # the nodes and values of a graph refer to each other


def _check_lowering(context: Context, name: str) -> tuple[LoweringCheck, str]:
    """Compares a lowering's output with the reference at every size, with the tolerance of fp32; inner values may have
    another layout.

    Returns:
        What to report, and a description of what missed; "" if nothing did.
    """
    path, tolerance = context.bundle.lowering(name), tolerance_for(context.config, "fp32")
    by_size, *_ = _check_sizes(context, path, "fp32", tolerance, taps=())
    missed = {(size, row) for size, rows in by_size.items() for row in rows if row.passed is False}
    sizes = {size: Distance.part_of(rows[0]) for size, rows in by_size.items()}
    first = next(iter(sizes.values()))
    found = LoweringCheck(
        passed=not missed, max_abs=first.max_abs, max_rel=first.max_rel, cosine=first.cosine, sizes=sizes
    )
    return found, _worst(path, missed, tolerance) if missed else ""


def check_precision(context: Context, precision: str) -> GraphCheck:
    """Compares one graph with the reference; a miss raises CheckError, which carries the result for the report.

    A dynamic graph is judged at three sizes; a quantized one only at the size of its calibration, with the others
    reported.
    """
    with runnable(context, precision) as path:
        return _check_graph(context, precision, path)


@contextlib.contextmanager
def runnable(context: Context, precision: str) -> Iterator[pathlib.Path]:
    """The graph of a precision as onnxruntime can run it on a CPU: itself, or for bf16 its widened form, which is
    removed afterwards."""
    path = context.bundle.onnx(precision)
    if precision != "bf16":
        yield path
        return
    import onnx_ir as ir

    from vit_convert.core.onnx_file import save_onnx
    from vit_convert.quantize.widen import widen

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        widened = pathlib.Path(folder) / path.name
        save_onnx(widen(ir.load(path)), widened)
        yield widened


def _check_graph(context: Context, precision: str, path: pathlib.Path) -> GraphCheck:
    from vit_convert.checks.onnx_graph import graph_scores

    output = context.results.checkpoint.output
    tolerance = tolerance_for(context.config, precision)
    # JAX knows no other stream than its own
    taps = () if is_rotated(path) else context.results.export.taps
    consistency = context.config.check.consistency
    by_size, tensors, first = _check_sizes(context, path, precision, tolerance, taps=taps, consistency=consistency)
    rows = next(iter(by_size.values()))
    finals = {size: next(row for row in found if row.tensor == output) for size, found in by_size.items()}
    final = next(iter(finals.values()))
    missed = {(size, row) for size, found in by_size.items() for row in found if row.passed is False}
    result = GraphCheck(
        precision=precision,
        passed=not missed,
        tolerance=str(tolerance),
        max_abs=final.max_abs,
        max_rel=final.max_rel,
        cosine=final.cosine,
        blocks=tuple(rows),
        sizes={size: Distance.part_of(row) for size, row in finals.items()},
        summary=f"max abs {final.max_abs:.2g} ({final.max_rel:.2g} of scale), cosine {final.cosine:.7f}",
    )
    if missed:
        _, earliest = min(missed, key=lambda found: tensors.index(found[1].tensor))
        raise _missed(context, f"{_worst(path, missed, tolerance)}. First to miss: {earliest.tensor}.", result)
    if consistency:
        wrong = [row for row in first.alone if not row.passed]
        result = dataclasses.replace(
            result,
            passed=not wrong,
            consistency=tuple(first.alone) or None,
            consistency_like=first.like or None,
            consistency_without=first.left_out or None,
        )
        if wrong:
            raise _missed(context, f"{path.name}: {wrong[0]}; needed {tolerance}", result)
    summary = result.summary + (", in float32 rounded to bf16" if precision == "bf16" else "")
    summary += "".join(f", {row.cosine:.7f} at {size}" for size, row in list(finals.items())[1:])
    if labelled := evaluation(context):
        scores = graph_scores(
            path,
            labelled[0],
            prepare(context),
            output,
            batch_size=EVALUATION_BATCH,
            label=f"{precision} top-1",
            progress=context.progress,
        )
        top1, top1_of_jax = top1_accuracy(scores, labelled[1]), context.results.reference.top1
        assert top1_of_jax is not None  # the reference has the same images
        miss = top1_miss(context.config, top1, top1_of_jax)
        result = dataclasses.replace(result, passed=not miss, top1=top1, summary=f"{summary}, top-1 {top1:.2f} %")
        if miss:
            raise _missed(context, f"{path.name}: {miss}", result)
        return result
    return dataclasses.replace(result, summary=summary)


def _check_sizes(
    context: Context,
    path: pathlib.Path,
    precision: str,
    tolerance: Tolerance,
    *,
    taps: Sequence[str],
    consistency: bool = False,
) -> tuple[dict[str, list[TensorCheck]], list[str], "Checked"]:
    """The rows of the output and these taps for each size (keys such as "224x224" or "16 tokens"), the tensors' names
    in order, and all that was found at the optimal size, which comes first."""
    from vit_convert.checks.onnx_graph import batch_sizes, check_graph, check_graph_and_itself

    signature, token = signature_of(context), context.results.export.pooled_token
    inputs = [tensor.name for tensor in signature.inputs]
    known = {*inputs, *signature.judged, *taps}
    measured = _measured(context, path) if precision == "fp32" and taps else []
    by_size: dict[str, list[TensorCheck]] = {}
    first: Checked | None = None
    for size, reference_path in reference_files(context).items():
        with np.load(reference_path) as file:
            reference = {name: file[name] for name in file.files if name in known}
            pooled = file[token] if isinstance(token, str) else token
        judged = list(reference) if judges_blocks(precision) else list(signature.judged)
        if by_size and precision in QUANTIZED:  # not the first
            judged = []
        options: dict[str, Any] = {"judged": judged, "inputs": inputs, "pooled_token": pooled}
        if first is not None:
            largest = batch_sizes(len(reference[inputs[0]]))[-1:]
            rows = check_graph(path, reference, largest, tolerance, **options)
        else:
            probes, outputs = _probes(context) if consistency else None, signature.judged
            options |= {"outputs": outputs, "measured": measured, "like": _like(context, precision)}
            first = check_graph_and_itself(path, reference, probes, tolerance, **options)
            rows = first.rows
            context.scratch.setdefault(ANSWERS, {})[path.name] = first.answers
            if first.extremes:
                context.scratch.setdefault(EXTREMES, {})[path.name] = first.extremes
        by_size[size_name(size)] = rows
    assert first is not None  # there is at least one size
    return by_size, list(reference), first


def _like(context: Context, precision: str) -> pathlib.Path | None:
    """model.onnx, if it was found to agree with itself and this precision only gives it other types."""
    known = context.results.get("check") if precision in ("fp16", "bf16") else None
    return context.bundle.onnx() if isinstance(known, GraphCheck) and known.passed and known.consistency else None


def _measured(context: Context, path: pathlib.Path) -> list[str]:
    """The activations of model.onnx whose ranges the quantize stage will ask for, so that it need not run it again."""
    asked, by_flag = configs.precisions(context.config), dialect_for(context).precision_by_flag
    if not {*asked} & ({"fp16", "int8"} if by_flag else {"fp16", "bf16"}):
        return []
    import onnx_ir as ir

    from vit_convert.quantize.graph import distinct_activations

    return distinct_activations(ir.load(path).graph)


def _probes(context: Context) -> dict[str, np.ndarray]:
    """Noise, black and white, at the optimal size."""
    from vit_convert.images.probes import probe_inputs

    checkpoint = context.results.checkpoint
    return probe_inputs(signature_of(context), checkpoint.preprocess, optimal_of(checkpoint.sizes))


def _worst(path: pathlib.Path, missed: Iterable[tuple[str, TensorCheck]], tolerance: Tolerance) -> str:
    """What missed by most, in words."""
    where, row = max(missed, key=lambda found: found[1].max_rel)
    return (
        f"{path.name}: {row.tensor} differs from JAX by {row.max_abs:.3g} ({row.max_rel:.3g} of its scale), "
        f"cosine {row.cosine:.6f}, at batch {row.batch} of {where}; needed {tolerance}"
    )


def _missed(context: Context, message: str, result: GraphCheck) -> CheckError:
    return CheckError(message, fix=advice(context.config, result.precision), result=result)


CHECK = Stage("check", ("reference", "export"), GraphCheck, check, lambda c: plain(c.config.check))
