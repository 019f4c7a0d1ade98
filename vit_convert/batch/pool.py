"""Worker processes: started on demand, warm from job to job, and never left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import IO

from vit_convert.batch.job import Job
from vit_convert.batch.machine import rss_mib
from vit_convert.batch.outcome import Outcome
from vit_convert.batch.run import Settings
from vit_convert.core.leftovers import tidy

_END_S = 10.0  # time for a worker to release its bundle
_LAST_WORDS = 2000  # characters of a dead worker's output


class Worker:
    """One process, which converts one job at a time.

    Args:
        settings: of the batch.

    Attributes:
        number: identifies its line on the screen; the lowest one not used by another worker.
        job: its current one; None while it is idle.
        begun: when it started that, by `time.monotonic`.
    """

    def __init__(self, settings: Settings, number: int):
        self.number, self.job, self.begun, self._settings = number, None, 0.0, settings
        self.connection, theirs = Pipe()
        # Closed with the process. It has no name, so nothing remains, whoever is killed.
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-m", "vit_convert.batch.worker", str(theirs.fileno()), str(os.getpid())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C goes to the parent, which lets workers finish their files
        )
        theirs.close()
        with contextlib.suppress(OSError):  # it died at once: its first job will show that
            self.connection.send(settings)

    job: Job | None

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    @property
    def rss_mib(self) -> float:
        """Memory that it holds now."""
        return rss_mib(self.pid)

    def give(self, job: Job) -> None:
        """Gives it a job; the outcome comes over `connection`."""
        self.job, self.begun = job, time.monotonic()
        with contextlib.suppress(OSError):
            self.connection.send(job)

    def take(self) -> Outcome | None:
        """The outcome of its job, once `connection` has something; None if the process died over it."""
        try:
            outcome = self.connection.recv()
        except (EOFError, OSError):
            return None
        self.job = None
        return outcome

    def ask_to_end(self) -> None:
        """Asks it to stop, as Ctrl-C stops a conversion."""
        with contextlib.suppress(OSError):
            if self.job is None:
                self.connection.send(None)
            self._process.send_signal(signal.SIGTERM)

    def end(self, deadline: float | None = None) -> str:
        """Ends it, by SIGKILL after a while.

        Args:
            deadline: by `time.monotonic`; None for ten seconds from now.

        Returns:
            How the process ended, and its last output.
        """
        self.ask_to_end()
        try:
            self._process.wait(max(0.0, (deadline or time.monotonic() + _END_S) - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        return self._close()

    def bury(self) -> str:
        """How a process that has closed its connection ended, and its last output."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self._process.kill()
        self._process.wait()
        return self._close()

    def _close(self) -> str:
        self.connection.close()
        if self.job is not None:
            tidy(self._settings.bundle(self.job))
        code = self._process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _LAST_WORDS))
        said = self._log.read().decode(errors="replace").strip().splitlines()
        self._log.close()
        return f"{how}{f', after saying: {said[-1]}' if said else ''}"


class Pool:
    """The workers of a batch.

    Args:
        settings: of the batch.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self.workers: list[Worker] = []

    @property
    def idle(self) -> list[Worker]:
        """Workers without a job."""
        return [worker for worker in self.workers if worker.job is None]

    @property
    def busy(self) -> list[Worker]:
        """Workers with a job."""
        return [worker for worker in self.workers if worker.job is not None]

    def start(self) -> Worker:
        """Starts another worker."""
        taken = {worker.number for worker in self.workers}
        worker = Worker(self._settings, next(i for i in range(len(taken) + 1) if i not in taken))
        self.workers.append(worker)
        return worker

    def ready(self, timeout_s: float) -> list[Worker]:
        """Workers that have an outcome or died; returns after `timeout_s` at the latest."""
        ready = wait([worker.connection for worker in self.workers], timeout_s)
        return [worker for worker in self.workers if worker.connection in ready]

    def end(self, worker: Worker) -> str:
        """Ends one worker; see `Worker.end`."""
        self.workers.remove(worker)
        return worker.end()

    def bury(self, worker: Worker) -> str:
        """Removes a dead one; see `Worker.bury`."""
        self.workers.remove(worker)
        return worker.bury()

    def close(self) -> None:
        """Ends all workers, concurrently."""
        deadline = time.monotonic() + _END_S
        for worker in self.workers:
            worker.ask_to_end()
        for worker in self.workers:
            worker.end(deadline)
        self.workers = []
