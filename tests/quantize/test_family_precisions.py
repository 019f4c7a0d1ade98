"""FP16 and INT8 graphs of hybrids, Mixers and Swins: what is typed and quantized, how close it stays, and that
TensorRT-RTX builds it."""

import functools

import numpy as np
import onnx_ir as ir
import pytest
from family_models import SMALL, images, model
from rtx_program import check_products

from vit_convert.core.compare import compare
from vit_convert.core.onnx_file import open_session, run_session
from vit_convert.export.exporter import export_model
from vit_convert.export.targets import target_named
from vit_convert.quantize.calibrate import calibrate
from vit_convert.quantize.half_precision import to_fp16
from vit_convert.quantize.placement import place
from vit_convert.quantize.qdq import quantize

KINDS = {
    # Two MLPs of a block, told apart by their whole names; stem and head stay.
    "mixer": {
        f"block_0{i}/{mixing}_mixing/Dense_{layer}"
        for i in range(5)
        for mixing in ("token", "channel")
        for layer in (0, 1)
    },
    # Every convolution of a bottleneck, and the encoder's linears; the padded stem, the embedding and the head stay.
    "hybrid": {
        *(
            f"stage_{block}/{conv}"
            for block in ("1/block_00", "2/block_00", "2/block_01")
            for conv in ("conv1", "conv2", "conv3")
        ),
        "stage_1/block_00/conv_proj",
        "stage_2/block_00/conv_proj",
        *(f"block_0{i}/{kind}" for i in range(3) for kind in ("query", "key", "value", "out", "fc1", "fc2")),
    },
    # The linears of every block; patch embedding, merging and head stay.
    "swin": {
        f"stage_{stage}/block_0{i}/{kind}"
        for stage, depth in ((0, 6), (1, 2))
        for i in range(depth)
        for kind in ("query", "key", "value", "out", "fc1", "fc2")
    },
}


def normalize(pixels):
    return pixels.astype(np.float32) / 127.5 - 1


@functools.cache
def pixels(family):
    side = SMALL[family][1]
    coarse = np.random.default_rng(2).integers(0, 256, (8, side // 8, side // 8, 3), np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)


@pytest.fixture(scope="module", params=list(SMALL))
def exported(request, tmp_path_factory):
    """A family's name, and its graph for each target."""
    folder = tmp_path_factory.mktemp(request.param)
    paths = {target: folder / f"{target}.onnx" for target in ("rtx", "trt8")}
    for target, path in paths.items():
        export_model(model(request.param), path, target=target_named(target))
    return request.param, paths


def typed(graph, path, precision, target):
    """The graph in a precision, saved; what was quantized, and the islands that stay float32."""
    sites = ()
    if precision == "int8":
        placement = place(graph)
        ranges = calibrate(path, pixels_of(path), normalize, placement.tensors())
        graph, sites = quantize(graph, ranges, placement.sites, target=target), placement.sites
    result = to_fp16(graph)
    saved = path.with_name(f"{target}.{precision}.onnx")
    ir.save(result.model, saved, external_data=f"{saved.name}.data")
    return saved, sites, result


def pixels_of(path):
    return pixels(path.parent.name.rstrip("0123456789"))


def cosine(family, path):
    """The smallest over the images, to JAX."""
    fed = normalize(pixels(family))[:4]
    got = run_session(open_session(path), fed)["logits"]
    return compare(model(family).run(fed)["logits"], got.astype(np.float32)).cosine


@pytest.mark.parametrize("target", ["rtx", "trt8"])
def test_fp16(exported, target):
    """What stays float32 is the mean before the head, and on a hybrid nothing; half a group's statistics are float32
    inside LayerNorm."""
    family, paths = exported
    saved, _, result = typed(ir.load(paths[target]), paths[target], "fp16", target)
    reasons = set(result.islands.values())
    assert reasons == (set() if family == "hybrid" else {"statistics"})
    norms = [node for node in result.model.graph if node.op_type == "LayerNormalization"]
    assert norms and all(node.inputs[0].dtype == ir.DataType.FLOAT16 for node in norms)
    assert all(node.attributes["stash_type"].as_int() == 1 for node in norms if "stash_type" in node.attributes)
    assert cosine(family, saved) > 0.9999


@pytest.mark.parametrize("target", ["rtx", "trt8"])
def test_int8(exported, target):
    family, paths = exported
    saved, sites, _ = typed(ir.load(paths[target]), paths[target], "int8", target)
    assert {site.name for site in sites} == KINDS[family]
    # Eight blocky images decide every range; a scale or an axis that is wrong gives 0.9 and less.
    assert cosine(family, saved) > 0.99


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_rtx_builds(exported, precision):
    trt = pytest.importorskip("tensorrt_rtx")
    family, paths = exported
    saved, sites, _ = typed(ir.load(paths["rtx"]), paths["rtx"], precision, "rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(saved)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    profile, shape = builder.create_optimization_profile(), images(family).shape[1:]
    profile.set_shape("images", (1, *shape), (4, *shape), (8, *shape))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert isinstance(engine, trt.IHostMemory) and engine.nbytes > 0
    in_fp16 = check_products(bytes(engine), sites)
    assert any("head" in name for name in in_fp16) and (precision == "fp16" or len(in_fp16) < 10)
