"""Identifies a user's own model without running it: by the function that JAX traces, and every parameter."""

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.extend import core

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")  # of functions, in the text of a jaxpr: different in each process


def fingerprint(function: Callable[..., Any], arguments: Iterable[Any], leaves: Iterable[tuple[str, Any]]) -> str:
    """Hashes a model.

    Args:
        function: to be traced.
        arguments: descriptions of its arguments' shapes and types.
        leaves: (name, value) of all parameters.

    Returns:
        A sha256 in hex. The same function with the same parameters has the same hash in every process; a function with
        another jaxpr, or a parameter with a different bit, has another.
    """
    digest = hashlib.sha256()
    closed = jax.make_jaxpr(function)(*arguments)
    digest.update(_ADDRESS.sub("", str(closed)).encode())
    for constant in closed.consts:
        _add(digest, constant)
    _add_constants(digest, closed.jaxpr)
    for name, value in leaves:
        digest.update(name.encode())
        _add(digest, value)
    return digest.hexdigest()


def _add_constants(digest: Any, jaxpr: Any) -> None:
    """Adds the arrays within a jaxpr, of which its text shows only the first few numbers."""
    for eqn in jaxpr.eqns:
        for variable in eqn.invars:
            if isinstance(variable, core.Literal) and np.ndim(variable.val):
                _add(digest, variable.val)
        stack = list(eqn.params.values())
        while stack:
            value = stack.pop()
            if isinstance(value, core.ClosedJaxpr):
                for constant in value.consts:
                    _add(digest, constant)
                _add_constants(digest, value.jaxpr)
            elif isinstance(value, core.Jaxpr):
                _add_constants(digest, value)
            elif isinstance(value, tuple | list):
                stack.extend(value)


def _add(digest: Any, value: Any) -> None:
    if hasattr(value, "dtype") and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if not hasattr(value, "dtype") and not isinstance(value, int | float | complex):
        digest.update(_ADDRESS.sub("", repr(value)).encode())
        return
    array = np.ascontiguousarray(value)
    digest.update(f"{array.dtype}{array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8))
