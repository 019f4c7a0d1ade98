"""What the stages of one conversion have returned so far, each as its record."""

from collections.abc import Iterator
from typing import Any, Generic, TypeVar, overload

from vit_convert.core.benchmark_results import BenchmarkResult
from vit_convert.core.check_results import GraphCheck, PlanResult, QuantizeResult, SensitivityResult
from vit_convert.core.engine_results import BuildResult, Verification
from vit_convert.core.pair_results import PairResult, SimilarityResult
from vit_convert.core.record import StageResult
from vit_convert.core.stage_results import (
    CalibrateResult,
    CheckpointResult,
    ExportResult,
    ImagesResult,
    ReferenceResult,
)

_Kind = TypeVar("_Kind", bound=StageResult)


class NotRunError(KeyError):
    """The result of a stage that did not run was read: the stage is missing in the reader's `after`."""


class _Of(Generic[_Kind]):
    """The result of the stage of this name: its record, or NotRunError."""

    def __init__(self, kind: type[_Kind]):
        self.kind = kind

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, results: None, owner: type) -> "_Of[_Kind]": ...

    @overload
    def __get__(self, results: "Results", owner: type) -> _Kind: ...

    def __get__(self, results: Any, owner: type) -> Any:
        if results is None:
            return self
        found = results.get(self._name)
        if found is None:
            raise NotRunError(f"stage {self._name} did not run")
        return found


class Results:
    """What each stage returned, by its name: `results.export.taps`; for a failed stage, what it found before it failed.

    Example:
        >>> results = Results(images=ImagesResult(num_images=4, summary="4 images"))
        >>> results.images.num_images, results.get("export")
        (4, None)
    """

    checkpoint = _Of(CheckpointResult)
    images = _Of(ImagesResult)
    export = _Of(ExportResult)
    reference = _Of(ReferenceResult)
    check = _Of(GraphCheck)
    calibrate = _Of(CalibrateResult)
    sensitivity = _Of(SensitivityResult)
    plan = _Of(PlanResult)
    quantize = _Of(QuantizeResult)
    build = _Of(BuildResult)
    verify = _Of(Verification)
    benchmark = _Of(BenchmarkResult)
    pair = _Of(PairResult)
    similarity = _Of(SimilarityResult)

    def __init__(self, **found: StageResult):
        self._found = found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def get(self, name: str) -> Any:
        """The record of a stage; None if it did not run."""
        return self._found.get(name)

    def put(self, name: str, result: StageResult) -> None:
        """Stores what a stage returned."""
        self._found[name] = result

    def copy(self) -> "Results":
        """A copy, to which results can be added."""
        return Results(**self._found)
