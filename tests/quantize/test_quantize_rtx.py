"""TensorRT-RTX parses and builds the typed and the quantized graphs; it needs no GPU for that."""

import onnx_ir as ir
import pytest
from rtx_program import check_products
from tiny_vit import TinyViT, normalize

from vit_convert.quantize.calibrate import calibrate
from vit_convert.quantize.half_precision import to_bf16, to_fp16
from vit_convert.quantize.placement import place
from vit_convert.quantize.qdq import quantize

trt = pytest.importorskip("tensorrt_rtx")


def build(path):
    """The serialized engine, or the reasons why there is none."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("images", (1, 32, 32, 3), (4, 32, 32, 3), (8, 32, 32, 3))
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


@pytest.mark.parametrize(
    "precision",
    [
        "fp16",
        "bf16",
        "int8",
        "int8_fp16",
        "int8_attention_fp16",
        "fp8",
        "fp8_fp16",
        "fp8_attention_fp16",
        "fp16_islands",
        "fp16_primitive",
    ],
)
def test_rtx_builds(tmp_path, images, precision):
    # one product for queries, keys and values, cut apart behind it, is multiplied in FP16: the export writes three
    options = {"fused_qkv": precision != "int8_fp16"}
    options |= {"opset": 17, "layernorm": "two_pass"} if precision == "fp16_primitive" else {}
    path = TinyViT(**options).save(tmp_path / "model.onnx")
    model = ir.load(path)
    if quantized := next((word for word in ("int8", "fp8") if word in precision), None):
        placement = place(model, attention="attention" in precision)
        model = quantize(
            model,
            calibrate(path, images, normalize, placement.tensors()),
            placement.sites,
            target="rtx",
            precision=quantized,
        )
    if "fp16" in precision:
        model = to_fp16(model, keep_fp32=["block_01"] if "islands" in precision else []).model
    if precision == "bf16":
        model = to_bf16(model).model
    saved = tmp_path / "typed.onnx"
    ir.save(model, saved, external_data="typed.onnx.data")
    engine = build(saved)
    assert isinstance(engine, trt.IHostMemory), engine
    assert engine.nbytes > 0
    if precision == "int8_fp16":
        assert len(check_products(bytes(engine), placement.sites)) == 2  # patch embedding and head
