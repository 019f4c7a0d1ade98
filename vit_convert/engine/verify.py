"""Verifies an engine without JAX: its outputs against the bundle's reference at several batch sizes, and its top-1."""

import contextlib
import dataclasses
import pathlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from vit_convert.core.bundle import Bundle
from vit_convert.core.compare import Tolerance, compare, top1_accuracy
from vit_convert.core.config import QUANTIZED
from vit_convert.core.consistency import Finding, check_consistency
from vit_convert.core.engine_results import EngineCheck, OutputCheck
from vit_convert.core.errors import BenchmarkError
from vit_convert.core.image_size import ImageRange
from vit_convert.core.signature import Signature
from vit_convert.core.text_length import TextRange, optimal_of, varies
from vit_convert.core.tolerance import agreement_miss, judges_blocks, tolerance_for, top1_miss
from vit_convert.engine.handoff import Facts
from vit_convert.engine.host import EngineHost
from vit_convert.engine.runtime.profiles import Shape, ShapeRange, largest_batch
from vit_convert.engine.runtime.session import Session
from vit_convert.images.preprocess import Preprocess
from vit_convert.images.probes import probe_inputs

_EVALUATION_BATCH = 64
_COPY = "Copy the whole bundle from the export host."


def batches_to_verify(ranges: Sequence[ShapeRange]) -> list[int]:
    """Batch 1, the smallest, optimal and largest of every profile, and one between the two largest.

    Args:
        ranges: the engine's profiles.
    """
    sizes = sorted({1, *(shape[0] for r in ranges for shape in (r.smallest, r.optimal, r.largest))})
    between = [(sizes[-2] + sizes[-1]) // 2] if len(sizes) > 1 else []
    return sorted({*sizes, *between})


def verify_session(session: Session, host: EngineHost) -> EngineCheck:
    """Proves one engine.

    Args:
        session: of the engine.
        host: whose bundle holds reference.npz and, perhaps, labelled images; its config has the tolerances.

    Returns:
        The results; top1, top1_jax, agreement (None without JAX's own predictions) and num_images only with labelled
        images.

    Raises:
        BenchmarkError: the bundle's reference or its evaluation is missing, damaged or of another model, or TensorRT
            fails.
    """
    engine, bundle, config, facts = session.engine, host.bundle, host.config, host.facts
    require_reference(bundle, facts)
    precision = engine.record.precision
    tolerance = tolerance_for(config, precision, engine=True, tf32=engine.record.options.tf32)
    signature, judged = facts.signature, None if judges_blocks(precision) else {*facts.signature.judged}
    rows = _compare_batches(session, bundle.reference, batches_to_verify(engine.ranges), tolerance, judged, signature)
    if isinstance(facts.image_size, ImageRange | TextRange):
        batch = engine.ranges[-1].optimal[0]
        # a quantized engine is judged at the size of its calibration
        elsewhere = set() if precision in QUANTIZED else judged
        for size in facts.image_size.sizes()[1:]:
            rows += _compare_batches(session, bundle.reference_at(size), [batch], tolerance, elsewhere, signature)
    misses = [
        f"{row.output} at batch {row.batch}{_where(row, facts)}: "
        f"max abs {row.max_abs:.3g} ({row.max_rel:.3g} of scale), cosine {row.cosine:.6f}"
        for row in rows
        if row.passed is False
    ]
    alone = check_alone(session, facts, tolerance) if config.check.consistency else []
    misses += [str(found) for found in alone if not found.passed]
    final = [row for row in rows if row.output in signature.judged and row.passed is not None]
    accuracy = _Accuracy()
    # inputs other than the images are unknown here
    if signature.classes is not None and bundle.labels("evaluation") in facts.files and len(signature.inputs) == 1:
        accuracy = _evaluate(session, host)
        misses += _accuracy_misses(config, precision, accuracy)
    return EngineCheck(
        precision=precision,
        passed=not misses,
        tolerance=str(tolerance),
        misses=tuple(misses),
        max_abs=max(row.max_abs for row in final),
        max_rel=max(row.max_rel for row in final),
        cosine=min(row.cosine for row in final),
        rows=tuple(rows),
        consistency=tuple(alone),
        **dataclasses.asdict(accuracy),
    )


@dataclasses.dataclass(frozen=True)
class _Accuracy:
    """The fields of `EngineCheck` that need labelled images."""

    num_images: int | None = None
    top1: float | None = None
    top1_jax: float | None = None
    agreement: float | None = None


def _accuracy_misses(config: ml_collections.ConfigDict, precision: str, found: _Accuracy) -> list[str]:
    assert found.top1 is not None and found.num_images is not None  # accuracy was evaluated
    top1 = "" if found.top1_jax is None else top1_miss(config, found.top1, found.top1_jax)
    agreement = agreement_miss(config, precision, found.agreement, found.num_images)
    return [miss for miss in (top1, agreement) if miss]


def check_alone(session: Session, facts: Facts, tolerance: Tolerance) -> list[Finding]:
    """The checks that need no reference, at the size that the engine is tuned for.

    Args:
        session: of the engine.
        facts: of its bundle.
        tolerance: of the engine's precision.
    """
    probes = probes_of(facts)
    first = next(iter(probes.values()))
    largest = largest_batch(session.engine.ranges, (1, *probes[session.engine.leading.name].shape[1:]))
    outputs = [name for name in facts.signature.judged if name in {spec.name for spec in session.engine.outputs}]
    return check_consistency(session.run, probes, outputs, tolerance, largest=min(largest, len(first)))


def probes_of(facts: Facts) -> dict[str, np.ndarray]:
    """Noise, black and white for a bundle's engines."""
    return probe_inputs(facts.signature, facts.preprocess, optimal_of(facts.image_size))


def require_reference(bundle: Bundle, facts: Facts) -> None:
    """Refuses a reference or evaluation file that the conversion did not write.

    Raises:
        BenchmarkError: see above.
    """
    sizes = facts.image_size.sizes()[1:] if isinstance(facts.image_size, ImageRange | TextRange) else []
    needed = [bundle.reference, *(bundle.reference_at(size) for size in sizes)]
    left = [bundle.labels("evaluation"), bundle.images("evaluation"), bundle.predictions, bundle.embeddings]
    for path in (*needed, *(path for path in left if path in facts.files)):
        if wrong := facts.files.wrong(path):
            raise BenchmarkError(wrong, fix=f"{_COPY} Or finish the conversion, at least --until=check.")


def _where(row: OutputCheck, facts: Facts) -> str:
    return f" of {'x'.join(map(str, row.image_size))}" if varies(facts.image_size) else ""


def _compare_batches(
    session: Session,
    path: pathlib.Path,
    batches: Sequence[int],
    tolerance: Tolerance,
    judged: set[str] | None,
    signature: Signature,
) -> list[OutputCheck]:
    """Compares at one image size; judges the named tensors, or all for None."""
    with _reading(path), np.load(path) as file:
        reference = {name: file[name] for name in file.files}
    if missing := [tensor.name for tensor in signature.inputs if tensor.name not in reference]:
        raise BenchmarkError(f"{path}: holds {sorted(reference)} and no {', '.join(missing)}", fix=_COPY)
    inputs = {tensor.name: reference.pop(tensor.name) for tensor in signature.inputs}
    session.require_inputs(inputs)
    size, count = _image_size(signature, inputs), len(next(iter(inputs.values())))
    rows = []
    for batch in batches:
        # Each round starts one image later than the last; otherwise a kernel that mistook image i for image i + n would
        # go unnoticed.
        place = np.arange(batch)
        repeated = (place + place // count) % count
        for name, values in session.run({name: value[repeated] for name, value in inputs.items()}).items():
            if name in reference:
                _require_shape(f"{path}: {name}", reference[name].shape, "the engine gives", (count, *values.shape[1:]))
                found = compare(reference[name][repeated], values)
                passed = tolerance.met_by(found) if judged is None or name in judged else None
                rows.append(
                    OutputCheck(
                        batch=batch,
                        output=name,
                        max_abs=found.max_abs,
                        max_rel=found.max_rel,
                        cosine=found.cosine,
                        passed=passed,
                        image_size=size,
                    )
                )
    if missing := [name for name in signature.judged if not any(row.output == name for row in rows)]:
        raise BenchmarkError(
            f"{session.engine.path.name}: has no output {missing[0]!r} to compare",
            fix="Build it from this bundle's graph.",
        )
    return rows


def _image_size(signature: Signature, inputs: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """(height, width) of images, (tokens,) if texts may have any length."""
    image, first = signature.image, signature.inputs[0]
    if image is None:
        return (inputs[first.name].shape[1],) if first.is_text and isinstance(first.shape[1], str) else (0, 0)
    shape = inputs[image.name].shape
    return (shape[1], shape[2]) if image.layout == "NHWC" else (shape[2], shape[3])


def _evaluate(session: Session, host: EngineHost) -> _Accuracy:
    bundle, facts, progress = host.bundle, host.facts, host.progress
    images, labels = _load(bundle.images("evaluation"), mmap_mode="r"), _load(bundle.labels("evaluation"))
    _require_shape(str(bundle.labels("evaluation")), labels.shape, "the images are", images.shape[:1])
    engine, preprocess = session.engine, Preprocess.from_dict(facts.preprocess)
    image, classes = facts.signature.image, facts.signature.classes
    assert image is not None and classes is not None  # otherwise there are no labelled images
    scores = []
    with progress.bar(f"{engine.record.precision} top-1", total=len(images)) as advance:
        for start in range(0, len(images), _EVALUATION_BATCH):
            pixels = np.asarray(images[start : start + _EVALUATION_BATCH])
            fed = preprocess.graph_input(pixels, np.dtype(image.dtype), channels_first=image.layout == "NCHW")
            scores.append(session.run({image.name: fed})[classes.name])
            advance(len(pixels))
    values = np.concatenate(scores)
    predictions = bundle.predictions
    agreement = None
    if predictions in facts.files:
        scores_of_jax = _load(predictions)
        _require_shape(str(predictions), scores_of_jax.shape, "the engine gives", values.shape)
        agreement = top1_accuracy(values, np.argmax(scores_of_jax, axis=-1))
    return _Accuracy(len(labels), top1_accuracy(values, labels), facts.top1, agreement)


def _load(path: pathlib.Path, **options: Any) -> np.ndarray:
    with _reading(path):
        return np.load(path, **options)


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:  # missing, in another format, empty, or truncated
        raise BenchmarkError(f"{path}: cannot be read ({e})", fix=_COPY) from e


def _require_shape(what: str, found: Shape, whose: str, wanted: Shape) -> None:
    if found != wanted:
        raise BenchmarkError(f"{what}: {list(found)}, {whose} {list(wanted)}", fix=f"{_COPY} Build its engines again.")
