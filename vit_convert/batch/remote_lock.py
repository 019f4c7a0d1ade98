"""The lock of a remote workdir: one batch at a time, as far as an object store can tell.

A store has no locks. The holder writes who it is and beats every few seconds; one that was silent for long, or whose
process is gone from this machine, is dead. Two that begin within the same second may both win: each bundle's commit
still names one upload's files by their sums.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

from vit_convert.batch.remote import Remote
from vit_convert.core.errors import ConvertError, HeldError
from vit_convert.core.lock import BEAT_S, DEAD_AFTER_S, me, started


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
    ours = {**me(), "command": command}
    holder = _read(remote, name)
    if holder and not _dead(holder):
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}: {holder.get('command', '?')}"
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
        with contextlib.suppress(ConvertError):  # it ends by itself
            remote.remove(name)


def _beat(remote: Remote, name: str, record: dict[str, Any]) -> None:
    remote.write(name, json.dumps({**record, "time": time.time()}).encode())


def _beat_until(remote: Remote, name: str, record: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        with contextlib.suppress(ConvertError):  # the next one may come through
            _beat(remote, name, record)


def _read(remote: Remote, name: str) -> dict[str, Any]:
    try:
        value = json.loads(remote.read(name) or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _dead(holder: dict[str, Any]) -> bool:
    mine = me()
    same = all(holder.get(key) == mine[key] for key in ("boot", "namespace"))
    if same and isinstance(pid := holder.get("pid"), int):
        return started(pid) != holder.get("started")
    beaten = holder.get("time")
    return not isinstance(beaten, int | float) or abs(time.time() - beaten) > DEAD_AFTER_S
