"""What the tests of the inspection share."""

import onnx
import pytest
from onnx import parser

from vit_convert.engine.inspection.onnx_wire import read_graph


@pytest.fixture
def graph(tmp_path):
    """Reads a graph from its text, with the types and shapes that onnx infers."""

    def make(text, opset=17, domains=""):
        whole = f'<ir_version: 10, opset_import: ["" : {opset}{domains}]>\n{text}'
        model = onnx.shape_inference.infer_shapes(parser.parse_model(whole))
        onnx.save(model, tmp_path / "text.onnx")
        return read_graph(tmp_path / "text.onnx")

    return make
