"""What TensorRT says reaches the call that it is about; the fraction that its nested build phases add up to."""

import concurrent.futures
import types

import pytest

from vit_convert.core.progress import Progress
from vit_convert.engine.backend.log_capture import BuildClock, make_logger, make_monitor, without_noise

QUIET = Progress(quiet=True)


class ILogger:
    """Its severities have no order, as those of the bindings."""

    ERROR, INTERNAL_ERROR, WARNING, INFO, VERBOSE = (object() for _ in range(5))


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


@pytest.mark.parametrize("steps", [0, 1])
def test_a_phase_of_no_steps_is_one_that_ends(steps):
    """TensorRT announces phases in which it then finds nothing to do, and may begin others within them."""
    told = []
    clock = BuildClock(told.append)
    clock.start("build", None, steps)
    clock.start("inner", "build", steps)
    clock.step("inner", 0)  # of one step, or of none
    assert sum(told) == pytest.approx(1.0)
    for phase in ("inner", "build"):
        clock.finish(phase)
    assert sum(told) == pytest.approx(1.0)


def test_only_what_explains_is_told_and_no_more_than_four_lines():
    noise = ["CUDA initialization failure: catchCudaError", "--- Begin node ---", "--- End node ---", "", "  "]
    said = ["a", *noise, "b", " a ", "c", "d", "e"]
    assert without_noise("\n".join(said)) == "a; b; c; d"
    assert without_noise("\n".join(noise)) == without_noise("") == ""


def test_the_node_is_the_last_that_was_named(logger):
    assert logger.node_name() == ""
    for text in ("Node name: first\nmore", 'input: "x"\nname: "second"\nop_type: "Relu"', "of none"):
        logger.log(ILogger.ERROR, text)
    assert logger.node_name() == "second"


def test_what_is_said_of_every_graph_is_no_warning(logger, capsys):
    """By TensorRT 8.6, of the shapes and plugins that it is meant to be given."""
    harmless = "Your ONNX model has been generated with INT64 weights", "Attribute dq_probs not found in plugin node"
    with logger.listening(Progress()):
        for text in (*harmless, "twice", "twice", "Attribute other not found in plugin node"):
            logger.log(ILogger.WARNING, text)
    assert logger.warnings == ["twice", "Attribute other not found in plugin node"]
    assert capsys.readouterr().err.count("warning: TensorRT: twice") == 1


def test_chatter_is_dropped(logger, capsys):
    with logger.listening(Progress()):
        for severity in (ILogger.INFO, ILogger.VERBOSE):
            logger.log(severity, "timing a tactic")
        logger.log(ILogger.INTERNAL_ERROR, "assertion")
    assert (logger.errors, logger.warnings) == (["assertion"], []) and capsys.readouterr().err == ""
