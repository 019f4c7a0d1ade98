"""One conversion at a time works on a bundle, and a dead one holds nobody up."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from vit_convert.core import lock
from vit_convert.core.bundle import Bundle
from vit_convert.core.errors import UsageError
from vit_convert.core.lock import DEAD_AFTER_S, hold, me, started

HOLD = """
import sys
from vit_convert.core.bundle import Bundle
from vit_convert.core.lock import hold
with hold(Bundle(sys.argv[1]), "the first one"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def bundle(tmp_path):
    return Bundle(tmp_path)


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def refused(bundle):
    with pytest.raises(UsageError) as caught, hold(bundle, "the second one"):
        raise AssertionError("it is held")
    assert caught.value.exit_code == 2
    return f"{caught.value} {caught.value.fix}"


def test_the_second_one_is_told_who_holds_it(bundle, other):
    message = refused(bundle)
    assert f"process {other.pid} on {os.uname().nodename}" in message and "the first one" in message
    other.send_signal(signal.SIGSTOP)  # it lives, though it does nothing
    assert f"process {other.pid}" in refused(bundle)
    other.send_signal(signal.SIGCONT)
    other.communicate()
    with hold(bundle, "the second one"):
        pass
    assert list(bundle.root.iterdir()) == []  # a finished conversion leaves nothing of it


def test_a_killed_holder_holds_nobody_up(bundle, other):
    other.kill()
    other.wait()
    assert bundle.lock.exists()
    with hold(bundle, "the second one"):
        assert json.loads(bundle.lock.read_text())["pid"] == os.getpid()


def test_not_twice_in_one_process(bundle):
    with hold(bundle, "the first one"):
        found = []
        thread = threading.Thread(target=lambda: found.append(refused(bundle)))
        thread.start()
        thread.join()
        assert "the first one" in found[0]
        # the refused one left the file as it was
        assert "the first one" in json.loads(bundle.lock.read_text())["command"]


def claim(bundle, **changes):
    bundle.lock.write_text(json.dumps({**me().to_dict(), "command": "x", "since": "y", **changes}))


@pytest.mark.parametrize("text", ['{"host": "a", "pi', "", "{}", "[1]", "3", '"a"', "null"])
def test_a_record_cut_short_or_of_another_form_is_nobodys(bundle, text):
    bundle.lock.write_text(text)
    with hold(bundle, "x"):
        pass


@pytest.mark.parametrize(("silence_s", "dead"), [(DEAD_AFTER_S / 2, False), (DEAD_AFTER_S + 60, True)])
def test_a_holder_on_another_machine_is_dead_when_it_says_nothing_for_long(bundle, silence_s, dead):
    """Some shared file systems keep flock to one machine: it was given to us, and proves nothing."""
    claim(bundle, host="other", boot="another kernel")
    now = bundle.lock.stat().st_mtime
    os.utime(bundle.lock, (now - silence_s, now - silence_s))
    if dead:
        with hold(bundle, "x"):
            pass
    else:
        assert "on other" in (message := refused(bundle)) and "its lock ends" in message


def test_a_holder_gives_signs_of_life(bundle, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    with hold(bundle, "x"):
        os.utime(bundle.lock, (1, 1))
        for _ in range(1000):
            if bundle.lock.stat().st_mtime > 1:
                break
            threading.Event().wait(0.01)
        assert bundle.lock.stat().st_mtime > 1


@pytest.fixture
def without_flock(monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_flock_the_process_is_looked_for(bundle, without_flock, other):
    assert f"process {other.pid}" in refused(bundle)
    other.kill()
    other.wait()
    with hold(bundle, "x"):
        pass


@pytest.mark.parametrize("pid", [None, "x", "12", [1]])
def test_a_record_without_a_process_is_believed_until_it_is_old(bundle, without_flock, pid):
    claim(bundle, pid=pid)
    assert "another conversion works on this bundle" in refused(bundle)
    os.utime(bundle.lock, (1, 1))
    with hold(bundle, "x"):
        pass


# the same names in every worker
@pytest.mark.parametrize("pid", [os.getpid(), 2**22 - 1], ids=["this one's", "nobody's"])
def test_a_process_of_another_container_is_not_looked_for_here(bundle, without_flock, pid):
    """Its number is another's here, or nobody's."""
    claim(bundle, namespace="pid:[1]", pid=pid, started="1")
    assert f"process {pid}" in refused(bundle)
    os.utime(bundle.lock, (1, 1))
    with hold(bundle, "x"):
        pass


def test_the_number_of_a_process_comes_back(bundle, without_flock):
    """Another process got the number of the holder: it started at another time."""
    claim(bundle, pid=os.getppid(), started=started(os.getppid()))
    assert f"process {os.getppid()}" in refused(bundle)
    claim(bundle, pid=os.getppid(), started="1")
    with hold(bundle, "x"):
        pass


def test_who_is_refused_keeps_no_file_open(bundle, other):
    refused(bundle)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        refused(bundle)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_kernels_lock_says_more_than_a_process_that_lives(bundle):
    """Whoever the file names has let go of it: the kernel gave us the lock of this machine."""
    claim(bundle, pid=os.getppid(), started=started(os.getppid()))
    with hold(bundle, "x"):
        assert json.loads(bundle.lock.read_text())["pid"] == os.getpid()


def test_a_folder_in_the_locks_place_is_said(bundle):
    bundle.lock.mkdir()
    with pytest.raises(UsageError, match=r"\.lock: cannot be written \(Is a directory\)") as caught, hold(bundle, "a"):
        pass
    assert caught.value.fix == "Move away what is there, or give another --workdir."


def test_a_disk_that_fails_under_the_lock_is_said(bundle, monkeypatch):
    def broken(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises((OSError, UsageError), match="Input/output error"), hold(bundle, "x"):
        raise AssertionError("nobody has a lock")


def test_a_full_disk_is_said_and_leaves_no_lock(bundle, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UsageError, match="no space left on the disk"), hold(bundle, "x"):
        pass
    assert not bundle.lock.exists()


def test_when_a_process_started():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert int(started(child.pid)) >= int(started(os.getpid())) > 0
    child.communicate()
    assert started(child.pid) == ""


def test_the_record_is_on_the_disk_before_anything_is_worked_on(bundle, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(json.loads(os.pread(file, 1 << 16, 0))["command"]))
    with hold(bundle, "x"):
        assert synced == ["x"]


def test_its_thread_does_not_keep_a_process_alive(bundle):
    with hold(bundle, "x"):
        (beat,) = [thread for thread in threading.enumerate() if thread.name == "bundle lock"]
        assert beat.daemon
    assert not beat.is_alive()


def test_of_two_that_come_at_once_without_flock_the_last_to_write_has_it(bundle, without_flock, monkeypatch):
    """Both found no holder; the file says one of them."""
    record = json.dumps({**me().to_dict(), "command": "the other", "since": "now", "token": "other"})
    monkeypatch.setattr(os, "fsync", lambda file: bundle.lock.write_text(record))
    assert "the other" in refused(bundle)
    assert bundle.lock.read_text() == record  # which is its own


def test_a_look_at_a_silent_holder_leaves_nothing(bundle):
    claim(bundle, host="other", boot="another kernel")
    refused(bundle)
    assert [path.name for path in bundle.root.iterdir()] == [bundle.lock.name]


def test_a_holder_that_removes_our_file_is_at_work(bundle, monkeypatch):
    """It removes what has no owner, between our making a file to read its clock by and our looking at it."""
    claim(bundle, host="other", boot="another kernel")
    os.utime(bundle.lock, (1, 1))
    beside = lock.temporary_beside
    monkeypatch.setattr(lock, "temporary_beside", lambda path: beside(path.parent / "gone" / path.name))
    assert "another conversion works on this bundle" in refused(bundle)


def test_silence_is_by_the_clock_of_the_disk(bundle, monkeypatch):
    """Ours may be wrong by hours, and on a network the disk has another's."""
    claim(bundle, host="other", boot="another kernel")
    now = bundle.lock.stat().st_mtime
    for ahead_s, dead in ((0, False), (DEAD_AFTER_S - 10, False), (DEAD_AFTER_S + 10, True)):
        os.utime(bundle.lock, (now, now))

        def touch(path, at=now + ahead_s):
            path.write_bytes(b"")
            os.utime(path, (at, at))

        monkeypatch.setattr(lock.pathlib.Path, "touch", touch)
        assert lock._dead(lock.Holder(boot="another kernel"), bundle.lock, locked=True) == dead
        monkeypatch.undo()


def test_where_the_kernel_does_not_tell(monkeypatch):
    """Neither its run nor its numbering of processes: another system than Linux, or a sandbox."""

    def refuse(*arguments, **options):
        raise FileNotFoundError

    monkeypatch.setattr(lock.pathlib.Path, "read_text", refuse)
    monkeypatch.setattr(os, "readlink", refuse)
    assert lock._boot() == os.uname().nodename and lock._namespace() == "" and started(os.getpid()) == ""


def test_what_tells_this_process_from_others():
    with open("/proc/sys/kernel/random/boot_id") as f:
        boot = f.read().strip()
    assert me() == lock.Holder(
        host=os.uname().nodename,
        boot=boot,
        namespace=os.readlink("/proc/self/ns/pid"),
        pid=os.getpid(),
        started=started(os.getpid()),
    )


def test_a_process_whose_name_holds_blanks_and_brackets(monkeypatch):
    """The second field of /proc/PID/stat, see man 5 proc; the 22nd is the start."""
    fields = [str(i) for i in range(3, 53)]
    monkeypatch.setattr(lock.pathlib.Path, "read_text", lambda path: f"12 (a b) c) {' '.join(fields)}\n")
    assert started(12) == "22"


@pytest.mark.parametrize(
    ("record", "shown"),
    [
        ({}, "process ? on ?, since ?: ?"),
        ({"pid": 3, "host": "h", "since": "s", "command": "c"}, "process 3 on h, since s: c"),
    ],
)
def test_what_is_said_of_a_holder(bundle, record, shown):
    holder = lock.Holder.from_dict(record)
    error = lock._refusal(bundle.lock, holder)
    assert str(error) == f"{bundle.root}: another conversion works on this bundle ({shown})"
    assert error.fix == "Wait for it, end it, or give this conversion another --workdir or --config.name."
    assert (
        "its lock ends 90 s after its last sign of life"
        in lock._refusal(bundle.lock, dataclasses.replace(holder, boot="another")).fix
    )
    assert "its lock ends" not in lock._refusal(bundle.lock, dataclasses.replace(holder, boot=lock._boot())).fix
