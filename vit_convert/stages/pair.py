"""The stages of a pair, which follow those of its towers: its description, and the comparison of its similarities with
JAX's."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_convert.core import config as configs
from vit_convert.core.bundle import write_json
from vit_convert.core.errors import CalibrationError, CheckError, CheckpointError
from vit_convert.core.manifest import Manifest
from vit_convert.core.pair import TOWERS, PairFacts
from vit_convert.core.pair_judge import PairJudge, stand_in
from vit_convert.core.pair_results import PairResult, SimilarityCheck, SimilarityResult, ZeroShot
from vit_convert.core.pipeline import Context, Stage
from vit_convert.core.results import Results
from vit_convert.stages.check import ANSWERS, runnable
from vit_convert.stages.common import EVALUATION_BATCH, plain, prepare, signature_of
from vit_convert.stages.text import samples_file


def pair_stages() -> list[Stage]:
    """The stages of a pair; its context has its towers' contexts in `scratch`, by name."""
    return [PAIR, SIMILARITY]


def tower_context(context: Context, config: Any, tower: str, answers: Mapping[str, Any] | None = None) -> Context:
    """A finished tower as its stages saw it.

    Args:
        context: of the pair.
        config: of the tower.
        tower: "image" or "text".
        answers: its graphs' outputs, if they were checked in this process; see `stages.check.ANSWERS`.
    """
    found = Context(config, type(context.bundle)(context.bundle.root / tower), context.progress, context.command)
    manifest = Manifest.read(found.bundle)
    for name in filter(manifest.finished, manifest.rows):
        found.results.put(name, getattr(Results, name).kind.from_dict(manifest.result(name)))
    found.scratch[ANSWERS] = dict(answers or {})
    return found


def _towers(context: Context) -> list[Context]:
    return [context.scratch[tower] for tower in TOWERS]


def describe_pair(context: Context) -> PairResult:
    """Writes `pair.json`."""
    facts = _facts(context)
    graphs = {tower: _hash(context.scratch[tower], "model.onnx") for tower in TOWERS}
    write_json(context.bundle.pair, {**facts.to_dict(), "graphs": graphs})
    bias = "" if facts.logit_bias is None else f", bias {facts.logit_bias:.4g}"
    classes = f", {facts.classes} classes" if facts.classes else ""
    summary = f"{facts.similarity}, scale {facts.logit_scale:.4g}{bias}{classes}"
    return PairResult(**facts.to_dict(), summary=summary)


def _facts(context: Context) -> PairFacts:
    """What both towers say about the pair.

    Raises:
        CheckpointError: their embeddings differ in size.
    """
    image, text = _towers(context)
    widths = [signature_of(tower).outputs[0].shape[-1] for tower in (image, text)]
    if widths[0] != widths[1]:
        raise CheckpointError(
            f"an image's embedding has {widths[0]} numbers, a text's {widths[1]}: they are not of one pair",
            fix="Convert the towers one by one, with ':img' and ':txt' behind the file.",
        )
    record, prompts = text.results.checkpoint.pair or {}, text.results.images
    own = {key: record[key] for key in ("logit_scale", "logit_bias", "similarity")}
    rule = _prompting(record)
    if (range_of_texts := text.results.checkpoint.text_range) is not None:
        rule["shortest"] = range_of_texts.smallest[0]
    return PairFacts(**own, text=rule, classes=prompts.classes or 0, templates=prompts.templates or 0)


def _prompting(record: Mapping[str, Any]) -> dict[str, Any]:
    from vit_convert.text.prompting import Prompting

    return Prompting.from_dict(record).to_dict()


def check_similarity(context: Context) -> SimilarityResult:
    """Compares the similarities of images and texts with JAX's, for the fp32 graphs and each lower precision.

    Raises:
        CheckError: a tolerance is missed; all precisions are measured first.
    """
    towers, judge = _towers(context), _judge(context)
    checks = {}
    for precision in _precisions(towers):
        used = {name: stand_in(precision, _graphs(tower)) for name, tower in zip(TOWERS, towers)}
        image, text = (_of_graph(tower, used[name]) for name, tower in zip(TOWERS, towers))
        checks[precision] = judge.check(precision, used, (image, text))
    result = SimilarityResult(
        source="evaluation data" if judge.judges_ranks else "seeded noise",
        checks=checks,
        zero_shot=_zero_shot(judge),
        summary=_summary(checks),
    )
    if missed := {name: row.misses for name, row in checks.items() if row.misses}:
        said = "; ".join(f"{name}: {'; '.join(misses)}" for name, misses in missed.items())
        raise CheckError(
            f"the pair's similarities are not JAX's: {said}",
            fix="Leave the layers that cost most in fp16 (config.image.precision=auto, config.text.precision=auto), or "
            "quantize only one tower (config.text.precision=fp16). docs/zero_shot.md has more.",
            result=result,
        )
    return result


