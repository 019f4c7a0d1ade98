"""From the ONNX file to TensorRT's network, with errors that name the ONNX node."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

from vit_convert.core.bundle import utf8_path
from vit_convert.core.errors import BuildError, UnbuildableError
from vit_convert.engine.backend.log_capture import without_noise
from vit_convert.engine.backend.trt import Backend

_NORM = "/LayerNormalization"  # what nodes of the plugins that compute one are called after


def parse_graph(backend: Backend, builder: Any, onnx_path: pathlib.Path, *, strongly_typed: bool) -> tuple[Any, Any]:
    """Parses a graph from its file; external weights are read from beside it.

    Args:
        backend: the TensorRT that parses.
        builder: its `Builder`.
        onnx_path: the graph.
        strongly_typed: whether the network keeps the graph's types.

    Returns:
        The network and its parser; the parser owns the weights and has to live until the engine is built.

    Raises:
        BuildError: the file does not exist, or TensorRT cannot read it.
    """
    require_graph(onnx_path)
    network = builder.create_network(backend.network_flags(strongly_typed=strongly_typed))
    parser = backend.module.OnnxParser(network, backend.logger)
    if not parser.parse_from_file(utf8_path(onnx_path)):
        raise _parse_error(backend, parser, onnx_path)
    _refuse_attention(backend, network, onnx_path)
    return network, parser


def require_graph(onnx_path: str | os.PathLike[str]) -> None:
    """Refuses a graph that does not exist.

    Raises:
        BuildError: see above.
    """
    if not os.path.isfile(onnx_path):
        raise BuildError(f"{os.fspath(onnx_path)}: there is no such graph", fix="Export it first.")


def inputs(network: Any) -> list[Any]:
    """The input tensors of a network."""
    return [network.get_input(i) for i in range(network.num_inputs)]


def layers(network: Any) -> Iterator[Any]:
    """The layers of a network, in order."""
    for i in range(network.num_layers):
        yield network.get_layer(i)


def count_attentions(backend: Backend, network: Any) -> int:
    """How many attentions a network computes: one for each softmax, Attention node, or plugin other than LayerNorm's.

    Args:
        backend: the TensorRT that parsed it.
        network: its `INetworkDefinition`.
    """
    trt = backend.module
    kinds = (trt.LayerType.SOFTMAX, trt.LayerType.PLUGIN_V2, backend.find("LayerType.ATTENTION_INPUT"))
    return sum(layer.type in kinds and _NORM not in layer.name for layer in layers(network))


def _parse_error(backend: Backend, parser: Any, onnx_path: pathlib.Path) -> BuildError:
    name, reason = backend.logger.node_name(), backend.logger.explain()
    if parser.num_errors:
        parser_error = parser.get_error(0)
        if backend.find("ParserError.node_name") is not None:
            name = parser_error.node_name()
        reason = without_noise(parser_error.desc())
    where = f"node {name}: " if name else ""
    fix = f"{backend.module.__name__} {backend.version} cannot read this graph; export it for this target."
    return UnbuildableError(f"{onnx_path.name}: {where}{reason}", fix=fix)


def _refuse_attention(backend: Backend, network: Any, onnx_path: pathlib.Path) -> None:
    # TensorRT-RTX 1.7.1 does not fail on an Attention node without a GPU: it ends the process (segmentation fault).
    attention = backend.find("LayerType.ATTENTION_INPUT")
    if backend.gpu is not None or attention is None:
        return
    for layer in layers(network):
        if layer.type == attention:
            raise BuildError(
                f"{onnx_path.name}: {layer.name}: {backend.module.__name__} {backend.version} crashes on Attention "
                "without a GPU",
                fix="Export attention as MatMul, Softmax and MatMul.",
            )
