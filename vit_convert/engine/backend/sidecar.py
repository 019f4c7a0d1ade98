"""The `.plan.json` beside every engine: where it came from, where it runs, what goes in; read before TensorRT sees the
plan."""

import os
import pathlib
import re
from typing import Any

from vit_convert.core.bundle import hash_file, read_json, write_json
from vit_convert.core.errors import BuildError
from vit_convert.engine.backend.trt import Backend

# AMPERE_PLUS engines run on this compute capability and all later ones.
_AMPERE = 80
# Entries by dotted key, and what each has to be: those that `check_sidecar` needs, and those that may be missing.
_NEEDED = {
    "backend": str,
    "version": str,
    "targets": list,
    "precision": str,
    "options.version_compatible": bool,
    "options.hardware_compatible": bool,
    "onnx.path": str,
    "onnx.sha256": str,
    "plan.sha256": str,
}
_OPTIONAL = {
    "gpu": dict,
    "instead_of.onnx": dict,
    "instead_of.reason": str,
    "model": dict,
    "onnx": dict,
    "options": dict,
    "precision": str,
    "proof": dict,
    "summary": dict,
}


def sidecar_path(plan_path: str | os.PathLike[str]) -> pathlib.Path:
    """The sidecar of a plan: `.json` appended to its name."""
    return pathlib.Path(f"{os.fspath(plan_path)}.json")


def graph_hashes(onnx_path: str | os.PathLike[str]) -> dict[str, str]:
    """The sha256 of a graph and, where it has one, of its weight file `<graph>.data`.

    Args:
        onnx_path: the graph.

    Returns:
        {"sha256": ..., "data_sha256": ...}, the second only for external weights.
    """
    hashes = {"sha256": hash_file(onnx_path)}
    data = pathlib.Path(f"{os.fspath(onnx_path)}.data")
    if data.exists():
        hashes["data_sha256"] = hash_file(data)
    return hashes


def write_sidecar(plan_path: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Writes a plan's sidecar, adding the plan's own size and hash.

    Args:
        plan_path: the finished plan.
        record: everything else.
    """
    plan = {"bytes": os.path.getsize(plan_path), "sha256": hash_file(plan_path)}
    write_json(sidecar_path(plan_path), {**record, "plan": plan})


def add_to_sidecar(plan_path: str | os.PathLike[str], **found: Any) -> None:
    """Adds what was found out about a finished engine to its sidecar.

    Args:
        plan_path: the plan.
        **found: keys and values.
    """
    write_json(sidecar_path(plan_path), {**(read_json(sidecar_path(plan_path)) or {}), **found})


def read_sidecar(plan_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a plan's sidecar for one of the entries that it may lack.

    Args:
        plan_path: the plan.

    Returns:
        The sidecar, without entries that are not in our form; {} if it is missing or damaged.
    """
    record = read_json(sidecar_path(plan_path), {})
    damaged = {key.split(".")[0] for key, kind in _OPTIONAL.items() if not _has(record, key, kind)}
    return {key: value for key, value in record.items() if key not in damaged}


def check_sidecar(
    plan_path: str | os.PathLike[str], backend: Backend, *, onnx_path: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Makes sure that an engine belongs to this TensorRT and GPU, and is undamaged, before it is deserialised.

    Args:
        plan_path: the engine.
        backend: the TensorRT that is to load it.
        onnx_path: a graph that the engine must have been built from; None asks nothing.

    Returns:
        The sidecar.

    Raises:
        BuildError: something does not fit; the message says what to rebuild.
    """
    plan_path = pathlib.Path(plan_path)
    if not plan_path.is_file():
        raise BuildError(f"{plan_path}: there is no such engine", fix="Build it first.")
    record = read_json(sidecar_path(plan_path))
    if record is None:
        raise BuildError(
            f"{sidecar_path(plan_path)}: missing or damaged, so nothing says what the engine runs on",
            fix="Build the engine again.",
        )
    if missing := [key for key, kind in _NEEDED.items() if not _has(record, key, kind)]:
        raise BuildError(
            f"{sidecar_path(plan_path)}: damaged: {', '.join(missing)} not in it", fix="Build the engine again."
        )
    rebuild = f"Build {record['precision']} again from {record['onnx']['path']} on this host."
    if record["backend"] != backend.name:
        raise BuildError(
            f"{plan_path}: built by {record['backend']}, to be loaded by {backend.name}",
            fix=f"Load it with {record['backend']}. {rebuild}",
        )
    if not _version_fits(record, backend.version):
        raise BuildError(
            f"{plan_path}: built by {backend.name} {record['version']}, here is {backend.version}", fix=rebuild
        )
    if backend.gpu is not None and not _arch_fits(record, backend.gpu.arch):
        raise BuildError(
            f"{plan_path}: built for {', '.join(map(str, record['targets']))}, here is {backend.gpu.arch} "
            f"({backend.gpu.name})",
            fix=rebuild,
        )
    if (found := hash_file(plan_path)) != record["plan"]["sha256"]:
        raise BuildError(
            f"{plan_path}: its sha256 is {found[:12]}…, its sidecar says {record['plan']['sha256'][:12]}…",
            fix=f"The file is damaged. {rebuild}",
        )
    if onnx_path is not None:
        expected, got = {k: record["onnx"].get(k) for k in ("sha256", "data_sha256")}, graph_hashes(onnx_path)
        if any(expected[k] != got.get(k) for k in expected):
            raise BuildError(
                f"{plan_path}: built from another {pathlib.Path(onnx_path).name} ({expected['sha256'][:12]}…, now "
                f"{got['sha256'][:12]}…)",
                fix=rebuild,
            )
    return record


def _has(record: Any, key: str, kind: type) -> bool:
    for part in key.split("."):
        if not isinstance(record, dict) or part not in record:
            return False
        record = record[part]
    return isinstance(record, kind)


def _version_fits(record: dict[str, Any], version: str) -> bool:
    # such an engine runs on its own version and later ones of the same major
    if record["options"]["version_compatible"]:
        built, here = _numbers(record["version"]), _numbers(version)
        return built[:1] == here[:1] and bool(built) and built <= here
    return record["version"] == version


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if re.fullmatch("[0-9]{1,9}", part)]


def _arch_fits(record: dict[str, Any], arch: str) -> bool:
    if record["options"]["hardware_compatible"] and record["backend"] != "rtx" and int(arch[2:]) >= _AMPERE:
        return True
    return arch in record["targets"]
