"""Digests of the graphs that a conversion writes: which bytes changed, when nothing was meant to.

A change that is meant rewrites them, and its commit says why:

    python tests/export/digests.py

Nothing here is computed by a sum on the processor (no reference, no calibration, no random normal numbers), so that the
digests are the same on each; weights and ranges are made from the names of what they are of.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from vit_convert.core.errors import ExportError
from vit_convert.core.model import Model
from vit_convert.export import exporter
from vit_convert.export.passes.fused_encoder import quantized_tensors
from vit_convert.export.targets import LOWERINGS, TARGETS, lowering_named, target_named
from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint
from vit_convert.families.vit.model import vit_model
from vit_convert.quantize.calibrate import Calibration
from vit_convert.quantize.half_precision import to_bf16, to_fp16
from vit_convert.quantize.placement import place
from vit_convert.quantize.qdq import quantize

FILE = pathlib.Path(__file__).with_name("digests.json")
PIXELS = np.array([1 / 64, 1 / 64, 1 / 32], np.float32), np.array([-2, -1.5, -2], np.float32)  # any scale and offset
_INLINE_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the forms in which it is exported.

    Attributes:
        variant: of the checkpoint.
        checkpoint: options of `write_random_checkpoint`.
        loading: options of `load_checkpoint`.
        export: options of `export_model` besides the target.
        targets: names of the targets.
        lowerings: whether the targets' further lowerings are wanted too.
        lowered: whether graphs with Q/DQ pairs and typed ones are wanted too.
    """

    variant: str = "mu/16"
    checkpoint: dict[str, Any] = dataclasses.field(default_factory=dict)
    loading: dict[str, Any] = dataclasses.field(default_factory=dict)
    export: dict[str, Any] = dataclasses.field(default_factory=dict)
    targets: tuple[str, ...] = ("trt8", "rtx")  # one of each kind
    lowerings: bool = False
    lowered: bool = False


_SMALL = {"image_size": (64, 64), "num_classes": 10, "depth": 3}
CASES = {
    "mu/16": Case(checkpoint={"image_size": (64, 64), "num_classes": 10}, targets=tuple(TARGETS), lowered=True),
    "tok": Case(checkpoint=_SMALL, lowerings=True, lowered=True),
    "gap": Case("mu/16-gap-norep", _SMALL),
    "map": Case(checkpoint={**_SMALL, "pool": "map", "layout": "big_vision", "prefix": "params/"}, lowered=True),
    "scan": Case(checkpoint={**_SMALL, "layout": "big_vision_scan", "pre_logits": True}),
    "resampled": Case(
        checkpoint={**_SMALL, "layout": "big_vision_old"}, loading={"image_size": (48, 80), "outputs": "features"}
    ),
    "dynamic": Case(checkpoint=_SMALL, export={"dynamic_patch": 16}, targets=("rtx",), lowered=True),
    "uint8": Case(checkpoint=_SMALL, export={"pixels": PIXELS}, lowered=True),
    "NCHW": Case(checkpoint=_SMALL, export={"layout": "NCHW"}),
    "all of these": Case(
        checkpoint=_SMALL, export={"pixels": PIXELS, "layout": "NCHW", "dynamic_patch": 16}, targets=("rtx",)
    ),
    "taps": Case(checkpoint=_SMALL, export={"taps": True}),
    "Ti/16": Case("Ti/16", lowerings=True, lowered=True),
    "B/32": Case("B/32", {"depth": 3}, lowerings=True),  # the width is what differs from the others
}
QUICK = ("mu/16", "tok", "dynamic", "all of these")


