"""A worker process: converts one job after another, and dies with its parent, however that ends."""

import contextlib
import ctypes
import gc
import os
import select
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from vit_convert.batch.run import Settings, run_job
from vit_convert.core.errors import INTERRUPTED
from vit_convert.core.interrupts import ending_as_interrupted
from vit_convert.core.warm import keep

_PR_SET_PDEATHSIG = 1  # man 2 prctl


def main() -> None:
    """Serves the connection named on the command line: receives `Settings`, then jobs, and answers with outcomes."""
    connection = Connection(int(sys.argv[1]))
    _end_with_parent(connection.fileno(), int(sys.argv[2]))
    gc.set_threshold(50_000)  # as in a single conversion
    # The parent handles interrupts and tells us: both receive them only if they share a terminal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep()
    settings: Settings = connection.recv()
    try:
        with ending_as_interrupted():
            while (job := connection.recv()) is not None:
                connection.send(run_job(job, settings))
    except (KeyboardInterrupt, EOFError, OSError):  # the latter if the parent is gone
        os._exit(INTERRUPTED)
    os._exit(0)  # at once: tearing down what is loaded takes half a second


def _end_with_parent(descriptor: int, parent: int) -> None:
    """Kills this process when its parent ends: by the kernel on Linux, elsewhere when the connection closes.

    The bundle is safe: its lock ends with the process, and the next conversion removes what is unfinished.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the line above
        os._exit(INTERRUPTED)

    def watch() -> None:
        poll = select.poll()
        poll.register(descriptor, 0)  # receives nothing but the end of the connection
        poll.poll()
        time.sleep(0.2)  # the main thread may be about to exit by itself
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    main()
