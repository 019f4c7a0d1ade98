"""The files of a batch in a remote workdir: fetched when it begins, sent there as they change."""

import contextlib
import os
import time
from collections.abc import Iterator

from vit_convert.batch.folder import BatchFolder
from vit_convert.batch.remote import Remote, remote_at
from vit_convert.batch.remote_lock import hold_remote
from vit_convert.core.bundle import atomic
from vit_convert.core.errors import ConvertError

_PAUSE_S = 30.0  # between two uploads of a record: bundles' own commits are what counts


class Mirror:
    """Keeps a batch's files in two places; does nothing where its workdir is a folder.

    Args:
        folder: where they are written.
        remote: where they go, None for nowhere.
    """

    def __init__(self, folder: BatchFolder, remote: Remote | None):
        self._folder, self._remote, self._next = folder, remote, 0.0

    def fetch(self) -> None:
        """Brings the record and the events of the last command here."""
        for path in (self._folder.record, self._folder.events):
            content = self._remote.read(path.name) if self._remote else None
            if content is not None:
                with atomic(path) as temporary:
                    temporary.write_bytes(content)

    def record_changed(self) -> None:
        """Sends the record, if that is not too often; a store that fails now is asked again later."""
        if self._remote is not None and time.monotonic() >= self._next:
            with contextlib.suppress(ConvertError):
                self._remote.write(self._folder.record.name, self._folder.record.read_bytes())
            self._next = time.monotonic() + _PAUSE_S

    def finish(self) -> None:
        """Sends all files, and removes them here.

        Raises:
            StoreError: the store did not take one; all are still here.
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
        folder: where they are written; removed in the end if no bundle is left in it.
        address: of the remote workdir; "" for none.
        command: for people who find it held.

    Raises:
        HeldError: another batch works there.
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
    with contextlib.suppress(OSError):  # half-made bundles stay: the same command goes on with them
        os.rmdir(folder.root)
