"""Running code that is not ours: what it raises becomes one message that says where. Also, how a function is recorded
on disk."""

import contextlib
import functools
import hashlib
import inspect
import os
import pathlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from vit_convert.core.errors import ConvertError

_FIX = "--debug shows the whole traceback."
_LONGEST_MESSAGE = 600  # characters; JAX and Flax say first what is wrong
_PACKAGES = {"site-packages", "dist-packages"}  # these lie within the standard library's folder
_MACHINERY = (
    *("vit_convert", "jax", "jaxlib", "jax2onnx", "flax", "numpy", "ml_collections", "absl"),
    *("onnx", "onnx_ir", "onnxscript", "onnxruntime"),
)


@contextlib.contextmanager
def user_code(
    what: str, error: type[ConvertError], *, fix: str | Callable[[BaseException], str] = _FIX
) -> Iterator[None]:
    """Runs code that is not ours: whatever it raises, even by sys.exit(), becomes an error of ours, except an
    interrupt.

    Args:
        what: what is run, for the message: "config.model: the call model(images)".
        error: what to raise.
        fix: what to do about it, or a function that says so for an exception.

    Raises:
        ConvertError: of the class `error`; a ConvertError raised by the code itself passes unchanged.
    """
    try:
        yield
    except ConvertError:
        raise
    except (Exception, SystemExit) as e:
        raise error(f"{what}: {explain(e)}", fix=fix if isinstance(fix, str) else fix(e)) from e


def explain(error: BaseException) -> str:
    """An exception in one line: its class, its message, and the last line of its traceback that is the user's own."""
    said = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        said = f"it ends the process with {error.code!r}"
    if len(said) > _LONGEST_MESSAGE:
        said = f"{said[:_LONGEST_MESSAGE]} …"
    return f"{type(error).__name__}: {said}{where(error)}"


def where(error: BaseException) -> str:
    """ " (mine.py:12: return x @ w)", the last line of an exception's traceback outside the libraries and our own code;
    "" if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    machinery = _machinery()
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_machinery(frame.filename, machinery)]
    return f" ({own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else ""


def _machinery() -> tuple[str, ...]:
    """The folders, or single files, of the libraries and of our own code, wherever each was installed from."""
    found = []
    for name in _MACHINERY:
        if file := getattr(sys.modules.get(name), "__file__", None):
            folder, base = os.path.split(os.path.abspath(file))
            found.append(os.path.join(folder, "" if base.startswith("__init__.") else base))
    return tuple(found)


def _is_machinery(filename: str, machinery: tuple[str, ...]) -> bool:
    path = os.path.abspath(filename)
    if filename.startswith("<") or path.startswith(machinery):
        return True
    paths = sysconfig.get_paths()
    standard = tuple(os.path.join(paths[key], "") for key in ("stdlib", "platstdlib"))
    return path.startswith(standard) and not _PACKAGES & {*pathlib.PurePath(path).parts}


def describe_function(function: Callable[..., Any]) -> dict[str, str]:
    """Describes a function in a form that other hosts can read, unlike its address in memory.

    Args:
        function: any callable.

    Returns:
        {"function": its qualified name, "file": where it is defined, "sha256": of that file}; the last two are "" if
        there is no file.
    """
    inner = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    code = getattr(inner, "__code__", None)
    file = code.co_filename if code is not None else ""
    path = pathlib.Path(file)
    content = path.read_bytes() if file and path.is_file() else None
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return {
        "function": name,
        "file": str(path.absolute()) if content is not None else "",
        "sha256": hashlib.sha256(content).hexdigest() if content is not None else "",
    }
