"""The files of a batch in a remote workdir: downloaded at the start, and uploaded as they change."""

import contextlib
import os
import time
from collections.abc import Iterator

from vit_convert.batch.folder import BatchFolder
from vit_convert.batch.remote import Remote, remote_at
from vit_convert.batch.remote_lock import hold_remote
from vit_convert.core.bundle import atomic
from vit_convert.core.errors import ConvertError

_PAUSE_S = 30.0  # between two uploads of a record: only the bundles' own commits matter


class Mirror:
    """Keeps a batch's files in two places; does nothing if its workdir is a folder.

    Args:
        folder: where they are written.
        remote: where they go; None for nowhere.
    """

    def __init__(self, folder: BatchFolder, remote: Remote | None):
        self._folder, self._remote, self._next = folder, remote, 0.0

    def fetch(self) -> None:
        """Downloads the record and the events of the last command."""
        for path in (self._folder.record, self._folder.events):
            content = self._remote.read(path.name) if self._remote else None
            if content is not None:
                with atomic(path) as temporary:
                    temporary.write_bytes(content)

    def record_changed(self) -> None:
        """Uploads the record, unless that was done just before; if the store fails now, a later call tries again."""
        if self._remote is not None and time.monotonic() >= self._next:
            with contextlib.suppress(ConvertError):
                self._remote.write(self._folder.record.name, self._folder.record.read_bytes())
            self._next = time.monotonic() + _PAUSE_S

    def finish(self) -> None:
        """Uploads all files, and removes the local ones.

        Raises:
            StoreError: the store refused one; all are still here.
        """
        if self._remote is None:
            return
        files = (self._folder.events, self._folder.table, self._folder.page, self._folder.record)
        paths = [path for path in files if path.exists()]
        for path in paths:
            self._remote.write(path.name, path.read_bytes())
        for path in paths:
            path.unlink()


@contextlib.contextmanager
def mirrored(folder: BatchFolder, address: str, command: str) -> Iterator[Mirror]:
    """Holds a remote workdir while the block runs, and keeps the batch's files there.

    Args:
        folder: where they are written; removed at the end if no bundle is left in it.
        address: of the remote workdir; "" for none.
        command: for people who find it held.

    Raises:
        HeldError: another batch is using it.
        StoreError: the store does not answer.
    """
    if not address:
        yield Mirror(folder, None)
        return
    remote = remote_at(address)
    with hold_remote(remote, folder.lock.name, command):
        mirror = Mirror(folder, remote)
        mirror.fetch()
        try:
            yield mirror
        finally:
            mirror.finish()
    with contextlib.suppress(OSError):  # unfinished bundles stay: the same command continues them
        os.rmdir(folder.root)
