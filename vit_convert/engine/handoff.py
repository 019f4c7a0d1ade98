"""What the export side found out about a model, read from its bundle: enough to build and to judge engines on a host
without JAX."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import ml_collections

from vit_convert.core import config as configs
from vit_convert.core.bundle import Bundle, hash_value, read_json
from vit_convert.core.dialect import Dialect, dialect_named
from vit_convert.core.earlier import read_signature
from vit_convert.core.errors import BuildError, UsageError
from vit_convert.core.image_size import ImageRange, NoSize, Size, sizes_of
from vit_convert.core.manifest import Files, Manifest
from vit_convert.core.pair import TOWERS, is_pair
from vit_convert.core.signature import Signature


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a bundle's model.

    Attributes:
        image_size: (height, width) in pixels, or the range that a dynamic graph takes; () where no images are taken.
        signature: what its graphs take and give, and how that is judged.
        preprocess: the preprocessing record.
        dialect: that the graphs are written in.
        lowering: the graph that `engine.lowering=auto` builds fp16 engines from; "" for model.onnx.
        top1: JAX's top-1 on the labelled evaluation images in percent; None without such images.
        checks: by precision, what the export side's check of its graph found.
        files: that the conversion left, and that may be read.
    """

    image_size: Size | NoSize | ImageRange
    signature: Signature
    preprocess: Mapping[str, Any]
    dialect: Dialect
    lowering: str
    top1: float | None
    checks: Mapping[str, Mapping[str, Any]]
    files: Files

    @property
    def output(self) -> str:
        """The name of the output that stands for the model where one number is shown."""
        return self.signature.outputs[0].name


def open_bundle(path: str) -> Bundle:
    """Opens a bundle that exists.

    Raises:
        UsageError: the folder is not a bundle, or it is that of two.
    """
    if is_pair(path):
        places = " or ".join(os.path.join(path, tower) for tower in TOWERS)
        raise UsageError(f"{path}: a pair of towers, which are two bundles", fix=f"Give {places}.")
    if not os.path.isfile(os.path.join(path, "manifest.json")):
        raise UsageError(
            f"{path}: holds no manifest.json, so it is no bundle",
            fix="Give the folder that a conversion wrote, <workdir>/<name>.",
        )
    return Bundle(path)


def read_facts(bundle: Bundle) -> Facts:
    """Reads a bundle's manifest.

    Raises:
        UsageError: the conversion has not come far enough.
    """
    manifest = Manifest.read(bundle)
    for name in ("checkpoint", "export"):
        if not manifest.finished(name):
            raise UsageError(
                f"{bundle.manifest}: stage {name} is not done", fix="Finish the conversion, at least --until=check."
            )
    checkpoint, export = manifest.result("checkpoint"), manifest.result("export")
    return Facts(
        image_size=sizes_of(checkpoint),
        signature=read_signature(bundle, checkpoint, read_json(bundle.config) or {}),
        preprocess=checkpoint["preprocess"],
        dialect=dialect_named(export["target"]),
        lowering=export.get("lowering", ""),  # bundles of earlier versions have none
        top1=manifest.result("reference").get("top1"),
        checks={"fp32": manifest.result("check"), **manifest.result("quantize").get("checks", {})},
        files=manifest.files,
    )


def require_graph_of(facts: Facts, path: str | os.PathLike[str]) -> None:
    """Refuses a graph in the bundle that its conversion did not make: an earlier one left it, or a copy was cut short.

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


def describe_model(bundle: Bundle) -> dict[str, Any]:
    """What a measurement of a bundle's engines is of.

    Args:
        bundle: converted.

    Returns:
        Of its checkpoint variant, summary ("ViT B/16, 86,567,656 parameters, 224x224") and sha256, those that are
        known; and converted_by, the last command that ran a stage of the conversion.
    """
    manifest = Manifest.read(bundle)
    found = manifest.result("checkpoint")
    return {
        **{key: found[key] for key in ("variant", "summary", "sha256") if key in found},
        "converted_by": manifest.command,
    }


def read_config(bundle: Bundle) -> ml_collections.ConfigDict:
    """Reads the config that a bundle was made with.

    Raises:
        UsageError: it is missing, or written by a version with other keys.
    """
    found = read_json(bundle.config)
    if found is None:
        raise UsageError(f"{bundle.config}: missing or damaged", fix="Convert again.")
    return configs.complete(ml_collections.ConfigDict(found), bundle.root.name)
