"""What every program of ours does alike: flags, --help, mistakes."""

import subprocess
import sys

import pytest
from absl import flags

from vit_convert.core.errors import UsageError
from vit_convert.core.program import Program

PROGRAMS = (
    "vit_convert",
    "vit_convert.batch",
    "vit_convert.engine",
    "vit_convert.families.random",
    "vit_convert.report",
    "vit_convert.report.sensitivity",
    "vit_convert.serve.triton",
)


@pytest.fixture
def program():
    made = Program("Does something.", when_interrupted="half is kept")
    flags.DEFINE_list("batches", ["1", "8"], "Images per run.", flag_values=made.flags)
    return made


def test_flags_of_an_earlier_command_line_are_forgotten(program):
    assert program.parse(["--batches=4", "one", "two"]) == ["one", "two"] and program.flags.batches == ["4"]
    assert program.parse([]) == [] and program.flags.batches == ["1", "8"]


def test_unknown_flag(program):
    with pytest.raises(UsageError, match="Unknown command line flag 'batch'"):
        program.parse(["--batch=3"])


@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_a_number_is_finite(program, value):
    """A bound does not refuse NaN, and seconds or GiB without end are a slip of the keyboard."""
    flags.DEFINE_float("seconds", 1.0, "How long.", flag_values=program.flags, lower_bound=0.0)
    with pytest.raises(UsageError, match=f"--seconds={float(value)}: must be a finite number"):
        program.parse([f"--seconds={value}"])


def test_how_it_ends(program, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert program.main(["p", "x"], lambda argv: len(argv)) == 2
    assert program.main(["p", "x"], interrupted) == 130
    assert "interrupted: half is kept" in capsys.readouterr().err
    assert program.main(["p"], lambda argv: 7) == 2  # a mistake, answered by the text of --help
    assert program.main(["p"], lambda argv: 7, needs_words=False) == 7


@pytest.mark.parametrize("words", ["", "Unable to allocate 3.00 GiB"])
def test_out_of_memory_is_no_bug(program, capsys, words):
    def allocate(argv):
        raise MemoryError(*filter(None, [words]))

    assert program.main(["p", "x"], allocate) == 130
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory") and words in said and "half is kept" in said
    with pytest.raises(MemoryError):
        program.main(["p", "x", "--debug"], allocate)


def test_debug_shows_the_traceback(program):
    def refuse(argv):
        raise UsageError("no")

    assert program.main(["p", "x"], refuse) == 2
    with pytest.raises(UsageError):
        program.main(["p", "x", "--debug"], refuse)


def test_help(program, capsys):
    assert program.main(["p", "--help"], lambda argv: 7) == 0
    assert capsys.readouterr().out == (
        "Does something.\n\nFlags:\n  --batches=1,8\n      Images per run.\n"
        "  --debug=False\n      Also show tracebacks of user errors.\n"
    )


def test_help_lists_the_keys_of_a_config_where_they_mean_something():
    text = Program("Does something.\n", when_interrupted="", takes_config=True).help()
    head, keys = text.split("\nConfig keys and defaults:\n")
    assert head.startswith("Does something.\n\nFlags:\n  --debug") and "config." not in head
    lines = keys.splitlines()
    assert all(line.startswith("  config.") for line in lines)
    assert '  config.precision = "' in keys and any(line.startswith("  config.batch.max = 64") for line in lines)
    assert not any("Config()" in line for line in lines)  # groups by themselves


@pytest.mark.parametrize("words", [["-h"], ["x", "--helpfull"], ["--helpshort", "x"]])
def test_help_by_its_other_names(program, words, capsys):
    assert program.main(["p", *words], lambda argv: 7) == 0
    assert capsys.readouterr().out.startswith("Does something.\n\nFlags:")


def test_a_bad_value_of_a_flag_is_told_how_flags_are_written(program):
    with pytest.raises(UsageError) as error:
        program.parse(["--debug=perhaps"])
    assert error.value.fix == "Flags are written --flag=value; --help lists them."


@pytest.mark.parametrize("module", PROGRAMS)
def test_each_program_answers_alike(module):
    """Help and usage: exit 0 and 2, and no traceback."""
    for words, code in ((["--help"], 0), ([], 2), (["--no_such_flag"], 2)):
        done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
        assert done.returncode == code and "Traceback" not in done.stderr, (words, done.stderr)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, ""),
        (["surplus"], 2, "error: unexpected argument 'surplus'"),
        (["--no_such_flag"], 2, "error: Unknown command line flag"),
        (["--nvcc=/no/such/compiler"], 7, "error: /no/such/compiler: no such compiler"),
    ],
)
def test_the_kernels_program_needs_no_words_and_answers_alike(words, code, said):
    done = subprocess.run(
        [sys.executable, "-m", "vit_convert.kernels", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == code and done.stderr.startswith(said) and "Traceback" not in done.stderr