def synthetic(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that tell one element and one name from another: multiples of 1/256 below 1/2, exact in every float
    type."""
    count = np.arange(np.prod(shape, dtype=np.int64), dtype=np.uint32) + np.uint32(zlib.crc32(name.encode()))
    return (((count * np.uint32(2654435761)) >> np.uint32(24)).astype(np.float32).reshape(shape) - 128) / 256


def range_of(tensor: str) -> float:
    """A threshold for a tensor, from its name: 1 to 17."""
    return 1 + zlib.crc32(tensor.encode()) % 4096 / 256


@functools.cache
def model_of(name: str) -> Model:
    """The model of a case, through the loader of checkpoints."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "random.npz"
        write_random_checkpoint(path, case.variant, **case.checkpoint)
        with np.load(path) as file:
            shapes = {member: file[member].shape for member in file.files}
        np.savez(path, **{member: synthetic(member, shape) for member, shape in shapes.items()})
        checkpoint = load_checkpoint(path, **case.loading)
        params = {leaf: np.array(checkpoint.params[leaf]) for leaf in checkpoint.params}
    return vit_model(checkpoint.architecture, params)


@contextlib.contextmanager
def caught_graphs() -> Iterator[list[ir.Model]]:
    """The graphs that `export_model` gives to be saved, which are not."""
    graphs: list[ir.Model] = []

    def catch(model: ir.Model, path: pathlib.Path) -> None:
        graphs.append(model)
        path.touch()

    real, exporter.save_onnx = exporter.save_onnx, catch  # type: ignore[assignment]
    try:
        yield graphs
    finally:
        exporter.save_onnx = real


def exported(name: str, target: str, lowering: str = "") -> ir.Model:
    """The graph of a case as it would be saved."""
    model = model_of(name)
    wanted = (
        lowering_named(target, lowering)
        if lowering
        else target_named(target, dynamic="dynamic_patch" in CASES[name].export)
    )
    with caught_graphs() as graphs, tempfile.TemporaryDirectory() as folder:
        exporter.export_model(model, pathlib.Path(folder) / "model.onnx", target=wanted, **CASES[name].export)
    return graphs[0]


def digests_of(name: str) -> dict[str, str]:
    """The digest of every graph of a case, by "trt8", "trt8/plugin", "trt8 int8", …"""
    case, found = CASES[name], {}
    for target in case.targets:
        graph = exported(name, target)
        found[target] = digest(graph)
        found |= {f"{target} {kind}": value for kind, value in _lowered(graph, target).items()} if case.lowered else {}
        for lowering in LOWERINGS.get(target, {}) if case.lowerings else ():
            try:
                graph = exported(name, target, lowering)
            except ExportError:  # it is not for such a model; which ones are, the names of the digests tell
                continue
            found[f"{target}/{lowering}"] = digest(graph)
            if lowering == "fused":
                found[f"{target}/{lowering} ranges"] = _sha256(json.dumps(quantized_tensors(graph)).encode())
    return found


def _lowered(graph: ir.Model, target: str) -> dict[str, str]:
    def quantized(precision: str, *, attention: bool) -> ir.Model:
        sites = place(graph, attention=attention).sites
        ranges = {site.tensor: range_of(site.tensor) for site in sites}
        return quantize(graph, Calibration(ranges, ranges, "minmax", 1, {}), sites, target=target, precision=precision)

    int8 = quantized("int8", attention=True)
    found = {"int8 pairs": digest(int8)}
    if target == "trt8":
        return found
    typed = {
        "int8": to_fp16(int8, amax=dict.fromkeys(_names(int8)[:3], 1e5)).model,
        "fp8": to_fp16(quantized("fp8", attention=False)).model,
        "bf16": to_bf16(graph).model,
    }
    return found | {kind: digest(model) for kind, model in typed.items()}


def _names(model: ir.Model) -> list[str]:
    return [value.name or "" for node in model.graph for value in node.outputs]


def digest(model: ir.Model) -> str:
    """The sha256 of a graph's bytes, in which larger weights are named, and of the values of these."""
    hashed = hashlib.sha256()
    weights = [value for value in model.graph.initializers.values() if value.const_value is not None]
    tensors = [value.const_value for value in weights]
    try:
        for value, tensor in zip(weights, tensors):
            if tensor.nbytes > _INLINE_BYTES:
                hashed.update(tensor.tobytes())
                value.const_value = ir.ExternalTensor(
                    "weights", None, None, tensor.dtype, shape=tensor.shape, name=value.name or ""
                )
        hashed.update(ir.to_proto(model).SerializeToString(deterministic=True))
    finally:
        for value, tensor in zip(weights, tensors):
            value.const_value = tensor
    return hashed.hexdigest()


def file_digests(folder: pathlib.Path) -> dict[str, str]:
    """The digests of the files that are written for the smallest model."""
    model = model_of("mu/16")
    found = {}
    for target in TARGETS:
        path = folder / f"{target}.onnx"
        exporter.export_model(model, path, target=target_named(target))
        found |= {file.name: _sha256(file.read_bytes()) for file in (path, path.with_name(f"{path.name}.data"))}
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    """Rewrites the digests."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: digests_of(name) for name in CASES} | {"files of mu/16": file_digests(pathlib.Path(folder))}
    FILE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
