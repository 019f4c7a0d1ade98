"""The `.plan.json` beside every engine: where it came from, where it runs, and its inputs; read before TensorRT sees
the plan."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from vit_convert.core.bundle import hash_file, read_json, write_json
from vit_convert.core.engine_results import EngineSummary, Proof
from vit_convert.core.errors import BuildError
from vit_convert.core.record import Record, RecordError, optional
from vit_convert.engine.backend.graph_file import GraphFile, graph_hashes
from vit_convert.engine.backend.trt import Backend

# AMPERE_PLUS engines run on this compute capability and all later ones.
_AMPERE = 80
_Kind = TypeVar("_Kind", bound=Record)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFile(Record):
    """The engine's file.

    Attributes:
        bytes: its size.
        sha256: in hex.
    """

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions(Record):
    """The builder's options; None does not occur in our own engines.

    Attributes:
        workspace_gib: maximum GPU memory that a layer may use as scratch.
        opt_level: of the builder.
        tf32: whether fp32 products may round their inputs.
        keep_fp32: what stays fp32 if precision is a flag.
        hardware_compatible: whether it runs on Ampere and every later GPU.
        version_compatible: whether later versions of the same major load it.
        ranges: hash of the ranges used for int8.
        calibrator: key of the cache of TensorRT's calibrator.
    """

    workspace_gib: float | None = None
    opt_level: int = 0
    tf32: bool = False
    keep_fp32: tuple[str, ...] = ()
    hardware_compatible: bool | None = None
    version_compatible: bool | None = None
    ranges: str | None = optional()
    calibrator: Mapping[str, str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked(Record):
    """A build request: an engine whose sidecar holds an equal one need not be built again.

    Attributes:
        vit_convert: version that built.
        precision: of the engine.
        profiles: per profile {input: [smallest, optimal, largest shape]}.
        onnx: the graph that it was built from.
        preprocessing: the preprocessing record.
        options: of the builder.
    """

    vit_convert: str
    precision: str
    profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...]
    onnx: GraphFile
    preprocessing: Mapping[str, Any]
    options: BuildOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRecord(Record):
    """An input or output of an engine.

    Attributes:
        name: its name.
        dtype: its numpy type.
        shape: batch first, -1 for dynamic dimensions.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InsteadOf(Record):
    """The lowering that could not be built, in place of which another one or model.onnx was built.

    Attributes:
        onnx: the lowering.
        reason: why, for people.
    """

    onnx: GraphFile
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sidecar(Asked):
    """The content of `.plan.json`.

    Attributes:
        backend: "tensorrt" or "rtx".
        version: of the backend.
        targets: architectures that it runs on ("sm90").
        gpu: on which it was built.
        inputs: of the engine.
        outputs: of the engine.
        products: matrix products and convolutions of the parsed graph in each precision.
        attentions: of the parsed graph.
        build_seconds: wall time.
        built_at: when, in UTC (ISO 8601).
        plan: the engine's file.
        summary: for the report; missing if the build was killed.
        model: hashes of the model.onnx from which its graph was made.
        instead_of: for an engine built in place of another.
        proof: the result of verification.
    """

    backend: str
    version: str
    targets: tuple[str, ...]
    gpu: Mapping[str, Any] | None = None
    inputs: tuple[TensorRecord, ...] = ()
    outputs: tuple[TensorRecord, ...] = ()
    products: Mapping[str, int] = dataclasses.field(default_factory=dict)
    attentions: int = 0
    build_seconds: float = 0.0
    built_at: str = ""
    plan: PlanFile
    summary: EngineSummary | None = optional()
    model: Mapping[str, str] | None = optional()
    instead_of: InsteadOf | None = optional()
    proof: Proof | None = optional()

    def missing(self) -> list[str]:
        """Missing entries without which an engine cannot be loaded."""
        needed = {
            "backend": self.backend,
            "version": self.version,
            "targets": self.targets,
            "precision": self.precision,
            "options.version_compatible": self.options.version_compatible,
            "options.hardware_compatible": self.options.hardware_compatible,
            "onnx.path": self.onnx.path,
            "onnx.sha256": self.onnx.sha256,
            "plan.sha256": self.plan.sha256,
        }
        return [key for key, value in needed.items() if value in (None, "", ())]


def sidecar_path(plan_path: str | os.PathLike[str]) -> pathlib.Path:
    """The sidecar of a plan: `.json` appended to its name."""
    return pathlib.Path(f"{os.fspath(plan_path)}.json")


def plan_file(plan_path: str | os.PathLike[str]) -> PlanFile:
    """Describes a finished plan."""
    return PlanFile(bytes=os.path.getsize(plan_path), sha256=hash_file(plan_path))


