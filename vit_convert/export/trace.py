"""Traces a JAX function to an ONNX graph with named weights that have no values yet."""

import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx_ir as ir

from vit_convert.core.errors import ExportError
from vit_convert.core.signature import Tensor
from vit_convert.core.user_code import explain

Apply = Callable[..., Mapping[str, jax.Array]]


def trace(
    apply: Apply,
    param_shapes: Mapping[str, Sequence[int]],
    inputs: Sequence[Tensor],
    output_names: Sequence[str],
    opset: int,
) -> ir.Model:
    """Traces `apply` with jax2onnx, from shapes only.

    Parameters are traced as graph inputs, because a traced constant would be copied and lose its name; afterwards they
    become initializers without a value, for `weights.py` to fill while the file is written.

    Args:
        apply: maps ({parameter name: array}, *inputs) to {output name: array}.
        param_shapes: shape of each float32 parameter under its `/`-joined name.
        inputs: of the model, in the order of `apply`'s arguments.
        output_names: the outputs to keep, in this order.
        opset: ONNX opset to write.

    Returns:
        The model; its inputs are `inputs`, its outputs are `output_names`, its parameters are initializers without
        const_value.

    Raises:
        ExportError: jax2onnx cannot trace the function.
    """
    load_plugins()
    from jax2onnx import to_onnx

    names = list(param_shapes)

    def positional(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        outputs = apply(dict(zip(names, arguments[len(inputs) :])), *arguments[: len(inputs)])
        # A value with two names, an output that is also a tap, would keep only one of them.
        kept = {id(outputs[name]): name for name in reversed(output_names)}
        return tuple(
            value if kept[id(value)] == name else jnp.copy(value)
            for name, value in ((name, outputs[name]) for name in output_names)
        )

    specs = [*map(_spec, inputs), *(jax.ShapeDtypeStruct(tuple(shape), np.float32) for shape in param_shapes.values())]
    try:
        model = to_onnx(
            positional,
            specs,
            opset=opset,
            input_names=[*(tensor.name for tensor in inputs), *names],
            output_names=list(output_names),
            return_mode="ir",
        )
    except (Exception, SystemExit) as e:
        raise ExportError(
            f"jax2onnx could not trace the model: {explain(e)}",
            fix="Look for the primitive that it names; jax2onnx lists the supported ones.",
        ) from e
    assert isinstance(model, ir.Model)
    for value in list(model.graph.inputs[len(inputs) :]):
        model.graph.inputs.remove(value)
        model.graph.initializers.add(value)
    return model


def _spec(tensor: Tensor) -> Any:
    """How jax2onnx describes an input; varying dimensions are strings in both forms."""
    return tensor.shape if tensor.dtype == "float32" else jax.ShapeDtypeStruct(tensor.shape, np.dtype(tensor.dtype))


def load_plugins() -> None:
    """Registers jax2onnx's plugins for JAX and Flax, and no others.

    Its own discovery also imports every example, and several compile random models: six seconds for nothing.
    """
    from jax2onnx.plugins import plugin_system

    if plugin_system._already_imported_plugins:
        return
    root = pathlib.Path(plugin_system.__file__).parent
    logging.getLogger("jax2onnx").setLevel(logging.ERROR)
    for folder in ("jax", "flax"):
        plugin_system._import_tree(root / folder, f"jax2onnx.plugins.{folder}")
    plugin_system._already_imported_plugins = True
