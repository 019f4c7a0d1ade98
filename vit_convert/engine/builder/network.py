"""From the ONNX file to TensorRT's network, with errors that name the ONNX node."""

import dataclasses
import functools
import pathlib
from typing import Any

from vit_convert.core.bundle import utf8_path
from vit_convert.core.errors import BuildError, UnbuildableError
from vit_convert.engine.backend.graph_file import require_graph
from vit_convert.engine.backend.log_capture import without_noise
from vit_convert.engine.backend.trt import Backend

# what is in the names of the plugins that compute a normalisation: ours keep the name of the ReLU behind a GroupNorm
_NORMS = ("/LayerNormalization", "Relu")


@dataclasses.dataclass(frozen=True)
class ParsedGraph:
    """A parsed graph.

    Attributes:
        backend: the TensorRT.
        graph: name of the graph's file, for messages.
        network: its `INetworkDefinition`.
        parser: its `OnnxParser`, which owns the weights and must live until the engine is built.
    """

    backend: Backend
    graph: str
    network: Any
    parser: Any = None

    @functools.cached_property
    def layers(self) -> tuple[Any, ...]:
        """Its layers, in order."""
        network = self.network
        return tuple(network.get_layer(i) for i in range(network.num_layers))

    @property
    def inputs(self) -> list[Any]:
        """Its input tensors."""
        network = self.network
        return [network.get_input(i) for i in range(network.num_inputs)]

    @property
    def outputs(self) -> list[Any]:
        """Its output tensors."""
        network = self.network
        return [network.get_output(i) for i in range(network.num_outputs)]

    @property
    def num_attentions(self) -> int:
        """How many attentions it computes: one for each softmax, Attention node, or plugin other than a norm's."""
        trt = self.backend.module
        kinds = (trt.LayerType.SOFTMAX, trt.LayerType.PLUGIN_V2, self.backend.find("LayerType.ATTENTION_INPUT"))
        return sum(layer.type in kinds and not any(word in layer.name for word in _NORMS) for layer in self.layers)


def parse_graph(backend: Backend, builder: Any, onnx_path: pathlib.Path, *, strongly_typed: bool) -> ParsedGraph:
    """Parses a graph from its file; external weights are read from beside it.

    Args:
        backend: the TensorRT that parses.
        builder: its `Builder`.
        onnx_path: the graph.
        strongly_typed: whether the network keeps the graph's types.

    Raises:
        BuildError: the file does not exist, or TensorRT cannot read it.
    """
    require_graph(onnx_path)
    network = builder.create_network(backend.network_flags(strongly_typed=strongly_typed))
    parser = backend.module.OnnxParser(network, backend.logger)
    try:
        parsed = parser.parse_from_file(utf8_path(onnx_path))
    except RuntimeError as e:  # TensorRT's own, which misses a library of its plugins
        fix = "Install TensorRT whole, or leave the operator out that needs it."
        raise UnbuildableError(f"{onnx_path.name}: {e}", fix=fix) from e
    if not parsed:
        raise _parse_error(backend, parser, onnx_path)
    parsed = ParsedGraph(backend, onnx_path.name, network, parser)
    _refuse_attention(parsed)
    return parsed


def refused_nodes(backend: Backend, builder: Any, onnx_path: pathlib.Path) -> list[str]:
    """All nodes that the parser does not support; parsing itself stops at the first.

    Args:
        backend: the TensorRT to ask.
        builder: its `Builder`.
        onnx_path: the graph.

    Returns:
        "name (operator)" of each, in the graph's order; [] if this TensorRT does not say.
    """
    network = builder.create_network(backend.network_flags(strongly_typed=backend.strongly_typed))
    parser = backend.module.OnnxParser(network, backend.logger)
    if backend.find("OnnxParser.supports_model_v2") is None or backend.find("ParserError.node_name") is None:
        return []
    parser.supports_model_v2(onnx_path.read_bytes(), utf8_path(onnx_path))
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    named = [(error.node_name() or "a node without a name", error.node_operator()) for error in errors]
    return list(dict.fromkeys(f"{name} ({operator})" for name, operator in named if operator))


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


def _refuse_attention(parsed: ParsedGraph) -> None:
    # TensorRT-RTX 1.7.1 does not fail on an Attention node without a GPU: it ends the process (segmentation fault).
    backend = parsed.backend
    attention = backend.find("LayerType.ATTENTION_INPUT")
    if backend.gpu is not None or attention is None:
        return
    for layer in parsed.layers:
        if layer.type == attention:
            raise BuildError(
                f"{parsed.graph}: {layer.name}: {backend.module.__name__} {backend.version} crashes on Attention "
                "without a GPU",
                fix="Export attention as MatMul, Softmax and MatMul.",
            )
