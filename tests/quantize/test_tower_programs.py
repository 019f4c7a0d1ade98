"""INT8 graphs of towers as TensorRT-RTX compiles them: every linear of a block in INT8, all other products in FP16."""

import numpy as np
import onnx_ir as ir
import pytest
from rtx_program import check_products

from vit_convert.core.onnx_file import save_onnx
from vit_convert.core.token_samples import sample_texts
from vit_convert.export.exporter import export_model
from vit_convert.export.targets import target_named
from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint
from vit_convert.quantize.calibrate import calibrate
from vit_convert.quantize.half_precision import to_fp16
from vit_convert.quantize.placement import place
from vit_convert.quantize.qdq import quantize

trt = pytest.importorskip("tensorrt_rtx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "file", "in_fp16"),
    [
        # the last block attends from one row, which no fused kernel does; of texts that row is looked up by a product
        ("CLIP-mu/16", "a.safetensors:txt", {"Transformer", "head"}),
        ("SigLIP-mu/14", "a.npz:img", {"embedding", "MAPHead_0"}),  # only blocks are quantized
        ("SigLIP-mu/16", "a.npz:txt", {"head"}),
    ],
)
def test_every_linear_of_a_block_is_multiplied_in_int8(tmp_path, variant, file, in_fp16):
    write_random_checkpoint(tmp_path / file.partition(":")[0], variant, image_size=(32, 32), depth=2)
    loaded = load_checkpoint(f"{tmp_path}/{file}")
    model, path = loaded.family.model(loaded), tmp_path / "model.onnx"
    export_model(model, path, target=target_named("rtx"))
    (taken,), generator = model.signature.inputs, np.random.default_rng(0)
    pixels = generator.uniform(-1, 1, (8, *taken.shape[1:])).astype(np.float32)
    samples = pixels if taken.is_image else sample_texts(taken, 8, generator)
    graph = ir.load(path)
    sites = place(graph).sites
    ranges = calibrate(path, samples, np.asarray, [site.tensor for site in sites])
    typed = to_fp16(quantize(graph, ranges, sites, target="rtx"))
    save_onnx(typed.model, tmp_path / "typed.onnx")
    found = check_products(built(tmp_path / "typed.onnx", taken), sites)
    assert {name.partition("/")[0] for name in found if "/" in name} == in_fp16
    assert len(sites) == 12 and {site.block for site in sites} == {"block_00", "block_01"}


def built(path, taken):
    """The engine for batches of one to four."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network, config = builder.create_network(0), builder.create_builder_config()
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    profile = builder.create_optimization_profile()
    profile.set_shape(taken.name, *((batch, *taken.shape[1:]) for batch in (1, 2, 4)))
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))