def write_sidecar(plan_path: str | os.PathLike[str], sidecar: Sidecar) -> None:
    """Writes a plan's sidecar.

    Args:
        plan_path: the finished plan.
        sidecar: of it.
    """
    write_json(sidecar_path(plan_path), sidecar.to_dict())


def read_sidecar(plan_path: str | os.PathLike[str]) -> Sidecar | None:
    """Reads a plan's sidecar; entries in another form are left empty.

    Args:
        plan_path: the plan.

    Returns:
        The sidecar; None if it is missing or not a JSON object.
    """
    found = read_json(sidecar_path(plan_path))
    return None if found is None else Sidecar.from_dict(_readable(Sidecar, found))


def _readable(kind: type[_Kind], found: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that have a record's form; the parts that an engine needs are filtered in the same way."""
    parts: dict[str, type[Record]] = {"options": BuildOptions, "onnx": GraphFile, "plan": PlanFile}
    kept = {}
    for key, value in found.items():
        if kind is Sidecar and key in parts and isinstance(value, Mapping):
            value = _readable(parts[key], value)
        try:
            kind.from_dict({key: value})
        except RecordError:
            continue
        kept[key] = value
    return kept


def check_sidecar(
    plan_path: str | os.PathLike[str], backend: Backend, *, onnx_path: str | os.PathLike[str] | None = None
) -> Sidecar:
    """Makes sure that an engine belongs to this TensorRT and GPU, and is undamaged, before it is deserialised.

    Args:
        plan_path: the engine.
        backend: the TensorRT that is to load it.
        onnx_path: the graph that the engine must have been built from; None for any.

    Returns:
        The sidecar.

    Raises:
        BuildError: something does not fit; the message says what to rebuild.
    """
    plan_path = pathlib.Path(plan_path)
    if not plan_path.is_file():
        raise BuildError(f"{plan_path}: there is no such engine", fix="Build it first.")
    sidecar = read_sidecar(plan_path)
    if sidecar is None:
        raise BuildError(
            f"{sidecar_path(plan_path)}: missing or damaged, so it is unknown where the engine runs",
            fix="Build the engine again.",
        )
    require_fit(plan_path, sidecar, backend)
    if onnx_path is not None and sidecar.onnx.hashes != (found := graph_hashes(onnx_path)):
        raise BuildError(
            f"{plan_path}: built from another {pathlib.Path(onnx_path).name} ({sidecar.onnx.sha256[:12]}…, now "
            f"{found['sha256'][:12]}…)",
            fix=_rebuild(sidecar),
        )
    return sidecar


def require_fit(plan_path: pathlib.Path, sidecar: Sidecar, backend: Backend) -> None:
    """Refuses an engine that this TensorRT or GPU cannot run, or whose file is not the one that was built.

    Args:
        plan_path: the engine, which exists.
        sidecar: of it.
        backend: the TensorRT that is to load it.

    Raises:
        BuildError: see above.
    """
    if missing := sidecar.missing():
        raise BuildError(
            f"{sidecar_path(plan_path)}: damaged: {', '.join(missing)} not in it", fix="Build the engine again."
        )
    rebuild = _rebuild(sidecar)
    if sidecar.backend != backend.name:
        raise BuildError(
            f"{plan_path}: built by {sidecar.backend}, to be loaded by {backend.name}",
            fix=f"Load it with {sidecar.backend}. {rebuild}",
        )
    if not _version_fits(sidecar, backend.version):
        raise BuildError(
            f"{plan_path}: built by {backend.name} {sidecar.version}, here is {backend.version}", fix=rebuild
        )
    if backend.gpu is not None and not _arch_fits(sidecar, backend.gpu.arch):
        raise BuildError(
            f"{plan_path}: built for {', '.join(sidecar.targets)}, here is {backend.gpu.arch} ({backend.gpu.name})",
            fix=rebuild,
        )
    if (found := hash_file(plan_path)) != sidecar.plan.sha256:
        raise BuildError(
            f"{plan_path}: its sha256 is {found[:12]}…, its sidecar says {sidecar.plan.sha256[:12]}…",
            fix=f"The file is damaged. {rebuild}",
        )


def _rebuild(sidecar: Sidecar) -> str:
    return f"Build {sidecar.precision} again from {sidecar.onnx.path} on this host."


def _version_fits(sidecar: Sidecar, version: str) -> bool:
    # such an engine runs on its own version and later ones of the same major
    if sidecar.options.version_compatible:
        built, here = _numbers(sidecar.version), _numbers(version)
        return built[:1] == here[:1] and bool(built) and built <= here
    return sidecar.version == version


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if re.fullmatch("[0-9]{1,9}", part)]


def _arch_fits(sidecar: Sidecar, arch: str) -> bool:
    if sidecar.options.hardware_compatible and sidecar.backend != "rtx" and int(arch[2:]) >= _AMPERE:
        return True
    return arch in sidecar.targets
