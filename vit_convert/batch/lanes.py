"""Assigns engine tasks to GPUs: one at a time per GPU and per bundle, beside the conversions."""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from vit_convert.batch.attempts import pause_s
from vit_convert.batch.devices import Device, Gpus
from vit_convert.batch.engines import Cancelled, EngineSettings, Tasks
from vit_convert.batch.outcome import EngineOutcome, Outcome
from vit_convert.batch.remote_engines import kept_of, run_task

_TICK_S = 0.2


class LocalGpus:
    """This machine's GPUs.

    Args:
        workdir: of the batch.
        settings: of its engine tasks.
        devices: the GPUs.
    """

    def __init__(self, workdir: str, settings: EngineSettings, devices: Sequence[Device]):
        self._workdir, self._settings, self._devices, self._tasks = workdir, settings, list(devices), Tasks()

    def devices(self) -> list[Device]:
        """See `Gpus`."""
        return self._devices

    def run(self, name: str, device: Device) -> EngineOutcome:
        """See `Gpus`."""
        return run_task(self._tasks, self._workdir, name, self._settings, device)

    def close(self) -> None:
        """See `Gpus`."""
        self._tasks.close()


@dataclasses.dataclass
class _Bundle:
    """A bundle on its way through the types of GPUs.

    Attributes:
        outcome: of its conversion.
        left: types still to come; the first is next.
        ended: outcomes for the types that are done.
        attempts: at the next type.
        not_before: the earliest time for that, by `time.monotonic`.
    """

    outcome: Outcome
    left: list[str]
    ended: list[EngineOutcome] = dataclasses.field(default_factory=list)
    attempts: int = 0
    not_before: float = 0.0


class Lanes:
    """A thread for each GPU, which takes one bundle after another.

    Args:
        gpus: where tasks run.
        workdir: of the batch.
        settings: of its engine tasks.
        retries: further attempts after temporary failures.
        begun: called for each attempt with the bundle's name and the GPU.
        ended: called after each attempt with the bundle's name, the outcome, and whether another attempt follows.
        finished: called for each job whose engines are all done. These three are called from other threads.
    """

    def __init__(
        self,
        gpus: Gpus,
        workdir: str,
        settings: EngineSettings,
        *,
        retries: int,
        begun: Callable[[str, Device], None],
        ended: Callable[[str, EngineOutcome, bool], None],
        finished: Callable[[Outcome], None],
    ):
        self._gpus, self._workdir, self._settings, self._retries = gpus, workdir, settings, retries
        self._begun, self._ended, self._finished = begun, ended, finished
        self._condition = threading.Condition()
        self._waiting: list[_Bundle] = []
        self._unfinished, self._turn = 0, 0
        self._stopped = self._closed = False
        self._threads: dict[Device, list[threading.Thread]] = {}
        self._error: BaseException | None = None
        self._grow()

    @property
    def types(self) -> list[str]:
        """The types of GPUs."""
        return list(dict.fromkeys(device.type for device in self._threads))

    def add(self, outcome: Outcome) -> bool:
        """Accepts a job whose bundle is whole; returns False if its engines exist already, so that it is finished.

        Args:
            outcome: of the conversion.

        Raises:
            Exception: an error in a thread that is not a task's failure.
        """
        if self._error is not None:
            raise self._error
        self._grow()
        types, where = self.types, (self._workdir, outcome.name, self._settings)
        known = {gpu: found for gpu in types if (found := kept_of(*where, gpu)) is not None}
        left = [gpu for gpu in types if gpu not in known]
        if not left:
            self._finished(outcome.with_engines([known[gpu] for gpu in types]))
            return False
        with self._condition:
            if self._stopped:
                return True
            self._turn += 1
            turn = self._turn % len(left)  # so that no type waits until all others are done
            self._waiting.append(_Bundle(outcome, left[turn:] + left[:turn], list(known.values())))
            self._unfinished += 1
            self._condition.notify_all()
        return True

    def stop(self) -> None:
        """Starts nothing more, not even what is added later; running tasks continue."""
        with self._condition:
            self._stopped = True
            self._unfinished -= len(self._waiting)
            self._waiting.clear()
            self._condition.notify_all()

    def wait(self) -> None:
        """Waits until all bundles that were added are done.

        Raises:
            Exception: an error in a thread that is not a task's failure.
        """
        with self._condition:
            while self._unfinished and self._error is None:
                self._condition.wait(_TICK_S)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Ends running tasks and all threads."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._gpus.close()
        for thread in [thread for threads in self._threads.values() for thread in threads]:
            thread.join()

    def _grow(self) -> None:
        """Starts a thread for each GPU without one; a cluster may have grown."""
        for device, count in collections.Counter(self._gpus.devices()).items():
            threads = self._threads.setdefault(device, [])
            while len(threads) < count:
                name = f"engines {device.type} {device.id}"
                threads.append(threading.Thread(target=self._serve, args=(device,), name=name, daemon=True))
                threads[-1].start()

    def _serve(self, device: Device) -> None:
        with contextlib.suppress(Cancelled):
            try:
                while (bundle := self._next(device)) is not None:
                    self._work(bundle, device)
            except Cancelled:
                raise
            except BaseException as e:  # a full disk or a bug: the main thread reports it
                self._error = e

    def _next(self, device: Device) -> _Bundle | None:
        """Waits for the next bundle for such a GPU; None at the end."""
        with self._condition:
            while not self._closed:
                now = time.monotonic()
                for bundle in self._waiting:
                    if bundle.left[0] == device.type and bundle.not_before <= now:
                        self._waiting.remove(bundle)
                        return bundle
                self._condition.wait(_TICK_S)
        return None

    def _work(self, bundle: _Bundle, device: Device) -> None:
        name = bundle.outcome.name
        bundle.attempts += 1
        self._begun(name, device)
        outcome = dataclasses.replace(self._gpus.run(name, device), attempts=bundle.attempts)
        again = outcome.passing and bundle.attempts <= self._retries
        self._ended(name, outcome, again)
        if again:
            bundle.not_before = time.monotonic() + pause_s(outcome.exit_code, bundle.attempts)
        else:
            bundle.ended.append(outcome)
            bundle.left.pop(0)
            bundle.attempts = 0
        if not bundle.left:
            self._finished(bundle.outcome.with_engines(bundle.ended))
        with self._condition:
            if bundle.left and not self._closed and not self._stopped:
                self._waiting.append(bundle)
            else:
                self._unfinished -= 1
            self._condition.notify_all()