def _judge(context: Context) -> PairJudge:
    facts, (image, text) = _facts(context), _towers(context)
    judges_ranks = _has_samples(image) and _has_samples(text)
    return PairJudge(context.config, facts, (_jax(image), _jax(text)), _labels(image, facts), judges_ranks)


def _zero_shot(judge: PairJudge) -> ZeroShot | None:
    """JAX's accuracy; None without labels."""
    jax = judge.zero_shot(judge.right)
    if judge.labels is None or jax is None:
        return None
    return ZeroShot(classes=judge.pair.classes, templates=judge.pair.templates, num_images=len(judge.labels), jax=jax)


def _summary(checks: Mapping[str, SimilarityCheck]) -> str:
    parts = []
    for name, row in checks.items():
        part = f"{name}: cosines to {row.max_cosine_error:.2g}, top-1 {row.top1:.2f} %, recall {row.recall:.2f} %"
        parts.append(part + ("" if row.zero_shot is None else f", zero-shot {row.zero_shot:.2f} %"))
    return "; ".join(parts)


def _precisions(towers: list[Context]) -> list[str]:
    """The precisions in which some tower has a graph, from the highest to the lowest."""
    return [name for name in configs.PRECISIONS if any(name in _graphs(tower) for tower in towers)]


def _graphs(tower: Context) -> list[str]:
    quantized = tower.results.get("quantize")
    return ["fp32", *(name for name in (quantized.checks if quantized else ()) if name in configs.PRECISIONS)]


def _has_samples(tower: Context) -> bool:
    return bool(tower.results.images.num_images)


def _jax(tower: Context) -> np.ndarray:
    """JAX's embeddings of all evaluation images or prompts, or, without those, of the reference's."""
    if _has_samples(tower):
        return np.load(tower.bundle.embeddings)
    with np.load(tower.bundle.reference) as file:
        return file[signature_of(tower).outputs[0].name]


def _of_graph(tower: Context, precision: str) -> np.ndarray:
    from vit_convert.checks.onnx_graph import graph_scores
    from vit_convert.core.onnx_file import open_session, run_session

    signature = signature_of(tower)
    output = signature.outputs[0].name
    with runnable(tower, precision) as path:
        if _has_samples(tower):
            samples = np.load(samples_file(tower, "evaluation"), mmap_mode="r")
            options: Any = {"batch_size": EVALUATION_BATCH, "progress": tower.progress}
            return graph_scores(path, samples, prepare(tower), output, label=f"{precision} similarity", **options)
        if (known := tower.scratch.get(ANSWERS, {}).get(path.name)) is not None:  # from the check in this process
            answer: np.ndarray = known[output]
            return answer
        with np.load(tower.bundle.reference) as file:
            feeds = {tensor.name: file[tensor.name] for tensor in signature.inputs}
        return run_session(open_session(path), feeds, [output])[output]


def _labels(image: Context, facts: PairFacts) -> np.ndarray | None:
    """The classes of the evaluation images; None without labels or without classes.

    Raises:
        CalibrationError: the labels do not fit the classes of the prompts.
    """
    path = image.bundle.labels("evaluation")
    if not facts.classes or path not in Manifest.read(image.bundle).files:
        return None
    labels, folders = np.load(path), image.results.images.class_folders or ()
    where = f"evaluation.data={image.config.evaluation.data}"
    if labels.min() < 0 or labels.max() >= facts.classes:
        raise CalibrationError(
            f"{where}: label {labels.max()}, evaluation.prompts lists {facts.classes} classes",
            fix="Its lines are the classes in the order of the labels, which count from 0.",
        )
    if folders and len(folders) != facts.classes:
        raise CalibrationError(
            f"{where}: {len(folders)} class folders, evaluation.prompts lists {facts.classes} classes, so the folders' "
            "places in sorted order need not be its lines",
            fix="Name the folders by class number, or list them in a classes.txt beside them, in the same order.",
        )
    return labels


def _hash(tower: Context, name: str) -> str:
    record = Manifest.read(tower.bundle).files.record(tower.bundle.root / name)
    return record.sha256 if record else ""


def _files(context: Context) -> list[Any]:
    """The files of each tower that the similarities are computed from."""
    found = []
    for tower in _towers(context):
        records = Manifest.read(tower.bundle).files.records
        found.append({path: record.sha256 for path, record in sorted(records.items()) if _is_read(path)})
    return found


def _is_read(path: str) -> bool:
    return path.startswith(("reference", "evaluation", "model"))


def _pair_inputs(context: Context) -> Any:
    return [_facts(context).to_dict(), [_hash(tower, "model.onnx") for tower in _towers(context)]]


def _similarity_inputs(context: Context) -> Any:
    towers = [[_graphs(tower), tower.config.layout, tower.config.input] for tower in _towers(context)]
    return [plain(context.config.check), towers, _files(context)]


def _outputs(context: Context) -> list[pathlib.Path]:
    return [context.bundle.pair]


PAIR = Stage("pair", (), PairResult, describe_pair, _pair_inputs, _outputs)
SIMILARITY = Stage("similarity", ("pair",), SimilarityResult, check_similarity, _similarity_inputs)
