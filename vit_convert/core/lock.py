"""The lock on a bundle: one command at a time works on it."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from vit_convert.core.bundle import Bundle, disk_errors, temporary_beside
from vit_convert.core.errors import HeldError
from vit_convert.core.interrupts import undisturbed
from vit_convert.core.record import Record, RecordError

BEAT_S = 15.0
# A holder on another machine counts as dead if its file was not touched for this long: that machine's processes cannot
# be inspected, and on some shared file systems flock is local to a machine.
DEAD_AFTER_S = 90.0
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)


@contextlib.contextmanager
def hold(bundle: Bundle, command: str) -> Iterator[None]:
    """Holds a bundle's lock while the block runs.

    The kernel's lock on the file (flock) ends with its process, however that ends. The file's content names the
    holder, and decides where flock cannot: on file systems without it, and between machines.

    Args:
        bundle: its folder must exist and be writable.
        command: of the holder, for people.

    Yields:
        Nothing.

    Raises:
        HeldError: somebody else holds it; says who.
    """
    since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    file, beat, done = None, None, threading.Event()
    try:
        with undisturbed():
            with disk_errors(bundle.lock):
                file = _acquire(bundle.lock, dataclasses.replace(me(), command=command, since=since))
            beat = threading.Thread(target=_beat, args=(file, done), name="bundle lock", daemon=True)
            beat.start()
        yield
    finally:
        with undisturbed():
            done.set()
            if beat is not None and beat.is_alive():
                beat.join()
            if file is not None:
                _let_go(file, bundle.lock)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder(Record):
    """The holder of a lock, as named in the file. The first five identify its process on any machine: process numbers
    are reused, start times are not.

    Attributes:
        host: name of its machine.
        boot: of that machine, see `_boot`.
        namespace: of its process number, see `_namespace`.
        pid: its process number.
        started: when the process did, in the kernel's ticks.
        command: its command line, for people.
        since: when it took the lock, in local time (ISO 8601).
        token: distinguishes it from another that writes to the same file at the same moment.
    """

    host: str = "?"
    boot: str | None = None
    namespace: str | None = None
    pid: int | None = None
    started: str | None = None
    command: str = "?"
    since: str = "?"
    token: str = ""


def me() -> Holder:
    """This process."""
    pid = os.getpid()
    return Holder(host=socket.gethostname(), boot=_boot(), namespace=_namespace(), pid=pid, started=started(pid))


def started(pid: int) -> str:
    """When a process on this machine started, in the kernel's ticks; "" if no process has this number."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # field 22, see man 5 proc; the second one may hold blanks


def has_ended(holder: Holder) -> bool | None:
    """Whether a holder's process is gone; None if it is on another machine or in another container, and cannot be
    seen."""
    if (holder.boot, holder.namespace) != (_boot(), _namespace()) or holder.pid is None:
        return None
    return started(holder.pid) != holder.started


def _acquire(path: pathlib.Path, record: Holder) -> int:
    """Opens and locks the file and writes the record into it; returns its descriptor, which releases the lock when it
    is closed."""
    record = dataclasses.replace(record, token=secrets.token_hex(8))
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locked = _flock(file, path)
            if not _is_at(file, path):  # its holder removed it after we opened and before we locked it
                os.close(file)
                continue
            if (holder := _read(file)) is not None and not _dead(holder, path, locked=locked):
                raise _refusal(path, holder)
            data = json.dumps(record.to_dict()).encode()
            os.ftruncate(file, 0)
            os.pwrite(file, data, 0)
            os.fsync(file)
            other = record if locked else _read(file) or Holder()  # without flock, two may get this far
            if other.token != record.token:
                raise _refusal(path, other)
            return file
        except OSError:  # for example a full disk
            _let_go(file, path)
            raise
        except BaseException:  # it belongs to another
            os.close(file)
            raise


def _let_go(file: int, path: pathlib.Path) -> None:
    # the folder can no longer be written: the record stays, and is that of a dead holder
    with contextlib.suppress(OSError):
        if _is_at(file, path):
            os.unlink(path)
    os.close(file)


def _flock(file: int, path: pathlib.Path) -> bool:
    """Takes the kernel's lock; False if the file system has no locks.

    Raises:
        HeldError: another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise _refusal(path, _read(file) or Holder()) from e
        if e.errno in _NO_FLOCK:
            return False
        raise
    return True


def _dead(holder: Holder, path: pathlib.Path, *, locked: bool) -> bool:
    """Whether the holder named in the file has ended."""
    if holder.boot == _boot():
        if locked:  # the kernel that ran the holder gave its lock to us
            return True
        if (ended := has_ended(holder)) is not None:
            return ended
    return _silence_s(path) > DEAD_AFTER_S


def _silence_s(path: pathlib.Path) -> float:
    """Seconds since the holder last touched the file, by the file server's clock, since ours may differ."""
    now = temporary_beside(path)
    try:
        now.touch()
        return now.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:  # the holder is working there, and removes what has no owner
        return 0.0
    finally:
        now.unlink(missing_ok=True)


def _beat(file: int, done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(file)


def _is_at(file: int, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _read(file: int) -> Holder | None:
    """The holder named in the file; an unknown one if the file names none in our form."""
    try:
        record = json.loads(os.pread(file, 1 << 16, 0))
    except ValueError:  # empty, or its holder was killed while writing it
        return None
    if not record or not isinstance(record, dict):
        return None
    try:
        return Holder.from_dict(record)
    except RecordError:
        return Holder()


def _refusal(path: pathlib.Path, holder: Holder) -> HeldError:
    number = "?" if holder.pid is None else holder.pid
    who = f"process {number} on {holder.host}, since {holder.since}: {holder.command}"
    fix = "Wait for it, end it, or give this conversion another --workdir or --config.name."
    if holder.boot not in (None, _boot()):
        fix += f" If that machine is gone, its lock ends {DEAD_AFTER_S:g} s after its last sign of life."
    return HeldError(f"{path.parent}: another conversion works on this bundle ({who})", fix=fix)


def _boot() -> str:
    """The kernel's boot id, or the host's name if the kernel does not provide it."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _namespace() -> str:
    """The namespace of our process number: each container of a machine numbers its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
