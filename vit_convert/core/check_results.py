"""The results of the checks: each graph against JAX, the cost of a lower precision, and the loss of each layer."""

import dataclasses
from collections.abc import Mapping

from vit_convert.core.consistency import Finding
from vit_convert.core.record import Record, StageResult, optional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance(Record):
    """How far a tensor is from JAX's.

    Attributes:
        max_abs: largest absolute difference.
        max_rel: max_abs over the tensor's largest magnitude.
        cosine: smallest cosine similarity of any image.
    """

    max_abs: float
    max_rel: float
    cosine: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorCheck(Distance):
    """One tensor of a graph.

    Attributes:
        tensor: an output, or the value after a block.
        batch: the batch size with the largest error.
        passed: None if the tensor is only reported.
    """

    tensor: str
    batch: int
    passed: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoweringCheck(Distance):
    """The output of another lowering of the fp32 graph.

    Attributes:
        passed: by the tolerance of fp32.
        sizes: by image size ("224x224").
    """

    passed: bool
    sizes: Mapping[str, Distance]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LargestActivation(Record):
    """The largest activation of a block.

    Attributes:
        tensor: that reaches it.
        max_abs: its magnitude.
    """

    tensor: str
    max_abs: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoweredGraph(Record):
    """How a lower precision's graph was made.

    Attributes:
        quantized: layers that are quantized.
        fp32_islands: nodes that stay in float32, and why.
        num_casts: Cast nodes.
        num_subnormal: weights that lose digits because they are below the type's smallest normal value.
        max_abs_activation: by block.
    """

    quantized: tuple[str, ...] | None = optional()
    fp32_islands: Mapping[str, str] | None = optional()
    num_casts: int | None = optional()
    num_subnormal: int | None = optional()
    max_abs_activation: Mapping[str, LargestActivation] | None = optional()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphCheck(Distance, LoweredGraph, StageResult):
    """One graph under onnxruntime, compared with JAX; its distance is that of the output.

    Attributes:
        precision: of the graph; "smooth" for the fp32 graph after SmoothQuant.
        passed: whether the tolerance is met.
        tolerance: in words.
        blocks: each tensor that was compared, in graph order.
        sizes: the output at each image size ("224x224").
        consistency: checks without a reference: equal rows agree, order and batch do not matter, all values are finite.
        consistency_like: the graph whose checks without a reference stand for this one's, which is the same but for its
            types.
        consistency_without: blocks that these checks left out, because each is equal to the next one but for weights.
        top1: on the labelled images, in percent.
        lowerings: for fp32: the other lowerings by name.
    """

    precision: str
    passed: bool
    tolerance: str
    blocks: tuple[TensorCheck, ...]
    sizes: Mapping[str, Distance]
    consistency: tuple[Finding, ...] | None = optional()
    consistency_like: str | None = optional()
    consistency_without: tuple[str, ...] | None = optional()
    top1: float | None = optional()
    lowerings: Mapping[str, LoweringCheck] | None = optional()

    def of(self, graph: LoweredGraph) -> "GraphCheck":
        """The check together with how the graph was made."""
        return dataclasses.replace(self, **{name: getattr(graph, name) for name in _names(LoweredGraph)})


def _names(record: type[Record]) -> list[str]:
    return [field.name for field in dataclasses.fields(record)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict(Record):
    """Whether a quantized graph is accurate enough to be worth its speed.

    Attributes:
        against: the precision that it is compared with.
        top1: on the labelled images, in percent.
        drop_points: of top-1, in percentage points.
        allowed_points: config.check.max_top1_drop.
        accurate: None if unknown.
        text: the same in words.
    """

    against: str
    top1: float | None = optional()
    drop_points: float | None = optional()
    allowed_points: float | None = optional()
    accurate: bool | None
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeResult(StageResult):
    """What the quantize stage returns.

    Attributes:
        checks: by precision.
        verdicts: by quantized precision.
        max_abs_activation: by block, if fp16 is a builder flag and so has no graph.
    """

    checks: Mapping[str, GraphCheck]
    verdicts: Mapping[str, Verdict]
    max_abs_activation: Mapping[str, LargestActivation] | None = optional()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(Record):
    """What quantizing a set of layers does to the output, over all images.

    Attributes:
        error: mean of 1 - cosine to the fp32 output.
        cosine: smallest of any image.
        max_rel: largest absolute difference over the largest fp32 output.
        agreement: images with the same largest output as the fp32 graph, in percent.
        top1: on the labelled images, in percent.
    """

    error: float
    cosine: float
    max_rel: float
    agreement: float
    top1: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankedLayer(Loss):
    """One layer of the sensitivity ranking.

    Attributes:
        name: the layer.
        top1_change: against fp32, in percentage points.
    """

    name: str
    top1_change: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityResult(StageResult):
    """What the sensitivity stage returns.

    Attributes:
        precision: "int8" or "fp8".
        num_units: layers that could be quantized.
        worst: the most harmful of them.
    """

    precision: str
    num_units: int
    worst: RankedLayer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanBudget(Record):
    """What a plan may lose.

    Attributes:
        cosine: smallest allowed, of any image.
        top1_drop_points: largest allowed loss of top-1 in percentage points; None without labels.
    """

    cosine: float
    top1_drop_points: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanLoss(Loss):
    """What a plan loses.

    Attributes:
        share_of_weights: that are quantized, from 0 to 1.
    """

    share_of_weights: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanImages(Record):
    """The images that a plan was measured on.

    Attributes:
        source: which.
        num_images: how many.
    """

    source: str
    num_images: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedUnit(Record):
    """What one layer costs by itself.

    Attributes:
        unit: the layer.
        cost: that it was ranked by.
        error: as in `Loss`; this and the following are missing if the layer was not measured alone.
        cosine: as there.
        max_rel: as there.
        agreement: as there.
        top1: as there.
    """

    unit: str
    cost: float
    error: float | None = optional()
    cosine: float | None = optional()
    max_rel: float | None = optional()
    agreement: float | None = optional()
    top1: float | None = optional()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionPlan(Record):
    """The content of `precision_plan.json`, which people may edit.

    Attributes:
        about: how to edit it.
        precision: "int8" or "fp8".
        sites: what is quantized: names of layers, blocks, or patterns.
        left_out: layers that stay as they are, and why.
        budget: that was kept.
        measured: of the set.
        fp32: of the graph without any quantized layer.
        images: that it was measured on.
        ranked: least harmful layer first; empty if nothing had to be ranked.
    """

    about: str
    precision: str
    sites: tuple[str, ...]
    left_out: Mapping[str, str]
    budget: PlanBudget
    measured: PlanLoss
    fp32: Loss
    images: PlanImages
    ranked: tuple[PlannedUnit, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanResult(StageResult):
    """What the plan stage returns: the largest set of layers within the budget.

    Attributes:
        precision: "int8" or "fp8".
        budget: that was kept.
        measured: of the set.
        fp32: of the graph without any quantized layer.
        images: that it was measured on.
        left_out: layers that stay as they are, and why.
        path: of the plan, in the bundle.
        num_units: layers in the set.
        num_candidates: layers that could be quantized.
    """

    precision: str
    budget: PlanBudget
    measured: PlanLoss
    fp32: Loss
    images: PlanImages
    left_out: Mapping[str, str]
    path: str
    num_units: int
    num_candidates: int
