"""`vit_convert.Session`: opens the result of a conversion, a model or a pair of towers."""

import os
from typing import Any

from vit_convert.core.bundle import Bundle
from vit_convert.core.errors import UsageError
from vit_convert.core.pair import is_pair
from vit_convert.serve.pair import PairSession
from vit_convert.serve.session import FallbackSession


def open_session(
    folder: Bundle | str | os.PathLike[str],
    plan_path: str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
) -> Any:
    """Opens a session on whatever works here: the best proved engine, or else onnxruntime.

    Args:
        folder: written by the conversion, `<workdir>/<name>`.
        plan_path: for a single model: the engine to prefer; None for the recommended one.
        backend: "tensorrt", "rtx" or "auto".

    Returns:
        A `FallbackSession` for a model, a `PairSession` for a pair of towers.

    Raises:
        UsageError: the folder is not a bundle, or an engine is given for a pair.
        BenchmarkError: neither an engine nor the graph can be run.

    Example, on a host without a GPU:
        >>> session = vit_convert.Session("out/tiny")
        >>> session.run(images)["logits"].shape
        (4, 10)
        >>> session.runs_on
        'onnxruntime'
        >>> session.close()
    """
    root = folder.root if isinstance(folder, Bundle) else folder
    if not is_pair(root):
        return FallbackSession(folder, plan_path, backend=backend)
    if plan_path is not None:
        raise UsageError(f"{os.fspath(root)}: a pair of towers, and one engine is given: {os.fspath(plan_path)}")
    return PairSession(root, backend=backend)
