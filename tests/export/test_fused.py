"""The lowering with our own kernels: what onnxruntime computes by its model-local functions agrees with JAX, and what
gets ranges."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from export_graphs import architecture, random_images, random_params

from vit_convert.core.compare import compare
from vit_convert.core.errors import ExportError
from vit_convert.core.onnx_file import open_session, run_session, save_onnx
from vit_convert.export.exporter import export_model
from vit_convert.export.passes.fused_encoder import (
    ADD_NORM,
    ATTENTION,
    DOMAIN,
    NORM,
    quantized_tensors,
    with_what_leads_to,
    write_in_fp16,
)
from vit_convert.export.targets import lowering_named
from vit_convert.families.vit.model import vit_model
from vit_convert.quantize.activation_max import extremes
from vit_convert.quantize.equalize import attention_inputs, equalize

HEADS = 2


def written(path, *, width=64 * HEADS, heads=HEADS, lowering="fused", **changes):
    arch = architecture(width=width, num_heads=heads, **changes)
    model = vit_model(arch, random_params(arch))
    export_model(model, path, target=lowering_named("trt8", lowering))
    return arch, model


@pytest.mark.parametrize("lowering, size, heads", [("fused", 64, HEADS), ("kernels", 64, HEADS), ("kernels", 72, 4)])
@pytest.mark.parametrize("pool", ["tok", "gap"])
def test_agrees_with_jax(tmp_path, pool, lowering, size, heads):
    arch, model = written(tmp_path / "model.onnx", pool=pool, lowering=lowering, width=size * heads, heads=heads)
    images = random_images(arch)
    expected, session = model.run(images)[model.output], open_session(tmp_path / "model.onnx")
    for batch in (1, 3):
        got = run_session(session, images[:batch], [model.output])[model.output]
        assert compare(expected[:batch], got).max_rel < 1e-4  # as for every graph in fp32


def test_nodes_are_what_the_library_registers(tmp_path):
    arch, _ = written(tmp_path / "model.onnx", pool="tok")
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert {function.name for function in proto.functions} == {ATTENTION, ADD_NORM, NORM}
    nodes = [node for node in proto.graph.node if node.domain == DOMAIN]
    shapes = {(node.op_type, len(node.input), len(node.output)) for node in nodes}
    assert shapes == {(ATTENTION, 1, 1), (ADD_NORM, 4, 2), (NORM, 3, 1)}  # plugin.cpp counts its inputs by them
    first = next(node for node in nodes if node.op_type == ATTENTION)
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in first.attribute}
    tokens = arch.grid[0] * arch.grid[1] + 1
    shape = {"heads": HEADS, "tokens": tokens, "head": 64}
    assert given == {**shape, "int8_in": 1, "quantized": 1, "plugin_version": b"1", "plugin_namespace": b""}
    # Keys and values of the last block's tokens come from products, which read no int8.
    norms = [node for node in nodes if node.op_type == ADD_NORM]
    quantized = [next(a.i for a in node.attribute if a.name == "quantized") for node in norms]
    assert quantized == [1] * (len(norms) - 1) + [0]


def test_ranges_leave_the_residual_stream_out(tmp_path):
    written(tmp_path / "model.onnx", pool="tok")
    graph = ir.load(tmp_path / "model.onnx")
    adds = [node for node in graph.graph if node.op_type == ADD_NORM]
    sums, branches = {node.outputs[0].name for node in adds}, {node.inputs[0].name for node in adds}
    read, other = quantized_tensors(graph)
    convolutions = [node for node in graph.graph if node.op_type == "Conv"]
    assert {node.inputs[0].name for node in convolutions} == set(read)
    assert not sums & {*read, *other} and not branches & {*read, *other}
    with_branches = quantized_tensors(graph, branches=True)
    assert {*with_branches[0], *with_branches[1]} == {*read, *other, *branches}
    assert {node.inputs[0].name for node in graph.graph if node.op_type == ATTENTION} <= set(other)


def test_in_half_precision_nothing_is_quantized(tmp_path):
    written(tmp_path / "model.onnx", pool="tok", lowering="kernels")
    nodes = [node for node in ir.load(tmp_path / "model.onnx").graph if node.domain == DOMAIN]
    assert {node.op_type for node in nodes} == {ATTENTION, ADD_NORM, NORM}
    assert not any(node.attributes["quantized"].as_int() for node in nodes)
    assert not any(node.attributes["int8_in"].as_int() for node in nodes if node.op_type == ATTENTION)


def test_what_is_left_out_is_written_in_fp16(tmp_path):
    written(tmp_path / "model.onnx", pool="tok")
    model = ir.load(tmp_path / "model.onnx")
    read, other = quantized_tensors(model)
    norm, activation = read[0], next(n for n in read if ir_value(model, n).producer().domain != DOMAIN)
    unranged = with_what_leads_to(model, [norm, activation])
    convolution = next(node for node in model.graph if node.op_type == "Conv" and node.outputs[0].name in unranged)
    between = unranged - {norm, activation}
    # the GELU and what fc1 gives, no other convolution's output
    assert convolution.outputs[0].name in between and between < {*other}
    assert sum(node.op_type == "Conv" for node in model.graph if node.outputs[0].name in unranged) == 1
    write_in_fp16(model, [norm, activation])
    assert ir_value(model, norm).producer().attributes["quantized"].as_int() == 0
    left, _ = quantized_tensors(model)
    assert {*read} - {*left} == {norm}


def ir_value(model, name):
    return next(value for node in model.graph for value in node.outputs if value.name == name)


def test_widths_without_a_kernel_are_refused(tmp_path):
    with pytest.raises(ExportError, match=r"a width of 2112; the kernels are for multiples of 32 up to 2048"):
        written(tmp_path / "model.onnx", width=64 * 33, heads=33, depth=2, mlp_dim=64)


def test_equalized_channels_reach_equally_far_and_change_nothing(tmp_path):
    arch, model = written(tmp_path / "model.onnx", pool="tok")
    images, path, graph = random_images(arch), tmp_path / "equalized.onnx", ir.load(tmp_path / "model.onnx")
    names = attention_inputs(graph)
    before = extremes(tmp_path / "model.onnx", names, [images], per_channel=True)
    assert equalize(graph, before) == len(names) == arch.depth - 1
    save_onnx(graph, path)
    expected = run_session(open_session(tmp_path / "model.onnx"), images, [model.output])[model.output]
    got = run_session(open_session(path), images, [model.output])[model.output]
    assert compare(expected, got).max_rel < 1e-5  # rounding of fp32 alone
    for low, high in extremes(path, names, [images], per_channel=True).values():
        query, key, value = np.moveaxis(np.maximum(high, -low).reshape(HEADS, 3, 64), 1, 0)
        np.testing.assert_allclose(query, key, rtol=1e-3)
        np.testing.assert_allclose(value, query.max(), rtol=1e-3)
