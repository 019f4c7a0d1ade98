"""What a user gets wrong before anything is converted: exit code 2, one sentence, no traceback."""

import os
import subprocess
import sys

import pytest

from vit_convert.__main__ import main


@pytest.fixture
def fails(capsys):
    """Runs the command line, expects a failure and returns what it says."""

    def run(code: int, *arguments: str) -> str:
        assert main(["vit_convert", *arguments]) == code
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert "Traceback" not in message
        return message

    return run


def test_no_config(fails):
    assert "no --config given" in fails(2, "--workdir=out")


def test_nothing_at_all_shows_the_help(capsys):
    assert main(["vit_convert"]) == 2
    assert "Exit codes" in capsys.readouterr().out


def test_help_names_every_flag_and_key(capsys):
    from vit_convert.config import default_config
    from vit_convert.core.overrides import dotted_keys

    assert main(["vit_convert", "--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        "--workdir",
        "--until",
        "--force",
        "--quiet",
        "--debug",
        # what one tower of two takes for itself is told in one line
        *(f"config.{key} = " for key in dotted_keys(default_config()) if not key.startswith(("image.", "text."))),
        "config.image.KEY = ",  # any of the keys above
        "config.text.KEY = ",
    ):
        assert word in text.replace("--[no]", "--")


def test_unknown_config_names_the_nearest(fails):
    assert "Did you mean vit_b32.py" in fails(2, "--config=vit_b23.py")


def changing(line: str) -> str:
    lines = ["config = default_config()", line, "return config"]
    return "from vit_convert.config import default_config\n\ndef get_config():\n    " + "\n    ".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise RuntimeError('out of luck')", "RuntimeError: out of luck"),
        ("def get_config(:", "SyntaxError"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def get_config():\n    return 1 / 0", "ZeroDivisionError"),
        ("get = 1", "get_config"),
        ("def get_config():\n    return {}", "get_config() returned dict"),
        (changing("config.precison = 'fp16'"), "unknown key 'precison'. Did you mean precision"),
        (changing("config.batch.maxi = 1"), "unknown key 'maxi'. Did you mean max"),
        (changing("config.layout = 3"), "layout"),
    ],
)
def test_config_that_raises(fails, tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    error = fails(2, f"--config={tmp_path}/bad.py")
    assert message in error
    assert "bad.py" in error or "get_config() returned" in error


def test_config_without_the_ending(convert, tmp_path):
    """A config is Python, whatever its file is called."""
    convert.config = convert.config.rename(tmp_path / "tiny.config")
    assert convert("--until=checkpoint", "--config.name=tiny") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.precison=int8"], "--config.precison: unknown key. Did you mean precision"),
        (["--config.batch.max=many"], "--config.batch.max=many"),
        (["--config.precision=int9"], "'int9' is not one of"),
        (["--config.target=trt9"], "config.target='trt9': not one of"),
        (["--workdri=x"], "Unknown command line flag 'workdri'. Did you mean: workdir"),
        (["--force=perhaps"], "force"),
        (["surplus"], "unexpected argument 'surplus'"),
        (["--until=exprot"], "--until=exprot: not one of"),
        (["--config.image_size=40"], "image_size 40x40: not a multiple of the patch size 16"),
        (["--config.num_classes=3"], "config.num_classes=3: the checkpoint's head has 10 classes"),
        (["--config.family=mixar"], "mixar"),
        (["--config.checkpoint="], "config.checkpoint is empty"),
        (["--config.target=trt8", "--config.precision=fp8"], "target trt8 has no fp8"),
        (["--quiet", "--config.lowerings=primitives"], "lowering 'primitives': target rtx has only its own"),
        (
            ["--quiet", "--config.engine.lowering=plugin", "--config.target=trt11"],
            "lowering 'plugin': target trt11 has only its own",
        ),
        (
            ["--quiet", "--config.lowerings=matmull", "--config.target=trt8"],
            "lowering 'matmull': target trt8 has plugin, kernels, fused, matmul, primitives, windows, groupnorm, "
            "gather. Did you mean matmul",
        ),
    ],
)
def test_bad_flags(fails, convert, flags, message):
    assert message in fails(2, *convert.arguments(*flags))


def test_workdir_that_cannot_be_written(fails, convert, tmp_path):
    (tmp_path / "file").write_text("")
    convert.workdir = tmp_path / "file" / "out"
    error = fails(2, *convert.arguments())
    assert "cannot be written" in error
    assert "Give a writable --workdir." in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.checkpoint=no_such.npz"], "no_such.npz"),
        (["--config.variant=B/16"], "B/16"),
    ],
)
def test_checkpoint_that_is_not_what_was_asked_for(fails, convert, flags, message):
    assert message in fails(3, *convert.arguments(*flags))
    assert convert.report()["status"] == "failed"
    assert convert.statuses() == {"checkpoint": "failed"}


def test_debug_shows_where(convert):
    with pytest.raises(Exception, match="no_such"):
        convert("--config.checkpoint=no_such.npz", "--debug")


def test_flags_do_not_stay_from_call_to_call(convert):
    assert convert("--until=checkpoint") == 0
    assert convert() == 0
    assert "export" in convert.statuses()
    assert os.path.exists(convert.bundle / "model.onnx")


def test_a_log_on_a_full_disk_does_not_change_the_exit_code():
    """The device that is always full takes no message; what was wrong is still told by the code."""
    words = [sys.executable, "-m", "vit_convert", "--config=no_such_config.py"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(words, stdout=full, stderr=full, check=False).returncode == 2


TURNED = """
import os, signal
from vit_convert.core.command import exit_code

def run():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            pass
    except KeyboardInterrupt as e:
        raise ValueError("what JAX made of it") from e

raise SystemExit(exit_code(run, debug=False, when_interrupted="kept"))
"""


DROPPED = """
import os, signal, time
from vit_convert.core.command import exit_code

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

class Destroyed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGNAL)
        time.sleep(0.01)

def run():
    Destroyed()
    time.sleep(20)
    return 0

raise SystemExit(exit_code(run, debug=False, when_interrupted="kept"))
"""


@pytest.mark.parametrize(("name", "said"), [("SIGTERM", "ended by SIGTERM: kept"), ("SIGINT", "interrupted: kept")])
def test_an_interrupt_that_comes_where_python_drops_exceptions_ends_the_run_too(name, said):
    """As one did in a callback of the garbage collector that JAX has."""
    program = DROPPED.replace("SIGNAL", name)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=15)
    assert (done.returncode, done.stderr.strip()) == (130, said)


def test_an_interrupt_that_a_library_turned_into_an_error_is_still_one():
    done = subprocess.run([sys.executable, "-c", TURNED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (130, "ended by SIGTERM: kept")
