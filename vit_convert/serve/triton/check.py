"""Checks a repository without a server: with Triton's protobuf, and for faults that only a server or a request would
reveal."""

import json
import math
import os
import pathlib
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.core.bundle import hash_file
from vit_convert.core.errors import ConvertError, UsageError
from vit_convert.engine.backend.sidecar import Sidecar, TensorRecord, read_sidecar
from vit_convert.engine.inspection.command import require_weights
from vit_convert.engine.inspection.onnx_wire import read_graph
from vit_convert.serve.triton import parse
from vit_convert.serve.triton.parts import CALLS

_FILES = {"tensorrt": "model.plan", "onnxruntime": "model.onnx", "python": "model.py"}
_FIX = (
    "Make an environment of its own, install the extra `triton` there, and give it as --environment: docs/serving.md."
)

Config = Mapping[str, Any]


def check_repository(root: str | os.PathLike[str], environment: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Checks all models of a repository.

    Args:
        root: of the repository.
        environment: a Python environment with the extra `triton`.

    Returns:
        For each config, "model" or "model/configs/cpu", what is wrong with it.

    Raises:
        UsageError: the environment cannot read configs, or the repository holds no model.
    """
    root = pathlib.Path(root)
    paths = sorted([*root.glob("*/config.pbtxt"), *root.glob("*/configs/*.pbtxt")])
    if not paths:
        raise UsageError(f"{root}: no folder in it holds a config.pbtxt", fix="Give the folder that --output wrote.")
    parsed = _parsed(paths, pathlib.Path(environment))
    models = {
        path.parent.name: found.get("config", {}) for path, found in parsed.items() if path.name == "config.pbtxt"
    }
    return {_name(root, path): _faults(path, found, models) for path, found in parsed.items()}


def _name(root: pathlib.Path, path: pathlib.Path) -> str:
    relative = path.relative_to(root)
    return relative.parent.as_posix() if path.name == "config.pbtxt" else relative.with_suffix("").as_posix()


def _parsed(paths: Sequence[pathlib.Path], environment: pathlib.Path) -> dict[pathlib.Path, dict[str, Any]]:
    python = environment / "bin" / "python"
    if not python.exists():
        raise UsageError(f"--environment={environment}: holds no bin/python", fix=_FIX)
    done = subprocess.run([python, parse.__file__, *map(str, paths)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(f"--environment={environment}: cannot read configs ({last})", fix=_FIX)
    return {pathlib.Path(path): found for path, found in json.loads(done.stdout).items()}


def _faults(path: pathlib.Path, found: Mapping[str, Any], models: Mapping[str, Config]) -> list[str]:
    if "error" in found:
        return [found["error"]]
    config, folder = found["config"], path.parent if path.name == "config.pbtxt" else path.parents[1]
    every = [
        _of_config(config, folder),
        _of_files(config, folder),
        _of_steps(config, models),
        _of_calls(config, models),
    ]
    return [fault for faults in every for fault in faults]


def _of_config(config: Config, folder: pathlib.Path) -> Iterator[str]:
    if config.get("name", folder.name) != folder.name:
        yield f"name {config['name']!r}, the folder is {folder.name!r}"
    if not config.get("backend") and config.get("platform") != "ensemble":
        yield "neither a backend nor an ensemble"
    for field in ("input", "output"):
        names = [tensor.get("name", "") for tensor in config.get(field, [])]
        if not names:
            yield f"no {field}"
        if len(set(names)) < len(names):
            yield f"{field}: {names} name one tensor twice"
        if "" in names:
            yield f"{field}: one has no name"
        yield from (
            f"{field} {tensor.get('name')}: no dims" for tensor in config.get(field, []) if not tensor.get("dims")
        )
    largest = config.get("max_batch_size", 0)
    batching = config.get("dynamic_batching", {})
    for size in batching.get("preferred_batch_size", []):
        if not 1 <= size <= largest:
            yield f"preferred_batch_size {size}, max_batch_size is {largest}"
    for group in config.get("instance_group", []):
        if group.get("count", 1) < 1:
            yield f"instance_group count {group['count']}"
        if config.get("backend") == "tensorrt" and group.get("kind") == "KIND_CPU":
            yield "instance_group kind KIND_CPU: TensorRT runs on a GPU"
    for spec in config.get("optimization", {}).get("cuda", {}).get("graph_spec", []):
        if not 1 <= spec.get("batch_size", 0) <= max(1, largest):
            yield f"graph_spec batch_size {spec.get('batch_size', 0)}, max_batch_size is {largest}"
    for sample in config.get("model_warmup", []):
        if sample.get("batch_size", 0) > largest:
            yield f"model_warmup {sample.get('name')}: batch_size {sample['batch_size']}, max_batch_size is {largest}"


def _of_files(config: Config, folder: pathlib.Path) -> Iterator[str]:
    versions = [entry for entry in folder.iterdir() if entry.is_dir() and re.fullmatch("[1-9][0-9]*", entry.name)]
    if not versions:
        yield "no version folder (1, 2, …)"
    default = config.get("default_model_filename") or _FILES.get(config.get("backend", ""), "")
    by_capability = config.get("cc_model_filenames", {})
    named = "" if by_capability and not config.get("default_model_filename") else default
    wanted = {named, *by_capability.values()} - {""}
    latest = sorted(versions, key=lambda entry: int(entry.name))[-1:]
    for version in latest:
        yield from (
            f"{version.name}/{name}: there is no such file" for name in sorted(wanted) if not (version / name).exists()
        )
    for output in config.get("output", []):
        if name := output.get("label_filename"):
            yield from _of_labels(folder / name, output)
    for sample in config.get("model_warmup", []):
        for value in sample.get("inputs", {}).values():
            name = value.get("input_data_file")
            if name:
                yield from _of_sample(f"model_warmup {sample.get('name')}", folder / "warmup" / name, value)
    for version in latest:
        for name in sorted(wanted):
            if config.get("backend") == "tensorrt":
                yield from _of_plan(config, version / f"{name}.json", by_capability, name)
            elif config.get("backend") == "onnxruntime":
                yield from _of_graph(version / name)
        if config.get("backend") == "tensorrt":
            yield from _of_versions([version / f"{name}.json" for name in sorted(wanted)])


def _of_sample(where: str, path: pathlib.Path, value: Config) -> Iterator[str]:
    from vit_convert.serve.triton.pbtxt import TYPES

    if not path.is_file():
        yield f"{where}: there is no warmup/{path.name}"
        return
    dtype = next((name for name, kind in TYPES.items() if kind == value.get("data_type")), "bytes")
    sides = [int(side) for side in value.get("dims", [])]
    if dtype in ("bytes", "bfloat16") or any(side < 0 for side in sides):
        return  # the size follows from its content
    wanted = math.prod(sides) * np.dtype(dtype).itemsize
    if path.stat().st_size < wanted:
        yield f"{where}: warmup/{path.name} has {path.stat().st_size} bytes, a sample has {wanted}"


def _of_graph(path: pathlib.Path) -> Iterator[str]:
    """A graph that is read, with the files that hold its weights."""
    path = path / path.name if path.is_dir() else path
    if not path.exists():
        return  # said already
    try:
        require_weights(path, read_graph(path))
    except ConvertError as e:
        yield str(e).replace(f"{path.parent}{os.sep}", "")


def _of_versions(sidecars: Sequence[pathlib.Path]) -> Iterator[str]:
    """One server has one TensorRT, so the plans of a model are built by one."""
    plans = [path.with_suffix("") for path in sidecars]
    records = {plan.name: read_sidecar(plan) for plan in plans}
    versions = {name: record.version for name, record in records.items() if record is not None}
    if len(set(versions.values())) > 1:
        built = ", ".join(f"{name} by {version}" for name, version in versions.items())
        yield f"plans of several versions of TensorRT: {built}"


def _of_labels(path: pathlib.Path, output: Config) -> Iterator[str]:
    if not path.is_file():
        yield f"{path.name}: there is no such file"
        return
    lines, classes = len(path.read_text(encoding="utf-8").splitlines()), int([-1, *output.get("dims", [])][-1])
    if classes not in (lines, -1):
        yield f"{path.name}: {lines} lines, {output.get('name')} has {classes} classes"


def _of_plan(config: Config, sidecar: pathlib.Path, by_capability: Mapping[str, str], name: str) -> Iterator[str]:
    """Compares an engine's config with its sidecar: inputs, outputs, batches, profiles, and where it runs."""
    try:
        record = Sidecar.from_dict(json.loads(sidecar.read_text(encoding="utf-8")))
        largest = max(next(iter(profile.values()), ())[2][0] for profile in record.profiles)
    except (OSError, ValueError, IndexError, RecursionError):  # a RecordError is a ValueError
        yield f"{sidecar.name}: missing or damaged, so nothing says what the engine takes"
        return
    plan = sidecar.with_suffix("")
    if plan.is_file() and hash_file(plan) != (record.plan.sha256 if record.plan else ""):
        yield f"{plan.name}: is not the engine that its sidecar describes"
    if config.get("max_batch_size", 0) > largest:
        yield f"max_batch_size {config['max_batch_size']}, the engine takes {largest}"
    for group in config.get("instance_group", []):
        yield from (
            f"profile {p}, the engine has {len(record.profiles)}"
            for p in group.get("profile", [])
            if not (p.isdecimal() and int(p) < len(record.profiles))
        )
    archs = {f"{arch[2:-1]}.{arch[-1]}" for arch in record.targets}
    for capability in (key for key, value in by_capability.items() if value == name):
        if capability not in archs:
            yield f"cc_model_filenames {capability}: {name} runs on {', '.join(sorted(archs))}"
    for field, tensors in (("input", record.inputs), ("output", record.outputs)):
        known = {tensor.name: tensor for tensor in tensors}
        for tensor in config.get(field, []) if known else ():
            yield from _of_tensor(field, tensor, known.get(tensor.get("name", "")))


def _of_tensor(field: str, tensor: Config, known: TensorRecord | None) -> Iterator[str]:
    from vit_convert.serve.triton.pbtxt import TYPES

    name = tensor.get("name", "")
    if known is None:
        yield f"{field} {name}: the engine has none of this name"
        return
    if tensor.get("data_type") != TYPES.get(known.dtype):
        yield f"{field} {name}: {tensor.get('data_type')}, the engine's is {known.dtype}"
    if [int(side) for side in tensor.get("dims", [])] != list(known.shape[1:]):
        yield f"{field} {name}: dims {tensor.get('dims')}, the engine's are {list(known.shape[1:])}"


def _of_steps(config: Config, models: Mapping[str, Config]) -> Iterator[str]:
    steps = config.get("ensemble_scheduling", {}).get("step", [])
    made = _by_name(config.get("input", []))
    for step in steps:
        name = step.get("model_name", "")
        model = models.get(name)
        if model is None:
            yield f"step {name}: the repository has no such model"
            return
        yield from _of_maps(step, model, made, config)
    for output in config.get("output", []) if steps else ():
        if (name := output.get("name", "")) not in made:
            yield f"output {name}: no step gives it"
        elif any(made[name].get(key) != output.get(key) for key in ("data_type", "dims")):
            kinds = [
                f"{row.get('data_type')} {', '.join(map(str, row.get('dims', [])))}" for row in (output, made[name])
            ]
            yield f"output {name}: {kinds[0]}, the step that makes it gives {kinds[1]}"


def _by_name(tensors: Sequence[Config]) -> dict[str, Config]:
    return {tensor.get("name", ""): tensor for tensor in tensors}


def _of_calls(config: Config, models: Mapping[str, Config]) -> Iterator[str]:
    """The models that one of our models calls while it answers: `calls` in its parameters."""
    called = config.get("parameters", {}).get(CALLS, {}).get("string_value", "")
    yield from (f"asks {name}: the repository has no such model" for name in called.split() if name not in models)


def _of_maps(step: Config, model: Config, made: dict[str, Config], config: Config) -> Iterator[str]:
    name = step["model_name"]
    inputs, outputs = _by_name(model.get("input", [])), _by_name(model.get("output", []))
    if model.get("max_batch_size", 0) < config.get("max_batch_size", 0):
        yield f"max_batch_size {config['max_batch_size']}, step {name} takes {model.get('max_batch_size', 0)}"
    for own, known in step.get("input_map", {}).items():
        if own not in inputs:
            yield f"step {name}: has no input {own}"
        elif known not in made:
            yield f"step {name}: {known} is given by no step before it"
        elif made[known].get("data_type") != inputs[own].get("data_type"):
            yield f"step {name}: {own} is {inputs[own].get('data_type')}, {known} is {made[known].get('data_type')}"
    yield from (f"step {name}: input {own} is given nothing" for own in inputs if own not in step.get("input_map", {}))
    for own, known in step.get("output_map", {}).items():
        if own not in outputs:
            yield f"step {name}: has no output {own}"
        else:
            made[known] = outputs[own]
