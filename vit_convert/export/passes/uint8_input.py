"""Makes a graph take uint8 pixels and normalise them itself, inside the patch convolution where that is exact."""

import math

import numpy as np
import onnx_ir as ir

from vit_convert.export.passes.cleanup import clean
from vit_convert.export.passes.contract import Condition, GraphPass
from vit_convert.export.weights import Weight, add_constant, add_weight, weight_of

# Pixels are centred before the weights are applied: -128 … 127 and the folded kernel are exact or nearly so in fp16 and
# bf16, whereas a bias that undoes the mean of 0 … 255 would be a sum of hundreds of weights, rounded to 11 bits.
_CENTRE = 128


def take_pixels(model: ir.Model, image: str, scale: np.ndarray, offset: np.ndarray) -> bool:
    """Makes the image input uint8, and normalises x to x · scale + offset inside the graph, in place.

    If a convolution without padding reads the images, scale and offset are folded into its weights, kernel · scale and
    bias + Σ kernel · (offset + 128 · scale), computed in float64 together with the weights. Padding would add zeros
    that are not pixels, so any other graph gets a Mul and an Add.

    Args:
        model: the graph; weights described.
        image: name of its input float32 [batch, height, width, 3] or [batch, 3, height, width].
        scale: float32 [3], a factor for each channel.
        offset: float32 [3], a summand for each channel.

    Returns:
        Whether the normalisation was folded into the weights.
    """
    graph = model.graph
    images = next(value for value in graph.inputs if value.name == image)
    readers = [(node, i) for node, i in images.uses() if node.graph is not None]
    conv = _first_conv(images)
    cast = ir.node("Cast", [images], {"to": ir.DataType.FLOAT})
    nodes = [cast]
    if conv is not None:
        _fold(graph, conv, scale, offset)
        nodes.append(ir.node("Sub", [cast.outputs[0], add_constant(graph, "centre", np.array(_CENTRE, np.float32))]))
    else:
        assert images.shape is not None
        shape = (3,) if images.shape[3] == 3 else (3, 1, 1)
        nodes.append(
            ir.node("Mul", [cast.outputs[0], add_constant(graph, "scale", scale.astype(np.float32).reshape(shape))])
        )
        nodes.append(
            ir.node(
                "Add", [nodes[-1].outputs[0], add_constant(graph, "offset", offset.astype(np.float32).reshape(shape))]
            )
        )
    for reader, i in readers:
        reader.replace_input_with(i, nodes[-1].outputs[0])
    graph.insert_before(graph[0], nodes)
    images.type = ir.TensorType(ir.DataType.UINT8)
    clean(model)
    return conv is not None


def taking_pixels(image: str, scale: np.ndarray, offset: np.ndarray) -> GraphPass:
    """`take_pixels` with its contract: images are float32 before and uint8 after."""

    def is_of(dtype: ir.DataType) -> Condition:
        def condition(model: ir.Model) -> str:
            images = next((value for value in model.graph.inputs if value.name == image), None)
            found = images.dtype if images is not None else None
            return "" if found == dtype else f"the input {image} is {found}, not {dtype}"

        return condition

    return GraphPass(
        lambda model: take_pixels(model, image, scale, offset),
        name="take_pixels",
        requires=(is_of(ir.DataType.FLOAT),),
        ensures=(is_of(ir.DataType.UINT8),),
    )


def _first_conv(images: ir.Value) -> ir.Node | None:
    """The convolution with described weights and without padding that is the images' only reader; None if there is
    none."""
    value = images
    # rewritten nodes are still listed
    while len(readers := [node for node, _ in value.uses() if node.graph is not None]) == 1:
        (node,) = readers
        if node.op_type == "Conv":
            padded = "pads" in node.attributes and any(node.attributes["pads"].as_ints())
            automatic = "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() not in (
                "NOTSET",
                "VALID",
            )
            described = all(weight_of(weight) is not None for weight in node.inputs[1:])
            ours = weight_of(node.inputs[1])
            return (
                node if described and not padded and not automatic and ours is not None and ours.shape[1] == 3 else None
            )
        if node.op_type != "Transpose":
            return None
        value = node.outputs[0]
    return None


def _fold(graph: ir.Graph, conv: ir.Node, scale: np.ndarray, offset: np.ndarray) -> None:
    """Puts scale and offset into a convolution's kernel [D, 3, P, P] and bias [D]."""
    kernel, bias = conv.inputs[1], conv.inputs[2] if len(conv.inputs) > 2 else None
    described, described_bias = weight_of(kernel), weight_of(bias)
    assert kernel is not None and kernel.name is not None and described is not None
    factor = scale.astype(np.float64)
    summand = offset.astype(np.float64) + _CENTRE * factor

    def fold_bias(*parameters: np.ndarray) -> np.ndarray:
        parts = described.compute(*parameters[: len(described.sources)]).astype(np.float64)
        moved = np.einsum("dchw,c->d", parts, summand)
        old = 0.0 if described_bias is None else described_bias.compute(*parameters[len(described.sources) :])
        return (moved + old).astype(np.float32)

    def fold_kernel(weight: np.ndarray) -> np.ndarray:
        return (weight * factor[:, None, None]).astype(np.float32)

    sources = described.sources + (() if described_bias is None else described_bias.sources)
    name = kernel.name.removesuffix("kernel") + "bias" if bias is None else bias.name
    for old in (kernel, bias):
        if old is not None and len(old.uses()) == 1:
            graph.initializers.pop(old.name or "")
    conv.replace_input_with(1, add_weight(graph, kernel.name, described.then(described.shape, fold_kernel)))
    num_read = math.prod(described.shape) + (0 if described_bias is None else math.prod(described_bias.shape))
    conv.resize_inputs(3)
    conv.replace_input_with(
        2, add_weight(graph, name or "bias", Weight(sources, described.shape[:1], fold_bias, num_read))
    )
