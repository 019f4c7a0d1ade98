"""Kernel timings that TensorRT keeps between builds: a file for each version and GPU, shared by all models."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from vit_convert.core.bundle import atomic
from vit_convert.core.errors import UsageError
from vit_convert.core.progress import Progress
from vit_convert.engine.backend.trt import Backend


def find_timings(backend: Backend, folder: str | os.PathLike[str] | None) -> pathlib.Path | None:
    """The file of a build's timings.

    Args:
        backend: the TensorRT that builds.
        folder: holds the files.

    Returns:
        The file, whether or not it exists; None without a folder, or if the backend keeps no timings.
    """
    if folder is None or backend.gpu is None or not backend.has_timing_cache:
        return None
    gpu = backend.gpu.name.replace(" ", "-").replace("/", "-")
    return pathlib.Path(folder) / f"timing-{backend.version}-{gpu}.cache"


@contextlib.contextmanager
def kept_timings(builder_config: Any, path: pathlib.Path | None, progress: Progress) -> Iterator[None]:
    """Gives stored timings to the build in the block, and stores what it adds.

    Args:
        builder_config: of the build.
        path: from `find_timings`; None keeps none.
        progress: warns if timings are not used or not stored.
    """
    timing_cache = None if path is None else load_timings(builder_config, path, progress)
    yield
    if path is not None and timing_cache is not None:
        save_timings(path, timing_cache, progress)


def load_timings(builder_config: Any, path: pathlib.Path, progress: Progress) -> Any:
    """Gives a build the kept timings, or none if they cannot be used.

    Args:
        builder_config: of the build.
        path: the file.
        progress: warns if stored timings are not used.

    Returns:
        TensorRT's ITimingCache, which the build adds to; None if TensorRT makes none.
    """
    try:
        kept = path.read_bytes() if path.exists() else b""
    except OSError as e:
        progress.warn(f"{path}: cannot be read ({e.strerror}); timing anew")
        kept = b""
    timing_cache = _set(builder_config, kept)
    if timing_cache is None:
        progress.warn(f"{path}: TensorRT does not accept it (another driver?); timing anew")
        timing_cache = _set(builder_config, b"")
    return timing_cache


def save_timings(path: pathlib.Path, timing_cache: Any, progress: Progress) -> None:
    """Stores timings for the next build; a failure only warns, since the engine is finished.

    Args:
        path: the file.
        timing_cache: what `load_timings` returned, after the build.
        progress: warns of a failure.
    """
    try:
        with atomic(path) as temporary:
            temporary.write_bytes(timing_cache.serialize())
    except (OSError, UsageError) as e:
        progress.warn(f"{path}: the timings of this build are not kept ({e})")


def _set(builder_config: Any, kept: bytes) -> Any:
    timing_cache = builder_config.create_timing_cache(kept)
    return timing_cache if timing_cache is not None and builder_config.set_timing_cache(timing_cache, False) else None
