"""Removes files of earlier or killed conversions that this one does not write, so that nobody takes them for its
own."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Mapping

from vit_convert.core.bundle import Bundle, read_json
from vit_convert.core.errors import ConvertError
from vit_convert.core.lock import hold
from vit_convert.core.manifest import Files
from vit_convert.core.pair import TOWERS

# Names of unfinished files from `atomic` and the like; the last two are from version 0.1.
_TEMPORARY = (".*.tmp", ".*.onnx.????????", ".switched.*")
_LOWERINGS = ("lowerings", "spellings")  # the second is its name in earlier versions
_FOLDERS = (".", *_LOWERINGS, "engines/*", "tune/*", "timing")
# Every file that a stage writes; a user's own files have other names.
_OF_STAGES = (
    *("model.onnx", "model.onnx.data", "model.*.onnx", "model.*.onnx.data"),
    *(f"{folder}/*{end}" for folder in _LOWERINGS for end in (".onnx", ".onnx.data", ".ranges.json")),
    *(
        "signature.json",
        "reference.npz",
        "reference.*x*.npz",
        "evaluation_images.npy",
        "evaluation_labels.npy",
        "evaluation_logits.npy",
        "evaluation_embeddings.npy",
        "evaluation_tokens.npy",
    ),
    *(
        "calibration_images.npy",
        "calibration_labels.npy",
        "calibration_tokens.npy",
        "calibration.json",
        "calibration.cache",
        "calibration.cache.json",
    ),
    *("sensitivity.json", "sensitivity.png", "plan_search.json", "precision_plan.json"),
    "pair.json",
)
_PLANS = ("engines/*/*.plan", "tune/*/*.plan")


def remove_temporaries(bundle: Bundle) -> None:
    """Removes unfinished files of killed runs; only the holder of the bundle's lock may do so."""
    for folder in _FOLDERS:
        for pattern in _TEMPORARY:
            for path in bundle.root.glob(f"{folder}/{pattern}"):
                _remove(path)


def tidy(bundle: Bundle) -> None:
    """Removes what a killed process left in a bundle: its lock and its unfinished files; nothing while another process
    works there.

    Args:
        bundle: of a model or a pair; its folder need not exist.
    """
    for folder in (bundle.root, *(bundle.root / tower for tower in TOWERS)):
        if folder.is_dir():
            part = Bundle(folder)
            with contextlib.suppress(ConvertError, OSError), hold(part, "tidying up after a process that ended"):
                remove_temporaries(part)


def remove_leftovers(bundle: Bundle, files: Files) -> list[pathlib.Path]:
    """Removes files that no stage of this conversion wrote, engines of other graphs, and their measurements.

    Engines that a GPU host built, and their measurements, stay as long as their graph does.

    Args:
        bundle: its lock is held.
        files: of the finished stages.

    Returns:
        The files that were removed.
    """
    gone = [path for pattern in _OF_STAGES for path in bundle.root.glob(pattern) if path not in files]
    for pattern in _PLANS:
        for plan in bundle.root.glob(pattern):
            if not is_of(files, bundle, plan):
                gone += [plan, *plan.parent.glob(f"{plan.name}.*")]
    graph = files.graph_hashes(bundle.onnx())
    for record in (bundle.benchmark, bundle.tuning):
        if record.exists() and (not graph or (read_json(record) or {}).get("onnx") != graph):
            gone += [record, record.with_suffix(".png")]
    if bundle.pair in gone:  # and its towers, each a bundle of its own
        gone += [folder for tower in TOWERS if ((folder := bundle.root / tower) / bundle.manifest.name).is_file()]
    for path in gone:
        _remove(path)
    return gone


def is_of(files: Files, bundle: Bundle, plan: pathlib.Path) -> bool:
    """Whether an engine was built from a graph of this conversion, by its sidecar."""
    graph = built_from(plan)
    return graph is not None and graph.hashes in [
        files.graph_hashes(folder / graph.name) for folder in (bundle.root, bundle.lowerings)
    ]


@dataclasses.dataclass(frozen=True)
class SourceGraph:
    """The graph that an engine was built from.

    Attributes:
        name: of its file.
        hashes: of the file and of its weights, as `Files.graph_hashes` gives them.
    """

    name: str
    hashes: Mapping[str, str]


def built_from(plan: pathlib.Path) -> SourceGraph | None:
    """The graph that an engine's sidecar names; None if it names none."""
    record = read_json(plan.with_name(f"{plan.name}.json"))
    graph = record.get("onnx") if isinstance(record, dict) else None
    if (
        not isinstance(graph, dict)
        or not isinstance(graph.get("path"), str)
        or not isinstance(graph.get("sha256"), str)
    ):
        return None
    return SourceGraph(graph["path"], {key: graph[key] for key in ("sha256", "data_sha256") if graph.get(key)})


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
