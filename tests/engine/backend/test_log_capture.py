"""What TensorRT says reaches the call that it is about; the fraction that its nested build phases add up to."""

import concurrent.futures
import types

import pytest

from vit_convert.core.progress import Progress
from vit_convert.engine.backend.log_capture import BuildClock, make_logger, make_monitor

QUIET = Progress(quiet=True)


class ILogger:
    ERROR, INTERNAL_ERROR, WARNING = range(3)


class IProgressMonitor:
    pass


MODULE = types.SimpleNamespace(ILogger=ILogger, IProgressMonitor=IProgressMonitor)


@pytest.fixture
def logger():
    return make_logger(MODULE)


@pytest.fixture
def elsewhere():
    """Runs a function in another thread, always the same."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def test_threads_hear_their_own_calls(logger, elsewhere):
    def load():
        with logger.listening(QUIET):
            logger.log(ILogger.ERROR, "does not load")
            return logger.explain()

    with logger.listening(QUIET):
        logger.log(ILogger.ERROR, "does not build")
        logger.log(ILogger.WARNING, "slow")
        assert elsewhere(load) == "does not load"
        logger.log(ILogger.ERROR, "at all")
        assert (logger.errors, logger.warnings) == (["does not build", "at all"], ["slow"])
    assert logger.explain() == "does not build; at all"  # still there for whoever asks afterwards
    with logger.listening(QUIET):
        assert logger.explain() == "TensorRT gave no reason"


def test_tensorrts_own_threads_are_heard(logger, elsewhere, capsys):
    with logger.listening(Progress()):
        elsewhere(logger.log, ILogger.ERROR, "no tactic")
        elsewhere(logger.log, ILogger.WARNING, "slow")
        assert (logger.explain(), logger.warnings) == ("no tactic", ["slow"])
    assert capsys.readouterr().err == "warning: TensorRT: slow\n"


def test_what_nobody_listens_to_is_bounded(logger):
    for i in range(1000):
        logger.log(ILogger.ERROR, f"error {i}")
        logger.log(ILogger.WARNING, f"warning {i}")
    assert len(logger.errors) == len(logger.warnings) == 100 and logger.errors[-1] == "error 999"


class FullDisk(Progress):
    def warn(self, text):
        raise OSError("full disk")


def test_callbacks_keep_their_failures_for_the_build(logger, elsewhere):
    def load():
        with logger.listening(QUIET):
            pass

    with pytest.raises(OSError, match="full disk"), logger.listening(FullDisk()):
        elsewhere(logger.log, ILogger.WARNING, "slow")
        elsewhere(load)
        assert isinstance(logger.failure, OSError)


def test_a_failure_is_that_of_the_block_that_failed(logger, elsewhere):
    """TensorRT's own threads tell every open block; whose disk is full is known."""

    def load():
        with logger.listening(QUIET):
            with concurrent.futures.ThreadPoolExecutor(1) as tensorrts:
                tensorrts.submit(logger.log, ILogger.WARNING, "slow").result()
            assert logger.failure is None

    with pytest.raises(OSError, match="full disk"), logger.listening(FullDisk()):
        elsewhere(load)


class Interrupted(Progress):
    def warn(self, text):
        raise KeyboardInterrupt


def test_interrupt_during_a_callback_ends_the_block(logger):
    with pytest.raises(KeyboardInterrupt), logger.listening(Interrupted()):
        logger.log(ILogger.WARNING, "slow")
        went_on = True
    assert went_on  # nothing unwinds through TensorRT
    with logger.listening(QUIET):  # once is enough
        pass


def test_an_error_of_the_block_itself_comes_first(logger):
    with pytest.raises(ValueError, match="no engine"), logger.listening(Interrupted()):
        logger.log(ILogger.WARNING, "slow")
        raise ValueError("no engine")


def test_interrupt_in_another_thread_ends_the_build(logger, elsewhere):
    def interrupt(amount):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), logger.listening(QUIET):
        monitor = make_monitor(MODULE, logger, interrupt)
        elsewhere(monitor.phase_start, "build", None, 2)
        assert elsewhere(monitor.step_complete, "build", 0) is False
        assert isinstance(logger.failure, KeyboardInterrupt)


def test_nested_phases_add_up_and_only_grow():
    steps = []
    clock = BuildClock(steps.append)
    clock.start("build", None, 2)
    clock.step("build", 0)  # half of all
    assert sum(steps) == pytest.approx(1 / 2)
    clock.start("subgraph", "build", 4)
    clock.step("subgraph", 0)  # a quarter of the second half
    assert sum(steps) == pytest.approx(1 / 2 + 1 / 8)
    clock.start("tactics", "subgraph", 10)
    clock.step("tactics", 4)  # half of the second quarter of the second half
    assert sum(steps) == pytest.approx(1 / 2 + 1 / 8 + 1 / 16)
    # a second child within the same step starts from the step's beginning: no step back
    clock.start("again", "subgraph", 1)
    assert sum(steps) == pytest.approx(1 / 2 + 1 / 8 + 1 / 16)
    for phase in ("again", "tactics", "subgraph", "build"):
        clock.finish(phase)
    assert sum(steps) == pytest.approx(1.0)
    assert min(steps) > 0
