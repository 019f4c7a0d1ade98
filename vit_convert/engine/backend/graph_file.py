"""The files of a graph and its weights, which identify the source of an engine."""

import dataclasses
import functools
import os
import pathlib

from vit_convert.core.bundle import hash_file
from vit_convert.core.errors import BuildError
from vit_convert.core.record import Record, optional


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphFile(Record):
    """Identifies a graph and its weights.

    Attributes:
        path: its name.
        sha256: of the graph, in hex.
        data_sha256: of the weights that lie beside it.
    """

    path: str
    sha256: str
    data_sha256: str | None = optional()

    @property
    def hashes(self) -> dict[str, str]:
        """The hashes in the form of `graph_hashes`."""
        return {"sha256": self.sha256, **({} if self.data_sha256 is None else {"data_sha256": self.data_sha256})}


def require_graph(onnx_path: str | os.PathLike[str]) -> None:
    """Refuses a graph that does not exist.

    Raises:
        BuildError: see above.
    """
    if not os.path.isfile(onnx_path):
        raise BuildError(f"{os.fspath(onnx_path)}: there is no such graph", fix="Export it first.")


def graph_hashes(onnx_path: str | os.PathLike[str]) -> dict[str, str]:
    """The sha256 of a graph and, if there is one, of its weight file `<graph>.data`.

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


def hash_graph(onnx_path: str | os.PathLike[str]) -> dict[str, str]:
    """`graph_hashes` of a graph; reads the files again only if they changed, since hashing a large model takes seconds.

    Args:
        onnx_path: the graph.

    Raises:
        BuildError: there is no such graph.
    """
    require_graph(onnx_path)
    files = [
        pathlib.Path(path).stat()
        for path in (os.fspath(onnx_path), f"{os.fspath(onnx_path)}.data")
        if os.path.exists(path)
    ]
    return dict(
        _hash_graph(os.fspath(onnx_path), tuple((file.st_ino, file.st_size, file.st_mtime_ns) for file in files))
    )


@functools.lru_cache
def _hash_graph(onnx_path: str, files: tuple[tuple[int, int, int], ...]) -> dict[str, str]:
    return graph_hashes(onnx_path)


def graph_file(onnx_path: str | os.PathLike[str]) -> GraphFile:
    """A graph as it is now.

    Raises:
        BuildError: there is no such graph.
    """
    return GraphFile(path=pathlib.Path(onnx_path).name, **hash_graph(onnx_path))
