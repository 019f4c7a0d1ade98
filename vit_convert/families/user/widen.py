"""Computes in float32 what a model computes in bfloat16, float16 or float64: precision is chosen in the graph, not in
the model."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

# Primitives that call a function; the function is computed in their place.
_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "checkpoint",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
}


def other_floats(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """Names the floating-point types other than float32 used by a function.

    Args:
        function: to be traced.
        arguments: arrays, or descriptions of their shape and type.

    Returns:
        For example ["bfloat16"]; empty if everything is float32.
    """
    found: set[str] = set()
    _collect(jax.make_jaxpr(function)(*arguments).jaxpr, found)
    return sorted(found)


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that computes the same, entirely in float32."""

    def widened(*arguments: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = _evaluate(closed.jaxpr, closed.consts, jax.tree_util.tree_leaves(arguments))
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(shapes), results)

    return widened


def _is_other(dtype: Any) -> bool:
    # in this order: the type of a random key is unknown to NumPy
    return jnp.issubdtype(dtype, np.floating) and np.dtype(dtype) != np.float32


def _collect(jaxpr: Any, found: set[str]) -> None:
    for variable in (*jaxpr.invars, *(v for eqn in jaxpr.eqns for v in (*eqn.invars, *eqn.outvars))):
        if _is_other(dtype := getattr(variable.aval, "dtype", None)):
            found.add(np.dtype(dtype).name)
    for eqn in jaxpr.eqns:
        for inner in _jaxprs(eqn.params.values()):
            _collect(inner, found)


def _jaxprs(values: Any) -> Any:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _jaxprs(value)


def _float32(value: Any) -> Any:
    return jnp.asarray(value, jnp.float32) if _is_other(getattr(value, "dtype", None)) else value


def _evaluate(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr with every floating-point type float32, whereas `jax.core.eval_jaxpr` keeps the types."""
    known: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), map(_float32, (*constants, *arguments))))

    def read(variable: Any) -> Any:
        return _float32(variable.val) if isinstance(variable, core.Literal) else known[variable]

    for eqn in jaxpr.eqns:
        inputs = [read(variable) for variable in eqn.invars]
        known.update(zip(eqn.outvars, _apply(eqn, inputs)))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(eqn: Any, inputs: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    if name == "reduce_precision":
        return inputs
    if name in _CALLS:
        called = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if isinstance(called, core.ClosedJaxpr):
            return _evaluate(called.jaxpr, called.consts, inputs)
        return _evaluate(called, (), inputs)
    results = eqn.primitive.bind(*inputs, **{key: _widen_parameter(value) for key, value in eqn.params.items()})
    return list(results) if eqn.primitive.multiple_results else [results]


def _widen_parameter(value: Any) -> Any:
    """A primitive's parameter with float32 types: a type by itself, or the body of a loop or a branch."""
    if isinstance(value, core.ClosedJaxpr):
        shapes = [_widen_shape(aval) for aval in value.in_avals]
        return jax.make_jaxpr(lambda *arguments: _evaluate(value.jaxpr, value.consts, arguments))(*shapes)
    if isinstance(value, tuple) and any(isinstance(part, core.ClosedJaxpr) for part in value):
        return tuple(map(_widen_parameter, value))
    is_type = isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic))
    return np.dtype(np.float32) if is_type and _is_other(value) else value


def _widen_shape(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, jnp.float32 if _is_other(aval.dtype) else aval.dtype)
