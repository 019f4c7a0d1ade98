"""The engines that `tune` tries: lowerings of one graph × profiles; and which results in tune.json are still valid."""

import contextlib
import copy
import dataclasses
import itertools
import operator
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from vit_convert.core import chosen_lowering
from vit_convert.core.bundle import Bundle, hash_value, read_json
from vit_convert.core.errors import UsageError
from vit_convert.core.record import RecordError
from vit_convert.core.tune_results import TunedTrial
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.build_bundle import request_for
from vit_convert.engine.builder.request import BuildRequest
from vit_convert.engine.host import EngineHost
from vit_convert.engine.runtime.profiles import batch_profiles
from vit_convert.engine.tune.winners import DEFAULT

# The config keys, besides lowering and batch, that a build request depends on.
_ENGINE = ("workspace_gib", "opt_level", "tf32", "hardware_compatible", "version_compatible", "calibrator")
_OPTIONS = (*(f"engine.{key}" for key in _ENGINE), "keep_fp32")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One engine to try.

    Attributes:
        lowering: name of the graph's lowering.
        sizes: {"min", "opt", "max"} batch of its only profile.
        precision: of the engine.
        batches: batch sizes at which it is timed.
        seconds: of one pass over one of them.
        check: the config's tolerances.
        request: what to build.
    """

    lowering: str
    sizes: Mapping[str, int]
    precision: str
    batches: tuple[int, ...]
    seconds: float
    check: Mapping[str, float]
    request: BuildRequest

    @property
    def profile(self) -> str:
        """ "fixed 64" or "range 1-8-64"."""
        smallest, best, largest = (self.sizes[key] for key in ("min", "opt", "max"))
        return f"fixed {best}" if smallest == largest else f"range {smallest}-{best}-{largest}"

    def key(self, backend: Backend) -> str:
        """A hash of what its result depends on: graph, request, tolerances, what is timed, TensorRT, GPU and driver."""
        where = [
            backend.name,
            backend.version,
            backend.gpu.name if backend.gpu else "",
            backend.gpu.driver if backend.gpu else "",
        ]
        return hash_value([where, self.request.asked, list(self.batches), self.seconds, dict(self.check)])


def options_of(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config values on which a build request depends, besides graph and profiles.

    Args:
        config: the resolved config.

    Returns:
        {"engine.opt_level": 3, …}, as plain JSON values.
    """
    values = zip(_OPTIONS, operator.attrgetter(*_OPTIONS)(config))
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values}


def lowerings(host: EngineHost) -> dict[str, pathlib.Path]:
    """The graphs to choose from: the one that engines are built from, those that the config names, and the bundle's
    own.

    Raises:
        UsageError: the bundle lacks one of them.
    """
    config, facts = host.config, host.facts
    used = chosen_lowering.lowering(config, facts.lowering) or DEFAULT
    graphs = {name: _graph(host.bundle, name) for name in dict.fromkeys([used, DEFAULT, *config.lowerings])}
    for name, path in graphs.items():
        if wrong := facts.files.wrong_graph(path):
            raise UsageError(f"config.lowerings: {name}: {wrong}", fix="Convert again, with it in config.lowerings.")
    return graphs


def plan_trials(host: EngineHost, *, precisions: Sequence[str]) -> list[Trial]:
    """Lists the engines to try: each lowering with a fixed profile for each batch, and with the config's range.

    Args:
        host: whose bundle holds the graphs; `config.lowerings` beside the bundle's own, `config.benchmark.batches` are
            the fixed sizes, `config.batch` is the range.
        precisions: engines; lowerings are for fp16 where the builder lowers it from fp32.

    Returns:
        The trials.

    Raises:
        UsageError: the bundle lacks one of the lowerings, or INT8 would come from TensorRT's own calibrator.
    """
    config, facts = host.config, host.facts
    if "int8" in precisions and config.engine.calibrator:
        raise UsageError(
            "config.engine.calibrator=True: tune does not calibrate",
            fix="Tune the other precisions, or int8 of the quantized graph.",
        )
    batches, span = tuple(config.benchmark.batches), config.batch
    kinds = [({"min": size, "opt": size, "max": size}, (size,)) for size in batches]
    inside = tuple(size for size in batches if span.min <= size <= span.max)
    if span.min < span.max and inside:
        kinds.append(({"min": span.min, "opt": span.opt, "max": span.max}, inside))
    trials = []
    for precision in precisions:
        names = list(lowerings(host)) if facts.dialect.builds_from_lowerings(precision) else [DEFAULT]
        for lowering, (sizes, timed) in itertools.product(names, kinds):
            trials.append(_trial(host, lowering, sizes, precision, timed, config.benchmark.seconds))
    return trials


def read_trials(path: pathlib.Path) -> list[TunedTrial]:
    """The trials in a `tune.json` that have this version's form; none if there is no file."""
    found = (read_json(path) or {}).get("trials", [])
    trials = []
    for row in found if isinstance(found, list) else []:
        with contextlib.suppress(RecordError, AttributeError):
            trials.append(TunedTrial.from_dict(row))
    return trials


def still_valid(host: EngineHost, rows: Iterable[TunedTrial]) -> dict[str, TunedTrial]:
    """The trials of tune.json that are still valid, whether or not they are requested now.

    Args:
        host: that builds and runs.
        rows: the known trials.

    Returns:
        The rows by key; without those of another graph, TensorRT or GPU.
    """
    found = {}
    for row in rows:
        if {*row.options} != {*_OPTIONS}:  # written by another version
            continue
        own = copy.deepcopy(host.config)
        own.update_from_flattened_dict({k: tuple(v) if isinstance(v, list) else v for k, v in row.options.items()})
        trial = _trial(
            dataclasses.replace(host, config=own), row.lowering, row.sizes, row.precision, row.batches, row.seconds
        )
        if (
            trial.request.onnx_path in host.facts.files
            and pathlib.Path(trial.request.onnx_path).is_file()
            and trial.key(host.backend) == row.key
        ):
            found[row.key] = row
    return found


def _trial(
    host: EngineHost,
    lowering: str,
    sizes: Mapping[str, int],
    precision: str,
    batches: tuple[int, ...],
    seconds: float,
) -> Trial:
    request, facts = request_for(host, precision), host.facts
    profiles = batch_profiles(facts.signature.inputs, facts.image_size, {**sizes, "profiles": ()})
    graph = _graph(host.bundle, lowering) if facts.dialect.builds_from_lowerings(precision) else request.onnx_path
    check = host.config.check.to_dict()
    return Trial(
        lowering,
        sizes,
        precision,
        batches,
        seconds,
        check,
        dataclasses.replace(request, onnx_path=graph, profiles=profiles),
    )


def _graph(bundle: Bundle, lowering: str) -> pathlib.Path:
    return bundle.onnx() if lowering == DEFAULT else bundle.lowering(lowering)
