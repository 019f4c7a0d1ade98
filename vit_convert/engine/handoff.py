"""What the export side found out about a model, read from its bundle: enough to build and judge engines on a host
without JAX."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import ml_collections

from vit_convert.core import config as configs
from vit_convert.core.benchmark_results import MeasuredModel
from vit_convert.core.bundle import Bundle, hash_value, read_json
from vit_convert.core.check_results import GraphCheck, QuantizeResult
from vit_convert.core.dialect import Dialect, dialect_named
from vit_convert.core.earlier import read_signature
from vit_convert.core.errors import BuildError, UsageError
from vit_convert.core.manifest import Files, Manifest
from vit_convert.core.pair import TOWERS, is_pair
from vit_convert.core.record import RecordError
from vit_convert.core.signature import Signature
from vit_convert.core.stage_results import CheckpointResult, ExportResult, ReferenceResult
from vit_convert.core.text_length import Sizes


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known about a bundle's model.

    Attributes:
        image_size: (height, width) in pixels, or the range that a dynamic graph takes, of image sizes or text lengths;
            () if it takes no images, and texts of one length.
        signature: inputs and outputs of its graphs, and how outputs are judged.
        preprocess: the preprocessing record.
        dialect: of the graphs.
        lowering: the graph that `engine.lowering=auto` builds fp16 engines from; "" for model.onnx.
        int8_lowering: the lowering that `engine.int8_lowering=auto` stands for in a plan; "" for the graph with Q/DQ.
        top1: JAX's top-1 on the labelled evaluation images in percent; None without such images.
        checks: by precision, the export side's check of its graph.
        files: written by the conversion, which may be read.
        patches: (how many, side in pixels) that images of any aspect are cut into; (0, 0) where they are not.
    """

    image_size: Sizes
    signature: Signature
    preprocess: Mapping[str, Any]
    dialect: Dialect
    lowering: str
    top1: float | None
    checks: Mapping[str, GraphCheck]
    files: Files
    int8_lowering: str = ""
    patches: tuple[int, int] = (0, 0)

    @property
    def output(self) -> str:
        """The name of the output that represents the model where a single number is shown."""
        return self.signature.outputs[0].name


def open_bundle(path: str) -> Bundle:
    """Opens a bundle that exists.

    Raises:
        UsageError: the folder is not a bundle, or holds two of them.
    """
    if is_pair(path):
        places = " or ".join(os.path.join(path, tower) for tower in TOWERS)
        raise UsageError(f"{path}: a pair of towers, which are two bundles", fix=f"Give {places}.")
    if not os.path.isfile(os.path.join(path, "manifest.json")):
        raise UsageError(
            f"{path}: holds no manifest.json, so it is not a bundle",
            fix="Give the folder that a conversion wrote, <workdir>/<name>.",
        )
    return Bundle(path)


def read_facts(bundle: Bundle) -> Facts:
    """Reads a bundle's manifest.

    Raises:
        UsageError: the conversion has not got far enough.
    """
    manifest = Manifest.read(bundle)
    for name in ("checkpoint", "export"):
        if not manifest.finished(name):
            raise UsageError(
                f"{bundle.manifest}: stage {name} is not done", fix="Finish the conversion, at least --until=check."
            )
    try:
        checkpoint = CheckpointResult.from_dict(manifest.result("checkpoint"))
        export = ExportResult.from_dict(manifest.result("export"))
        reference = ReferenceResult.from_dict(manifest.result("reference"))
        checks = _checks(manifest)
    except RecordError as e:
        raise UsageError(f"{bundle.manifest}: {e}", fix="Copy the whole bundle, or convert again.") from e
    return Facts(
        image_size=checkpoint.sizes,
        signature=read_signature(bundle, checkpoint, read_json(bundle.config) or {}),
        preprocess=checkpoint.preprocess,
        dialect=dialect_named(export.target),
        lowering=export.lowering,  # "" in bundles of earlier versions
        int8_lowering=export.int8_lowering,
        top1=reference.top1,
        checks=checks,
        files=manifest.files,
        patches=(checkpoint.patches, checkpoint.patch_size) if checkpoint.patches else (0, 0),
    )


def _checks(manifest: Manifest) -> dict[str, GraphCheck]:
    found = manifest.result("check")
    of_fp32 = {"fp32": GraphCheck.from_dict(found)} if found else {}
    return {**of_fp32, **QuantizeResult.from_dict(manifest.result("quantize")).checks}


def require_graph_of(facts: Facts, path: str | os.PathLike[str]) -> None:
    """Refuses a graph in the bundle that its conversion did not write: it is from an earlier one, or a copy was
    interrupted.

    Raises:
        BuildError: see above.
    """
    if wrong := facts.files.wrong_graph(path):
        raise BuildError(wrong, fix="Convert again, with this precision in config.precision, or copy the whole bundle.")


def judged_by(bundle: Bundle) -> str:
    """The hash of what a bundle's engines are compared with: JAX's outputs, and the labelled images."""
    records = Manifest.read(bundle).files.records
    judging = {path: record.sha256 for path, record in records.items() if path.startswith(("reference", "evaluation"))}
    return hash_value(judging)


def describe_model(bundle: Bundle) -> MeasuredModel:
    """Describes the model that a bundle's engines are measured for.

    Args:
        bundle: converted.

    Returns:
        What is known about its checkpoint, and the last command that ran a stage of the conversion.
    """
    manifest = Manifest.read(bundle)
    found = manifest.result("checkpoint")
    known = {key: found[key] for key in ("variant", "summary", "sha256") if key in found}
    return MeasuredModel(**known, converted_by=manifest.command)


def read_config(bundle: Bundle) -> ml_collections.ConfigDict:
    """Reads the config of a bundle's conversion.

    Raises:
        UsageError: it is missing, or written by a version with other keys.
    """
    found = read_json(bundle.config)
    if found is None:
        raise UsageError(f"{bundle.config}: missing or damaged", fix="Convert again.")
    return configs.complete(ml_collections.ConfigDict(found), bundle.root.name)
