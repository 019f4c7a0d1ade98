"""The lock of a remote workdir: one batch at a time, as far as an object store can tell.

A store has no locks. The holder writes its identity and a heartbeat every few seconds; it counts as dead if it was
silent for long, or if its process on this machine is gone. Two that start within the same second may both win, but even
then each bundle's commit lists the files of a single upload by their sums.
"""

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Iterator

from vit_convert.batch.remote import Remote
from vit_convert.core.bundle import as_json
from vit_convert.core.errors import ConvertError, HeldError
from vit_convert.core.lock import BEAT_S, DEAD_AFTER_S, Holder, has_ended, me
from vit_convert.core.record import Record


@dataclasses.dataclass(frozen=True)
class _Beat(Record):
    """The content of the lock's file: the holder, and its last sign of life (unix seconds, by the holder's clock)."""

    holder: Holder
    time: float


@contextlib.contextmanager
def hold_remote(remote: Remote, name: str, command: str) -> Iterator[None]:
    """Holds the lock while the block runs.

    Args:
        remote: the workdir.
        name: of the lock's file.
        command: of the holder, for people.

    Raises:
        HeldError: somebody else holds it; says who.
    """
    ours = dataclasses.replace(me(), command=command)
    found = _read(remote, name)
    if found is not None and not _dead(found):
        who = f"process {found.holder.pid} on {found.holder.host}: {found.holder.command}"
        raise HeldError(
            f"{remote.address}: another batch works there ({who})",
            fix=f"Wait for it or end it; its lock ends {DEAD_AFTER_S:g} s after its last sign of life.",
        )
    done = threading.Event()
    _beat(remote, name, ours)
    thread = threading.Thread(target=_beat_until, args=(remote, name, ours, done), name="remote lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(ConvertError):  # it expires by itself
            remote.remove(name)


def _beat(remote: Remote, name: str, holder: Holder) -> None:
    remote.write(name, as_json(_Beat(holder, time.time())).encode())


def _beat_until(remote: Remote, name: str, holder: Holder, done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        with contextlib.suppress(ConvertError):  # the next one may get through
            _beat(remote, name, holder)


def _read(remote: Remote, name: str) -> _Beat | None:
    try:
        return _Beat.from_dict(json.loads(remote.read(name) or b""))
    except (ValueError, AttributeError):  # none, damaged, or another program's
        return None


def _dead(found: _Beat) -> bool:
    ended = has_ended(found.holder)
    return abs(time.time() - found.time) > DEAD_AFTER_S if ended is None else ended
