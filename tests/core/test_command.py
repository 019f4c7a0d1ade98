"""How a command line ends: its exit code, and one message without a traceback."""

import pytest

from vit_convert.core.command import exit_code
from vit_convert.core.errors import CheckpointError


def ended(capsys, end, *, debug=False):
    """(exit code, what was printed as an error) of a command that ends so."""

    def run():
        if isinstance(end, BaseException):
            raise end
        return end

    code = exit_code(run, debug=debug, when_interrupted="the same command continues")
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


def test_the_commands_own_code(capsys):
    assert ended(capsys, 0) == (0, "") and ended(capsys, 9) == (9, "")


def test_a_users_error(capsys):
    error = CheckpointError("x.npz: cannot be read", fix="Check the path.")
    assert ended(capsys, error) == (3, "error: x.npz: cannot be read\n  Check the path.\n")
    assert ended(capsys, CheckpointError("x.npz: empty")) == (3, "error: x.npz: empty\n")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ended(capsys, error, debug=True)


@pytest.mark.parametrize("debug", [False, True])
def test_an_interrupt(capsys, debug):
    assert ended(capsys, KeyboardInterrupt(), debug=debug) == (130, "\ninterrupted: the same command continues\n")
    assert ended(capsys, KeyboardInterrupt("SIGHUP"), debug=debug) == (130, "\nSIGHUP: the same command continues\n")


def test_memory_that_runs_out(capsys):
    more = "\n  Run it again with more memory, or with smaller calibration.batch_size and fewer images.\n"
    assert ended(capsys, MemoryError()) == (130, f"error: out of memory: the same command continues{more}")
    assert ended(capsys, MemoryError("7 GiB")) == (
        130,
        f"error: out of memory (7 GiB): the same command continues{more}",
    )
    with pytest.raises(MemoryError):
        ended(capsys, MemoryError(), debug=True)


def test_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError):
        ended(capsys, ZeroDivisionError())
