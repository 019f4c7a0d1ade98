"""TensorRT's log and progress, shown to people and kept for error messages."""

import contextlib
import dataclasses
import re
import threading
from collections.abc import Iterator
from typing import Any

from vit_convert.core.progress import Advance, Progress

# These accompany every error on a machine without a GPU, and explain nothing.
_NOISE = re.compile(r"catchCudaError|--- (Begin|End) node ---")
# Warnings for graphs that are exactly what TensorRT 8.6 needs: shapes in INT64, and an attention plugin without INT8's
# fields.
_HARMLESS = re.compile(r"generated with INT64 weights|Attribute (dq_probs|use_int8_scale_max) not found in plugin node")
_NODE_NAME = re.compile(r'^\s*(?:Node name: |name: ")([^"\n]+)', re.MULTILINE)
_MAX_LINES = 4
_MAX_KEPT = 100  # messages kept of one kind; a server may run for months


def without_noise(text: str) -> str:
    """The first distinct lines of an error text, joined into one line, without lines that explain nothing."""
    lines = dict.fromkeys(line.strip() for line in text.splitlines())
    return "; ".join([line for line in lines if line and not _NOISE.search(line)][:_MAX_LINES])


@dataclasses.dataclass(eq=False)
class Heard:
    """What TensorRT said during one `listening` block.

    Attributes:
        progress: gets the warnings; None for nobody.
        errors: the newest last.
        warnings: each once, the newest last.
        failure: an exception that a callback could not raise through TensorRT's C++, such as Ctrl-C or a full disk.
    """

    progress: Progress | None = None
    errors: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    failure: BaseException | None = None

    def hear_error(self, text: str) -> None:
        """Keeps an error."""
        self.errors.append(text)
        del self.errors[:-_MAX_KEPT]

    def hear_warning(self, text: str) -> None:
        """Keeps a warning and passes it on, the first time."""
        if text not in self.warnings and not _HARMLESS.search(text):
            self.warnings.append(text)
            del self.warnings[:-_MAX_KEPT]
            if self.progress is not None:
                self.progress.warn(f"TensorRT: {text}")


def make_logger(module: Any) -> Any:
    """Makes the logger of a backend, which keeps the messages of each thread's calls apart.

    Args:
        module: tensorrt or tensorrt_rtx.

    Returns:
        An `ILogger` with `listening(progress)`, and of the calling thread's last such block `heard`, `errors`,
        `warnings`, `failure`, `explain()` and `node_name()`.
    """

    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self._local = threading.local()
            self._open: list[Heard] = []

        @property
        def heard(self) -> Heard:
            if not hasattr(self._local, "heard"):
                self._local.heard = Heard()
            return self._local.heard

        @property
        def errors(self) -> list[str]:
            return self.heard.errors

        @property
        def warnings(self) -> list[str]:
            return self.heard.warnings

        @property
        def failure(self) -> BaseException | None:
            return self.heard.failure

        def log(self, severity: Any, text: str) -> None:
            # Nothing may unwind through TensorRT's C++.
            heard: Heard | None = None
            try:
                for heard in self._listeners():
                    if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                        heard.hear_error(text)
                    elif severity == module.ILogger.WARNING:
                        heard.hear_warning(text)
            except BaseException as e:
                (heard or self.heard).failure = e

        def _listeners(self) -> list[Heard]:
            if hasattr(self._local, "heard"):
                return [self.heard]
            # A thread that never listened is one of TensorRT's own, which works for an unknown one of the open blocks.
            return list(self._open) or [self.heard]

        @contextlib.contextmanager
        def listening(self, progress: Progress | None = None) -> Iterator[None]:
            """Starts with empty lists, and forwards warnings to `progress`, if given, during the block.

            Raises:
                BaseException: what a callback could not raise, unless the block itself raises an error.
            """
            heard = self._local.heard = Heard(progress)
            self._open.append(heard)
            try:
                yield
            finally:
                self._open.remove(heard)
            if heard.failure is not None:
                raise heard.failure

        def explain(self) -> str:
            """The errors so far as one text, without the lines that explain nothing."""
            return without_noise("\n".join(self.errors)) or "TensorRT gave no reason"

        def node_name(self) -> str:
            """The ONNX node that the errors so far are about, or ""; TensorRT 8.6's parser reports it only here."""
            found = _NODE_NAME.findall("\n".join(self.errors))
            return found[-1] if found else ""

    return Logger()


class BuildClock:
    """Turns TensorRT's tree of build phases into one fraction that only grows.

    A phase fills one step of its parent, so its span is the parent's span divided by the parent's number of steps.

    Args:
        advance: called with each increase; the increases sum to 1 for a finished build.
    """

    def __init__(self, advance: Advance):
        self._advance = advance
        self._reached = 0.0
        self._phases: dict[str, tuple[float, float, int]] = {}  # start, span, steps
        self._position: dict[str, float] = {}
        self._lock = threading.Lock()  # subgraphs are built on several threads

    def start(self, phase: str, parent: str | None, num_steps: int) -> None:
        """Enters a phase of `num_steps` steps, within `parent` unless it is the outermost."""
        with self._lock:
            begin, span = 0.0, 1.0
            if parent in self._phases:
                _, parent_span, parent_steps = self._phases[parent]
                begin, span = self._position[parent], parent_span / max(parent_steps, 1)
            self._phases[phase] = (begin, span, num_steps)
            self._position[phase] = begin

    def step(self, phase: str, step: int) -> None:
        """Marks step number `step` (from 0) of a phase as done."""
        with self._lock:
            begin, span, num_steps = self._phases[phase]
            self._reach(phase, begin + span * (step + 1) / max(num_steps, 1))

    def finish(self, phase: str) -> None:
        """Leaves a phase, all of its steps done."""
        with self._lock:
            begin, span, _ = self._phases[phase]
            self._reach(phase, begin + span)

    def _reach(self, phase: str, position: float) -> None:
        self._position[phase] = position
        if position > self._reached:
            self._advance(position - self._reached)
            self._reached = position


def make_monitor(module: Any, logger: Any, advance: Advance) -> Any:
    """Makes an `IProgressMonitor` that drives a progress bar and stops the build on Ctrl-C.

    Args:
        module: a backend's package that has `IProgressMonitor`.
        logger: the backend's logger, listening for the build, which keeps an interrupt for afterwards.
        advance: advances a bar of total 1.

    Returns:
        The monitor; the caller keeps it alive during the build.
    """
    clock, heard = BuildClock(advance), logger.heard  # of this thread: TensorRT may call from others

    class Monitor(module.IProgressMonitor):
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._guarded(clock.start, phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._guarded(clock.step, phase_name, step)
            return heard.failure is None

        def phase_finish(self, phase_name: str) -> None:
            self._guarded(clock.finish, phase_name)

        def _guarded(self, function: Any, *arguments: Any) -> None:
            try:
                function(*arguments)
            except BaseException as e:
                heard.failure = e

    return Monitor()
