"""A worker process: converts one job after another, and ends with its parent, however that ends."""

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
    """Serves the connection that the command line names: gets `Settings`, then jobs, and answers with outcomes."""
    connection = Connection(int(sys.argv[1]))
    _end_with_parent(connection.fileno(), int(sys.argv[2]))
    gc.set_threshold(50_000)  # as a single conversion does
    # An interrupt is for the parent, which tells us: both get it only where they share a terminal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep()
    settings: Settings = connection.recv()
    try:
        with ending_as_interrupted():
            while (job := connection.recv()) is not None:
                connection.send(run_job(job, settings))
    except (KeyboardInterrupt, EOFError, OSError):  # the latter of a parent that is gone
        os._exit(INTERRUPTED)
    os._exit(0)  # at once: what is loaded takes half a second to tear down


def _end_with_parent(descriptor: int, parent: int) -> None:
    """Kills this process when its parent ends: by the kernel on Linux, elsewhere when the connection's end closes.

    A bundle outlives that: its lock ends with the process, and the next conversion removes what is half done.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(INTERRUPTED)

    def watch() -> None:
        poll = select.poll()
        poll.register(descriptor, 0)  # nothing but its end
        poll.poll()
        time.sleep(0.2)  # the main thread may be about to leave by itself
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    main()
