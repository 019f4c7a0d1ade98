"""A pair on a GPU host: its towers' engines, and how their similarities compare with JAX's."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence

import ml_collections
import numpy as np

from vit_convert.core.bundle import Bundle, read_json
from vit_convert.core.config import PRECISIONS
from vit_convert.core.errors import BenchmarkError, CheckError, UsageError
from vit_convert.core.manifest import Manifest
from vit_convert.core.pair import TOWERS, PairFacts, read_pair
from vit_convert.core.pair_judge import PairJudge, stand_in
from vit_convert.core.pair_results import PairVerification, SimilarityCheck
from vit_convert.core.progress import Progress
from vit_convert.core.text_table import text_table
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.bundle_engines import find_plan, open_engine
from vit_convert.engine.handoff import Facts, open_bundle, read_facts
from vit_convert.engine.runtime.session import Session
from vit_convert.images.patches import patch_inputs
from vit_convert.images.preprocess import Preprocess
from vit_convert.report.record import PairReport, update

_BATCH = 64


def open_pair(folder: str | os.PathLike[str]) -> tuple[PairFacts, dict[str, Bundle]]:
    """Opens a pair.

    Args:
        folder: what a conversion wrote, `<workdir>/<name>`.

    Returns:
        The pair's facts, and the bundles of its towers by name.

    Raises:
        UsageError: its conversion is not finished, or its towers are from other conversions.
    """
    root = Bundle(folder)
    facts, fix = read_pair(folder), "Finish the conversion, or copy the whole folder from the export host."
    if not Manifest.read(root).finished("pair"):
        raise UsageError(f"{root.manifest}: stage pair is not done", fix=fix)
    towers = {tower: open_bundle(os.fspath(root.root / tower)) for tower in TOWERS}
    graphs = (read_json(root.pair) or {}).get("graphs", {})
    for tower, bundle in towers.items():
        record = Manifest.read(bundle).files.record(bundle.onnx())
        if record is None or record.sha256 != graphs.get(tower):
            raise UsageError(f"{bundle.root}: is not the {tower} tower that {root.pair} was written for", fix=fix)
    return facts, towers


def verify_pair(
    backend: Backend, root: Bundle, config: ml_collections.ConfigDict, *, precisions: Sequence[str], progress: Progress
) -> PairVerification:
    """Compares the similarities that a pair's engines give with JAX's, on its evaluation images and prompts.

    Args:
        backend: the TensorRT that runs them.
        root: the pair's folder.
        config: the pair's; `check` holds the tolerances.
        precisions: which engines; a tower without one of a precision takes part with its next higher one.
        progress: what people see.

    Returns:
        The results, which are also in the pair's report.

    Raises:
        CheckError: a tolerance is missed; its `result` holds the above.
        BenchmarkError, BuildError: an engine is missing or does not run, or a file of the bundle belongs to another
            conversion.
    """
    pair, bundles = open_pair(root.root)
    facts = {tower: read_facts(bundle) for tower, bundle in bundles.items()}
    judge, engines = _judge(config, pair, bundles, facts), {}
    for precision in precisions:
        used = {tower: stand_in(precision, _built(backend, bundle)) for tower, bundle in bundles.items()}
        if all(used.values()):
            image, text = (_embed(backend, bundles[tower], facts[tower], used[tower], progress) for tower in TOWERS)
            engines[precision] = judge.check(precision, used, (image, text))
    result = PairVerification(passed=all(row.passed for row in engines.values()), engines=engines, summary="")
    update(root, lambda report: dataclasses.replace(report, engines={**report.engines, **engines}), PairReport)
    if not result.passed:
        said = "; ".join(f"{name}: {'; '.join(row.misses)}" for name, row in engines.items() if row.misses)
        fix = "Quantize only one tower, or keep the layers that cost most in fp16; docs/zero_shot.md has more."
        raise CheckError(f"the engines' similarities are not JAX's: {said}", fix=fix, result=result)
    return result


def pair_table(engines: Mapping[str, SimilarityCheck]) -> str:
    """The results of `verify_pair` as text for a terminal."""
    rows = []
    for precision, row in engines.items():
        numbers = [f"{row.max_cosine_error:.2g}", f"{row.top1:.2f} %", f"{row.recall:.2f} %"]
        top1 = "" if row.zero_shot is None else f"{row.zero_shot:.2f} %"
        rows.append([f"{precision} pair", *numbers, top1, "passed" if row.passed else "FAILED"])
    return text_table(("engines", "cosine", "same first", "in first 5", "zero-shot", ""), rows)


def jax_embeddings(bundle: Bundle, facts: Facts) -> np.ndarray:
    """JAX's embeddings of a tower's evaluation images or prompts, or, without those, of the reference's.

    Raises:
        BenchmarkError: the file is missing or damaged.
    """
    path = bundle.embeddings if bundle.embeddings in facts.files else bundle.reference
    if wrong := facts.files.wrong(path):
        raise BenchmarkError(wrong, fix="Copy the whole folder from the export host.")
    if path == bundle.embeddings:
        return np.load(path)
    with np.load(path) as file:
        return file[facts.output]


def evaluation_labels(image: Bundle, facts: Facts, pair: PairFacts) -> np.ndarray | None:
    """The classes of the evaluation images; None without labels, or if the prompts do not describe classes."""
    path = image.labels("evaluation")
    return np.load(path) if pair.classes and path in facts.files else None


def samples_of(bundle: Bundle, facts: Facts) -> Iterator[dict[str, np.ndarray]]:
    """The inputs of a tower's graphs for its evaluation images or prompts, batch by batch; without those, for the
    reference's.

    Raises:
        BenchmarkError: a file is missing or damaged.
    """
    inputs, image = facts.signature.inputs, facts.signature.image
    if bundle.embeddings not in facts.files:
        with np.load(bundle.reference) as file:
            yield {tensor.name: file[tensor.name] for tensor in inputs}
        return
    is_image = image is not None or facts.patches[0]
    path = bundle.images("evaluation") if is_image else bundle.tokens("evaluation")
    if wrong := facts.files.wrong(path):
        raise BenchmarkError(wrong, fix="Copy the whole folder from the export host.")
    if len(inputs) > 1 and not facts.patches[0]:
        raise BenchmarkError(f"{bundle.root}: takes more than {inputs[0].name}, which its folder does not hold")
    samples, preprocess = np.load(path, mmap_mode="r"), Preprocess.from_dict(facts.preprocess)
    for start in range(0, len(samples), _BATCH):
        batch = np.asarray(samples[start : start + _BATCH])
        if facts.patches[0]:
            kinds = ((tensor.dtype == "float32", len(tensor.shape)) for tensor in inputs)
            yield dict(zip([tensor.name for tensor in inputs], patch_inputs(batch, kinds)))
            continue
        if image is not None:
            batch = preprocess.graph_input(batch, image.dtype, channels_first=image.layout == "NCHW")
        yield {inputs[0].name: batch}


def _built(backend: Backend, bundle: Bundle) -> list[str]:
    """The precisions for which a tower has an engine that runs here."""
    return [name for name in PRECISIONS if find_plan(backend, bundle, name).is_file()]


def _judge(
    config: ml_collections.ConfigDict, pair: PairFacts, bundles: Mapping[str, Bundle], facts: Mapping[str, Facts]
) -> PairJudge:
    image, text = (jax_embeddings(bundles[tower], facts[tower]) for tower in TOWERS)
    judges_ranks = all(bundle.embeddings in facts[tower].files for tower, bundle in bundles.items())
    labels = evaluation_labels(bundles["image"], facts["image"], pair)
    return PairJudge(config, pair, (image, text), labels, judges_ranks, engine=True)


def _embed(backend: Backend, bundle: Bundle, facts: Facts, precision: str, progress: Progress) -> np.ndarray:
    plan, found = find_plan(backend, bundle, precision), []
    bar = progress.bar(f"{bundle.root.name} {precision}")
    with Session(open_engine(backend, bundle, plan)) as session, bar as advance:
        for feeds in samples_of(bundle, facts):
            found.append(np.asarray(session.run(feeds)[facts.output]))
            advance(len(found[-1]))
    return np.concatenate(found)
