"""The results of building, verifying and measuring engines, on a host that may have only numpy and TensorRT."""

import dataclasses
from collections.abc import Mapping

from vit_convert.core.check_results import Distance
from vit_convert.core.consistency import Finding
from vit_convert.core.record import Record, StageResult, optional


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelKind(Record):
    """Kernels of one kind that a run launches.

    Attributes:
        kind: "fused attention", "product", "normalisation", "copy", "elementwise" or "other", judged by name.
        count: how many.
        names: a few of the most frequent ones.
    """

    kind: str
    count: int
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileKernels(Record):
    """The fused attention of one profile, read from the names of its kernels.

    Attributes:
        batch: images of a run.
        kernels: number that a run launches.
        count: fused attentions among them.
        precisions: how many in each.
        text: for people.
        kinds: all of its kernels by kind.
        unknown: why the kernels are unknown; "" if they are known.
    """

    batch: int
    kernels: int | None = optional()
    count: int | None = optional()
    precisions: Mapping[str, int] | None = optional()
    text: str | None = optional()
    kinds: tuple[KernelKind, ...] | None = optional()
    unknown: str | None = optional()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionKernels(Record):
    """The fused attention of an engine.

    Attributes:
        count: attentions that run as one kernel.
        precisions: how many in each.
        text: for example "yes, fp16, 12 of 12".
        source: "engine inspector" or "kernel names".
        profiles: each profile, if the kernels' names were read.
        kinds: all kernels of the first profile by kind, if the inspector shows them.
    """

    count: int
    precisions: Mapping[str, int]
    text: str
    source: str
    profiles: tuple[ProfileKernels, ...] | None = optional()
    kinds: tuple[KernelKind, ...] | None = optional()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSummary(Record):
    """One engine as it was built.

    Attributes:
        backend: "tensorrt" or "rtx".
        version: of the backend.
        arch: the GPU's, or "all".
        precision: of the engine.
        graph: the file that it was built from.
        path: in the bundle.
        bytes: of the plan.
        build_seconds: wall time.
        products: matrix products and convolutions of the parsed graph in each precision.
        int8_layers: products that run in int8; None for other precisions, or if TensorRT does not say.
        fused_attention: None if unknown.
        fused_attention_unknown: why it is unknown; otherwise "".
        warnings: TensorRT's.
    """

    backend: str
    version: str
    arch: str
    precision: str
    graph: str
    path: str
    bytes: int
    build_seconds: float
    products: Mapping[str, int]
    int8_layers: int | None = None
    fused_attention: AttentionKernels | None = None
    fused_attention_unknown: str
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecommendedEngine(EngineSummary):
    """The engine to use.

    Attributes:
        recommended_because: the reason, for people.
    """

    recommended_because: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildResult(StageResult):
    """What the build stage returns.

    Attributes:
        engines: in the order of their precisions.
    """

    engines: tuple[EngineSummary, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputCheck(Distance):
    """One output of an engine at one batch size.

    Attributes:
        batch: images that were run.
        output: its name.
        passed: None if the output is only reported.
        image_size: [height, width] in pixels.
    """

    batch: int
    output: str
    passed: bool | None
    image_size: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineCheck(Distance):
    """One engine compared with JAX; its distance is the worst of the judged outputs.

    Attributes:
        precision: of the engine.
        passed: whether nothing misses.
        tolerance: in words.
        misses: in words.
        rows: each output at each batch.
        consistency: checks without a reference, and the distance of other builds of this precision.
        num_images: labelled ones.
        top1: on them, in percent.
        top1_jax: of JAX, in percent.
        agreement: images with the same first class as in JAX, in percent.
        plan: the engine, in the bundle.
    """

    precision: str
    passed: bool
    tolerance: str
    misses: tuple[str, ...]
    rows: tuple[OutputCheck, ...]
    consistency: tuple[Finding, ...] = ()
    num_images: int | None = optional()
    top1: float | None = optional()
    top1_jax: float | None = optional()
    agreement: float | None = optional()
    plan: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof(Record):
    """What the verification of one engine found, as its sidecar keeps it.

    Attributes:
        passed: whether nothing missed.
        tolerance: in words.
        max_rel: of the judged outputs, over their largest magnitude.
        cosine: smallest of any image.
        top1: on labelled images, in percent.
        agreement: images whose first class is JAX's, in percent.
        judge: hash of the reference and the labelled images of the comparison.
    """

    passed: bool
    tolerance: str
    max_rel: float
    cosine: float
    top1: float | None = optional()
    agreement: float | None = optional()
    judge: str

    @classmethod
    def of(cls, found: EngineCheck, judge: str = "") -> "Proof":
        """The proof made from an engine's check against that judge."""
        return cls(
            passed=found.passed,
            tolerance=found.tolerance,
            max_rel=found.max_rel,
            cosine=found.cosine,
            top1=found.top1,
            agreement=found.agreement,
            judge=judge,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification(StageResult):
    """What the verify stage and command return.

    Attributes:
        passed: whether all engines did.
        engines: by precision.
        top1: of the first that has one, in percent.
    """

    passed: bool
    engines: Mapping[str, EngineCheck]
    top1: float | None = None

    @classmethod
    def of(cls, engines: Mapping[str, EngineCheck]) -> "Verification":
        """Combines the checks of several engines, given by precision."""
        parts = (
            f"{precision}: cosine {found.cosine:.6f}" + ("" if found.top1 is None else f", top-1 {found.top1:.2f} %")
            for precision, found in engines.items()
        )
        return cls(
            passed=all(found.passed for found in engines.values()),
            engines=dict(engines),
            top1=next((found.top1 for found in engines.values() if found.top1 is not None), None),
            summary="; ".join(parts),
        )
