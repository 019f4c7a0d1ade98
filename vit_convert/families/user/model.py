"""A user's own model as a `Model` for the exporter: named float32 parameters, named outputs, one precision."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_convert.core.errors import ConvertError, ExportError, UsageError
from vit_convert.core.model import Arrays, Model
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.core.user_code import user_code
from vit_convert.families.user.call import Call, call_of, without_training
from vit_convert.families.user.identity import fingerprint
from vit_convert.families.user.outputs import choose, named, without_copies
from vit_convert.families.user.widen import in_float32, other_floats

INPUT = "images"
Shapes = dict[str, jax.ShapeDtypeStruct]  # of outputs, by name
_CONSTANT = re.compile(r"constant_\d+")  # the export's names for constants
_BATCHES = (1, 3)  # batch sizes, between which results may differ only in their first axis


def user_model(
    module: Any, variables: Any = None, *, image_shape: Sequence[int], output: str = "logits", num_classes: int = 0
) -> Model:
    """A user's own model.

    Args:
        module: a Linen module, called as `module.apply(variables, images)`; an NNX module, called as `module(images)`,
            whose state is its parameters; or a function `f(params, images)`. Arguments such as `train` are found by
            their names, and set for inference. It returns an array, or several in a dictionary, tuple, dataclass or any
            pytree.
        variables: the parameters: Linen variables (with or without the "params" level), or any pytree for a function.
        image_shape: (height, width, 3).
        output: name of the output to judge, which is also the name of an unnamed output.
        num_classes: that it must have; 0 for any number.

    Returns:
        The model; all of it is traced.

    Raises:
        UsageError: it is none of these, its parameters are missing, or it has several outputs and none is called
            `output`.
        ExportError: it fails, or does not return one result per image.
    """
    call = call_of(module, variables)
    leaves, structure = jax.tree_util.tree_flatten_with_path(call.tree)
    names = _unique(("/".join(_keys(path)[call.outer :]) for path, _ in leaves), taken=(INPUT, output))
    values = {name: leaf for name, (_, leaf) in zip(names, leaves)}
    params = {
        name: np.asarray(leaf, np.float32) for name, leaf in values.items() if _is_parameter(call.name, name, leaf)
    }
    shapes = {batch: jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32) for batch in _BATCHES}

    def function_of(run: Any) -> Any:
        def returned(arrays: Arrays, images: jax.Array) -> dict[str, Any]:
            # Integers, keys and whatever else is not a weight stay as they are: constants, which may be shapes or
            # indices.
            return named(
                run(jax.tree_util.tree_unflatten(structure, [arrays.get(name, values[name]) for name in names]), images)
            )

        return returned

    found, function = _try(call, function_of, params, shapes)
    choice = choose(found, output, taken=[INPUT, *params])
    choice = without_copies(choice, list(jax.make_jaxpr(function)(params, shapes[1]).jaxpr.outvars), sorted(found[1]))
    shape = found[1][next(iter(choice.names))].shape
    if num_classes and shape[-1] != num_classes:
        raise UsageError(
            f"config.num_classes={num_classes}: the output {choice.judged} of model {call.name} has shape "
            f"{tuple(shape)} for one image"
        )
    with user_code(f"config.model: {call.spoken}", ExportError):
        others = other_floats(function, params, shapes[1])
        identity = fingerprint(function, (params, shapes[1]), values.items())
    if others:
        function = in_float32(function)

    def apply(arrays: Arrays, images: jax.Array) -> Arrays:
        results = function(arrays, images)
        return {name: results[own] for own, name in choice.names.items()}

    compiled = jax.jit(apply)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with user_code(f"config.model: {call.spoken}", ExportError), jax.default_matmul_precision("highest"):
            return {name: np.asarray(value) for name, value in compiled(params, jnp.asarray(images)).items()}

    taps = list(choice.names.values())[1:]
    judge = "top1" if choice.judged == "logits" else "cosine"
    signature = Signature(
        (Tensor(INPUT, "float32", ("batch", *image_shape), "NHWC" if len(image_shape) == 3 else ""),),
        (Output(choice.judged, "float32", ("batch", *shape[1:]), judge=judge),),
    )
    return Model(
        signature=signature,
        params=params,
        taps=taps,
        apply=apply,
        traced_shapes={name: leaf.shape for name, leaf in params.items()},
        traced_taps=taps,
        run=run,
        name=call.name,
        identity=identity,
        warnings=_warnings(call, choice.left_out, others),
    )


def _try(call: Call, function_of: Any, params: Arrays, shapes: Mapping[int, Any]) -> tuple[dict[int, Shapes], Any]:
    """The outputs' shapes at each batch size, and the function that gives them: as called, or with its layers told that
    nothing trains."""

    def described(function: Any) -> dict[int, Shapes]:
        return {batch: jax.eval_shape(function, params, images) for batch, images in shapes.items()}

    function = function_of(call.run)
    with user_code(f"config.model: {call.spoken}", ExportError, fix=_hint(call)):
        try:
            return described(function), function
        except ConvertError:
            raise
        except Exception:
            told = function_of(without_training(call.run))
            try:
                return described(told), told
            except (Exception, SystemExit):
                pass  # the first error is the relevant one
            raise


def _hint(call: Call) -> Callable[[BaseException], str]:
    def advise(error: BaseException) -> str:
        trains = any(
            word in f"{type(error).__name__}: {error}" for word in ("PRNG", "rngs", "RngError", "ModifyScopeVariable")
        )
        advice = (
            "It still trains: make its layers with deterministic=True, or call .eval() on an NNX model. "
            if trains
            else ""
        )
        called = f"It was called as {call.spoken}, with float32 images [batch, height, width, 3]. "
        return f"{advice}{called}--debug shows the whole traceback."

    return advise


def _warnings(call: Call, left_out: Mapping[str, str], others: Sequence[str]) -> tuple[str, ...]:
    found = [*call.warnings, *(f"output {name} is left out: it {why}" for name, why in left_out.items())]
    if others:
        found.append(
            f"model {call.name}: computes in {', '.join(others)}; it is converted in float32, and config.precision "
            "says what follows"
        )
    return tuple(found)


def _is_parameter(model: str, name: str, leaf: Any) -> bool:
    """Whether a leaf is a weight: any floating-point array."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise UsageError(
            f"model {model}: parameter {name} is a description of {leaf.shape}, it has no values", fix="Return arrays."
        )
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, np.floating))


def _keys(path: Sequence[Any]) -> list[str]:
    # of an NNX variable, whose name is the preceding one
    keys = list(path[:-1] if len(path) > 1 and str(path[-1]) == ".value" else path)
    return [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys]


def _unique(names: Iterable[str], taken: Collection[str]) -> list[str]:
    """Unique names, so that no two parameters become one tensor, and none becomes the graph's input, output or
    constant."""
    found: dict[str, None] = {}
    for name in names:
        scoped = f"params/{name}" if not name or name in taken or _CONSTANT.fullmatch(name) else name
        unique, number = scoped, 1
        while unique in found:
            unique, number = f"{scoped}.{number}", number + 1
        found[unique] = None
    return list(found)
