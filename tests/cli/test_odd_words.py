"""Odd words on both command lines: exit 2, 3 or 6 with one message, never a traceback."""

import contextlib
import io

import pytest

from vit_convert.engine.__main__ import main as engine_main

LONG, NUL = "x" * 300, "a\0b"
PATHS = ("", LONG, NUL, "\udcff", "/dev/null", "/dev/zero", "/proc/self/mem", "\n")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("flag", "codes"),
    [
        ("--config.checkpoint=", {2, 3}),
        ("--config.evaluation.data=", {0, 6}),  # none at all is given by ""
        ("--config.plan.file=", {0, 2}),
        ("--config=", {2}),
        ("--workdir=", {0, 2}),
        ("--config.variant=", {2}),
        ("--config.family=", {2}),
        ("--config.preprocess=", {2}),
        ("--config.name=", {2}),
        ("--until=", {0, 2}),
    ],
)
def test_conversion(convert, monkeypatch, tmp_path, path, flag, codes, capsys):
    monkeypatch.chdir(tmp_path)
    until = ["--until=images"] if flag != "--until=" or not path else []
    code = convert(f"{flag}{path}", *until)
    said = capsys.readouterr().err
    assert code in codes and "Traceback" not in said
    assert not code or "error: " in said


@pytest.mark.parametrize(
    "words",
    [
        ["build"],
        ["build", ""],
        ["build", LONG],
        ["build", NUL],
        [LONG],
        [NUL],
        ["\udcff"],
        ["build", "/dev/null"],
        ["build", ".", "--warmup=nan"],
        ["build", ".", "--config.engine.opt_level=9"],
        ["build", ".", "--config.batch.max"],
        ["build", ".", "--noconfig.batch.max"],
        ["build", ".", "--batches=" + "9" * 5000],
        ["--config.taps"],
    ],
)
def test_engine_commands(words):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        assert engine_main(["engine", *words]) == 2
    assert said.getvalue().startswith("error: ")


@pytest.mark.parametrize(
    ("words", "named", "allowed"),
    [
        (["--warmup=nan"], "--warmup=nan", "finite"),
        (["--warmup=-1"], "--warmup=-1", "3600"),
        (["--warmup=inf"], "--warmup=inf", "finite"),
        (["--duration=nan"], "--duration=nan", "finite"),
        (["--duration=-1"], "benchmark.seconds", "3600"),
    ],
)
def test_seconds_of_engine_commands(convert, words, named, allowed, capsys):
    assert convert("--until=check") == 0
    capsys.readouterr()
    assert engine_main(["engine", "benchmark", str(convert.bundle), *words]) == 2
    said = capsys.readouterr().err
    assert named in said and allowed in said


def test_switches_of_engine_commands(convert, capsys):
    """The value of a key may be the next word, and a switch takes none: the bundle is found all the same."""
    from vit_convert.config import default_config
    from vit_convert.engine.__main__ import override, parse

    convert("--until=checkpoint")
    bundle = str(convert.bundle)
    names, path, words = parse(
        ["engine", "build", "--config.batch.max", "16", "--config.engine.tf32", bundle, "--noconfig.taps"]
    )
    assert (tuple(names), path) == (("build",), bundle)
    config = default_config()
    config.checkpoint, config.name = "a.npz", "x"
    changed = override(config, words)
    assert (changed.batch.max, changed.engine.tf32, changed.taps) == (16, True, False)


@pytest.mark.parametrize("key", ["keep_fp32", "keep_fp16", "quantize_only"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_patterns_that_match_nothing(convert, key, precision, capsys):
    """Also where the precision asked for has no use for them: the name is wrong all the same."""
    assert convert(f"--config.precision={precision}", f"--config.{key}=('block_00','blok_01')") == 2
    assert f"{key}: 'blok_01' matches no block, layer or node. Did you mean block_00" in capsys.readouterr().err
    assert "reference" not in convert.statuses()  # so nothing was computed for it
