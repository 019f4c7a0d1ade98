"""Bundles committed in a remote workdir: whether a job would make the same again, and how to upload one."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from vit_convert.batch.estimate import candidates
from vit_convert.batch.job import Job
from vit_convert.batch.outcome import Outcome
from vit_convert.batch.remote import CheckpointIdentity, Commit, forget, remote_at
from vit_convert.core.bundle import Bundle, as_json, hash_file, hash_value
from vit_convert.core.config import as_plain
from vit_convert.core.version import __version__


def key_of(config: ml_collections.ConfigDict, until: str) -> str:
    """The hash of a conversion's request.

    Args:
        config: full and checked.
        until: the last stage; "" for all.
    """
    return hash_value([json.loads(as_json(as_plain(config))), until, __version__])


def identity_of(checkpoint: str, folders: Sequence[str]) -> CheckpointIdentity:
    """What identifies a checkpoint's content.

    Args:
        checkpoint: as in the config.
        folders: to search.
    """
    path = next((path for path in candidates(checkpoint, folders) if os.path.exists(path)), "")
    if not path:
        return CheckpointIdentity(address=checkpoint)
    if os.path.isdir(path):
        return CheckpointIdentity(files=hash_value(sorted(_stamps(pathlib.Path(path)))))
    return CheckpointIdentity(*_stamp(path), sha256=hash_file(path))


def is_same(known: CheckpointIdentity, checkpoint: str, folders: Sequence[str]) -> bool:
    """Whether a checkpoint still has the content that `identity_of` found; a file is read only if its time differs.

    An address that is not on this machine counts as unchanged.
    """
    path = next((path for path in candidates(checkpoint, folders) if os.path.isfile(path)), "")
    if path and (known.bytes, known.mtime_ns) == _stamp(path):
        return True
    now = identity_of(checkpoint, folders)
    if now.sha256:
        return now.sha256 == known.sha256
    return now == known or bool(now.address and known.sha256)


def is_fresh(commit: Commit, job: Job, until: str, folders: Sequence[str]) -> bool:
    """Whether a committed bundle is what a job would make.

    Raises:
        UsageError: the job's config fails.
    """
    config = job.make_config()
    return commit.key == key_of(config, until) and is_same(commit.checkpoint, config.checkpoint, folders)


def store(bundle: Bundle, address: str, job: Job, until: str, folders: Sequence[str], outcome: Outcome) -> None:
    """Uploads a bundle that is whole, commits it, and removes the local copy.

    Raises:
        StoreError: the store refused it; the local copy stays.
    """
    config = job.make_config()
    remote_at(address).push(bundle, key_of(config, until), identity_of(config.checkpoint, folders), outcome)
    forget(bundle)


def _stamp(path: str | os.PathLike[str]) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _stamps(folder: pathlib.Path) -> list[list[Any]]:
    return [[file.relative_to(folder).as_posix(), *_stamp(file)] for file in folder.rglob("*") if file.is_file()]
