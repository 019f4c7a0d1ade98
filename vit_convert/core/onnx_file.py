"""ONNX files on disk: written whole with their weights beside them, and run with any inner value as an output."""

import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_convert.core.bundle import disk_errors, temporary_beside, utf8_path
from vit_convert.core.errors import ExportError
from vit_convert.core.ort_options import providers_for, session_options

Batch = np.ndarray | Mapping[str, np.ndarray]
"""What a graph takes: an array, or {input: array}."""

if TYPE_CHECKING:
    import onnx_ir as ir

# metadata key of graphs whose nodes outside the blocks keep their precision by default
BLOCKS_ALONE = "vit_convert.blocks"
# metadata key of graphs whose blocks give other values than the model's, since their residual stream is rotated
ROTATED = "vit_convert.rotated"
_INLINE_BYTES = 1024  # smaller constants stay in the graph, where a reader sees them


def save_onnx(model: "ir.Model", path: str | os.PathLike[str]) -> None:
    """Writes a graph and, beside it as `<path>.data`, its weights, each of which is computed only when it is written.

    Both files appear whole or not at all: they are written into a temporary folder beside the target and then renamed,
    the weights first.

    Args:
        model: the graph; lazy tensors are evaluated one at a time.
        path: the `.onnx` file.

    Raises:
        UsageError: the disk is full.
        ExportError: the graph does not pass onnx.checker.
    """
    import onnx
    import onnx_ir as ir

    path = pathlib.Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = temporary_beside(path)
        folder.mkdir()
        try:
            ir.save(model, folder / path.name, external_data=f"{path.name}.data", size_threshold_bytes=_INLINE_BYTES)
            onnx.checker.check_model(utf8_path(folder / path.name), full_check=True)
            data = folder / f"{path.name}.data"
            if data.stat().st_size:
                os.replace(data, path.with_name(data.name))
            else:  # all constants are in the graph: an existing file belongs to an earlier graph
                path.with_name(data.name).unlink(missing_ok=True)
            os.replace(folder / path.name, path)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
            raise ExportError(f"{path}: onnx.checker refuses the graph: {e}") from e
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def external_files(path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The files of an ONNX model: the graph, and its weights if they lie beside it."""
    path = pathlib.Path(path)
    data = path.with_name(path.name + ".data")
    return [path, data] if data.exists() else [path]


def is_rotated(path: str | os.PathLike[str]) -> bool:
    """Whether the blocks of a graph give other values than the model's."""
    return any(entry.key == ROTATED for entry in read_graph(path).metadata_props)


def read_graph(path: str | os.PathLike[str]) -> Any:
    """The onnx.ModelProto of a file, without the weights that lie beside it."""
    import onnx

    return onnx.load(os.fspath(path), load_external_data=False)


def open_session(
    path: str | os.PathLike[str], extra_outputs: Sequence[str] = (), *, threads: int = 0, proto: Any = None
) -> Any:
    """Opens an onnxruntime CPU session on a graph, optionally with inner values as further outputs.

    Only the graph is read and extended in memory. Its weights stay in their file, and nothing is copied on disk.

    Args:
        path: the `.onnx` file.
        extra_outputs: names of inner values to return as well.
        threads: intra-op threads; 0 for all cores.
        proto: what `read_graph` gives, if it was read already; it is extended.

    Returns:
        An onnxruntime.InferenceSession; its outputs are the graph's, then `extra_outputs`.

    Raises:
        ExportError: a name is not in the graph, or onnxruntime cannot load the model.
    """
    import onnx

    path, proto = pathlib.Path(path), read_graph(path) if proto is None else proto
    known = {name for node in proto.graph.node for name in node.output} | {v.name for v in proto.graph.input}
    present = {v.name for v in proto.graph.output}
    for name in extra_outputs:
        if name not in known:
            raise ExportError(f"{path}: no value {name!r} in the graph")
        if name not in present:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))  # onnxruntime infers type and shape
    try:
        return open_proto(proto, path.parent, threads=threads)
    except Exception as e:
        raise ExportError(f"{path}: onnxruntime cannot load the graph: {e}") from e


def open_proto(proto: Any, folder: str | os.PathLike[str], *, threads: int = 0, device: str = "cpu") -> Any:
    """Opens an onnxruntime session on a graph in memory whose weights lie in a folder.

    Args:
        proto: an onnx.ModelProto.
        folder: holds the external data that it names.
        threads: intra-op threads; 0 for all cores.
        device: "cpu", "cuda" or "auto"; see `providers_for`.

    Returns:
        An onnxruntime.InferenceSession.

    Raises:
        UsageError: the device is not there.
    """
    import onnxruntime as ort

    options = session_options(ort)
    options.intra_op_num_threads = threads
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", utf8_path(pathlib.Path(folder).resolve())
    )
    # Packed copies of the weights would double the memory for only a handful of runs.
    options.add_session_config_entry("session.disable_prepacking", "1")
    # Threads that spin while waiting for the next node take cores from concurrent conversions.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(proto.SerializeToString(), options, providers=providers_for(ort, device))


def feeds_of(session: Any, inputs: Batch) -> dict[str, np.ndarray]:
    """The inputs of a session by name; a bare array is its only input, or the first of several."""
    return dict(inputs) if isinstance(inputs, Mapping) else {session.get_inputs()[0].name: inputs}


def run_session(session: Any, inputs: Batch, names: Sequence[str] | None = None) -> Mapping[str, np.ndarray]:
    """Runs a session on one batch.

    Args:
        session: from `open_session`.
        inputs: the batch, in the dtype and layout of the graph's only input; or {input: array}.
        names: outputs to return; None for all.

    Returns:
        {output name: array}.

    Raises:
        ExportError: onnxruntime fails, for example because the graph cannot take the batch size that it declares.
    """
    names = list(names) if names is not None else [output.name for output in session.get_outputs()]
    feeds = feeds_of(session, inputs)
    try:
        return dict(zip(names, session.run(names, feeds)))
    except Exception as e:  # onnxruntime's exceptions have no common base class
        shown = ", ".join(f"{value.dtype} {value.shape}" for value in feeds.values())
        raise ExportError(f"onnxruntime cannot run the graph on {shown}: {e}") from e
