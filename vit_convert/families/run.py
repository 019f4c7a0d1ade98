"""Runs a model for its reference: whole, or part by part, so that equal blocks are compiled once and only one is on the
device at a time."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vit_convert.core.warm import shared


def with_first(results: Mapping[str, Any], taps: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What the modules return: a model's first output, and by name its others and the taps.

    Args:
        results: the outputs by name, at least one.
        taps: by name.

    Example:
        >>> with_first({"logits": 1, "tokens": 2}, {"block_00": 3})
        (1, {'tokens': 2, 'block_00': 3})
    """
    first, *others = results
    return results[first], {**{name: results[name] for name in others}, **taps}


def by_name(found: tuple[Any, Mapping[str, Any]], names: Sequence[str], taps: Sequence[str]) -> dict[str, Any]:
    """The inverse of `with_first`.

    Args:
        found: what a module returned.
        names: of the outputs, in order.
        taps: the requested ones.

    Example:
        >>> by_name((1, {"tokens": 2, "block_00": 3, "block_01": 4}), ["logits", "tokens"], ["block_01"])
        {'logits': 1, 'tokens': 2, 'block_01': 4}
    """
    first, rest = found
    return {names[0]: first, **{name: rest[name] for name in [*names[1:], *taps]}}


def compiled(module: Any, method: Any = None, **fixed: Any) -> Any:
    """A Flax module's `apply`, compiled; equal modules share it in a process that keeps results (`core.warm`).

    Args:
        module: holds no parameters.
        method: what to call; None for `__call__`.
        fixed: further arguments of it.

    Returns:
        A function from (variables, *inputs) to the method's result.
    """

    def make() -> Any:
        return jax.jit(functools.partial(module.apply, method=method, **fixed))

    return shared(("compiled", module, method, tuple(fixed.items())), make)


def whole(
    function: Callable[..., Mapping[str, Any]], params: Mapping[str, np.ndarray]
) -> Callable[..., dict[str, np.ndarray]]:
    """The `run` of a model that is small enough to be compiled as a whole.

    Args:
        function: maps (parameters, *inputs) to {output or tap: array}, for all blocks.
        params: by their names; read when the model runs.

    Returns:
        A function from the inputs, numpy arrays, to {output or tap: numpy array}, in float32 and at the highest matmul
        precision.
    """
    jitted = jax.jit(function)

    def run(*inputs: np.ndarray) -> dict[str, np.ndarray]:
        with jax.default_matmul_precision("highest"):
            return {name: np.asarray(array) for name, array in jitted({**params}, *map(jnp.asarray, inputs)).items()}

    return run


def under(params: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """The parameters below a scope, such as "MixerBlock_3/", nested as in Flax."""
    leaves = {name.removeprefix(prefix): jnp.asarray(params[name]) for name in params if name.startswith(prefix)}
    return traverse_util.unflatten_dict(leaves, sep="/")


def outside(params: Mapping[str, np.ndarray], scopes: Sequence[str]) -> dict[str, Any]:
    """The variables of a model without its blocks, the parameters below these scopes, which are run separately."""
    leaves = {name: jnp.asarray(params[name]) for name in params if not name.startswith(tuple(scopes))}
    return {"params": traverse_util.unflatten_dict(leaves, sep="/")}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Flax variables made from flat leaves."""
    return {"params": traverse_util.unflatten_dict(dict(leaves), sep="/")}


def param_shapes(module: Any, image_size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a module of images under its `/`-joined name, without allocating any."""

    def find() -> dict[str, tuple[int, ...]]:
        images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
        variables: Any = jax.eval_shape(module.init, jax.random.key(0), images)
        leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
        return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}

    return dict(shared(("shapes", module, image_size), find))
