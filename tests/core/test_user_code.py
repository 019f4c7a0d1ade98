"""What foreign code raises, as one line that names the user's own; and a function told from another by its file, not by
its address."""

import functools
import hashlib
import inspect
import os
import sys
import sysconfig
import types

import numpy as np
import pytest

from vit_convert.core.errors import CheckpointError, ExportError, UsageError
from vit_convert.core.user_code import describe_function, explain, user_code

STDLIB, PACKAGES = (os.path.realpath(sysconfig.get_path(key)) for key in ("stdlib", "purelib"))


def raised(code):
    with pytest.raises(UsageError) as caught, user_code("the work", UsageError):
        code()
    return caught.value


def run_as(filename, source="raise KeyError('k')", **names):
    """Runs a text as if it stood in that file."""
    exec(compile(source, filename, "exec"), names)


def stop(error):
    raise error


def test_what_is_raised_becomes_an_error_of_ours():
    error = raised(lambda: stop(ValueError("too\n  many   rows")))
    assert str(error).startswith(f"the work: ValueError: too many rows ({__file__}:")
    assert "--debug" in error.fix and isinstance(error.__cause__, ValueError)
    assert type(error) is UsageError


def test_each_kind_keeps_its_exit_code():
    for kind in (UsageError, CheckpointError, ExportError):
        with pytest.raises(kind), user_code("it", kind):
            stop(OSError())


@pytest.mark.parametrize("error", [CheckpointError("mine"), KeyboardInterrupt(), GeneratorExit()])
def test_errors_of_ours_and_interrupts_pass(error):
    with pytest.raises(type(error)) as caught, user_code("it", UsageError):
        raise error
    assert caught.value is error


def test_an_exit_is_none():
    assert "the work: SystemExit: it ends the process with 3" in str(raised(lambda: stop(SystemExit(3))))
    assert "it ends the process with 'out of memory'" in str(raised(lambda: stop(SystemExit("out of memory"))))


def test_advice_may_depend_on_the_error():
    for fix, expected in (("Do this.", "Do this."), (lambda e: f"Mend {e}.", "Mend x.")):
        with pytest.raises(UsageError) as caught, user_code("it", UsageError, fix=fix):
            raise ValueError("x")
        assert caught.value.fix == expected


def test_long_messages_are_cut_behind_600_characters():
    assert explain(ValueError("a" * 600)) == "ValueError: " + "a" * 600
    assert explain(ValueError("a" * 599 + "bcd")) == "ValueError: " + "a" * 599 + "b …"


def test_the_line_is_the_last_of_the_users_own(tmp_path):
    """Called by ours, it calls a library, which raises: the innermost line that the user wrote is what they look
    for."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def outer():\n    return inner()\n\ndef inner():\n    return np.linalg.inv(np.zeros((2, 3)))\n\nouter()\n"
    )
    error = raised(lambda: run_as(str(mine), mine.read_text(), np=np))
    assert f" ({mine}:5: return np.linalg.inv(np.zeros((2, 3))))" in str(error)


@pytest.fixture(
    params=[
        PACKAGES,
        "/home/me/.local/lib/python3.11/site-packages",
        "/usr/lib/python3/dist-packages",
        "/opt/libraries",
    ]
)
def installed(request, monkeypatch):
    """A folder in which the libraries lie: the interpreter's own, a user's, Debian's, one of PYTHONPATH."""
    for name in ("jax", "flax", "numpy", "onnx"):
        module = types.ModuleType(name)
        module.__file__ = f"{request.param}/{name}/__init__.py"
        monkeypatch.setitem(sys.modules, name, module)
    module = types.ModuleType("onnx_ir")
    module.__file__ = f"{request.param}/onnx_ir.py"
    monkeypatch.setitem(sys.modules, "onnx_ir", module)
    monkeypatch.setitem(sys.modules, "absl", types.ModuleType("absl"))  # of a namespace: it has no file
    return request.param


def said_of(filename):
    with pytest.raises(KeyError) as caught:
        run_as(filename)
    # without this test's own lines
    return explain(caught.value.with_traceback(caught.value.__traceback__.tb_next.tb_next))


@pytest.mark.parametrize(
    ("name", "is_own"),
    [
        ("theirmodel/layers.py", True),
        ("theirmodel.py", True),
        ("theirmodel/jax/layers.py", True),
        ("jaxtyping/check.py", True),  # it only begins like a library
        ("onnxmltools.py", True),
        ("jax/_src/core.py", False),
        ("flax/linen/module.py", False),
        ("numpy/linalg/linalg.py", False),
        ("onnx_ir.py", False),
    ],
)
def test_whose_a_file_among_the_packages_is(installed, name, is_own):
    """Whoever shares a model as a package wants to see its line, and not that of the library below."""
    assert said_of(f"{installed}/{name}") == "KeyError: 'k'" + (f" ({installed}/{name}:1: )" if is_own else "")


@pytest.mark.parametrize(
    ("filename", "is_own"),
    [
        ("/home/me/model.py", True),
        ("/home/me/jax/model.py", True),
        (f"{STDLIB}/json/decoder.py", False),
        (f"{STDLIB}/ast.py", False),
        (f"{STDLIB}/site-packages/theirs.py", True),
        (f"{STDLIB}/dist-packages/theirs.py", True),
        (f"{STDLIB}-of-mine/model.py", True),
        (inspect.getfile(explain), False),
        (os.path.join(os.path.dirname(inspect.getfile(explain)), "..", "export", "trace.py"), False),
        ("<frozen importlib._bootstrap>", False),
    ],
)
def test_whose_a_file_is(filename, is_own):
    assert said_of(filename) == "KeyError: 'k'" + (f" ({filename}:1: )" if is_own else "")


def test_a_file_that_is_no_python_names_its_line(tmp_path):
    assert f" ({tmp_path}/m.py:2)" in str(raised(lambda: run_as(f"{tmp_path}/m.py", "x = 1\ndef f(:\n")))
    assert explain(SyntaxError("of nothing")) == "SyntaxError: of nothing"


def test_a_function_is_told_by_its_name_and_its_files_content():
    def inner():
        pass

    @functools.wraps(inner)
    def wrapped():
        pass

    with open(__file__, "rb") as file:
        here = {"file": __file__, "sha256": hashlib.sha256(file.read()).hexdigest()}
    name = "test_a_function_is_told_by_its_name_and_its_files_content.<locals>.inner"
    for function in (inner, wrapped, functools.partial(inner, 1), functools.partial(wrapped)):
        assert describe_function(function) == {"function": name, **here}


def test_a_function_without_a_file():
    class Model:
        def __call__(self):
            pass

    nothing = {"file": "", "sha256": ""}
    assert describe_function(len) == {"function": "len", **nothing}
    assert describe_function(Model()) == {
        "function": f"{test_a_function_without_a_file.__name__}.<locals>.Model",
        **nothing,
    }
    names = {}
    exec(compile("def f(): pass", "/gone/model.py", "exec"), names)
    assert describe_function(names["f"]) == {"function": "f", **nothing}


def test_a_relative_file_is_told_by_its_whole_path(tmp_path, monkeypatch):
    (tmp_path / "m.py").write_text("def f(): pass\n")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile("def f(): pass", "m.py", "exec"), names)
    sha256 = hashlib.sha256(b"def f(): pass\n").hexdigest()
    assert describe_function(names["f"]) == {"function": "f", "file": str(tmp_path / "m.py"), "sha256": sha256}
