"""Height and width that vary: a dynamic graph computes what the graph of each size computes."""

import collections
import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from export_graphs import architecture, random_images, random_params
from signatures import image_input

from vit_convert.core.errors import ExportError, UsageError
from vit_convert.core.image_size import ImageRange, parse_range, parse_size
from vit_convert.core.onnx_file import open_session, run_session, save_onnx
from vit_convert.engine.runtime.profiles import batch_profiles
from vit_convert.export.exporter import export_model
from vit_convert.export.targets import TARGETS
from vit_convert.families.user.model import user_model
from vit_convert.families.vit.model import vit_model
from vit_convert.families.vit.posemb import resample
from vit_convert.quantize.calibrate import calibrate
from vit_convert.quantize.half_precision import to_bf16, to_fp16
from vit_convert.quantize.placement import place
from vit_convert.quantize.qdq import quantize

OWN = (48, 64)  # of export_graphs.architecture: 3x4 patches
SIZES = [OWN, (32, 32), (80, 48)]
# float32 against float32: both graphs round the same products, and the table differs by the rounding of its
# interpolation alone.
RTOL = 1e-5


def export_dynamic(path, arch, params, target="rtx", layout="NHWC", **options):
    model = vit_model(arch, params)
    return export_model(model, path, target=TARGETS[target], layout=layout, dynamic_patch=arch.patch_size, **options)


def run(path, images, layout="NHWC"):
    fed = images if layout == "NHWC" else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    (values,) = run_session(open_session(path), fed).values()
    return values


def fixed_logits(folder, arch, params, images, target="rtx"):
    """What the graph of one size gives, its table resampled in numpy before it is exported."""
    size = images.shape[1:3]
    sized = dataclasses.replace(arch, image_size=size)
    table = resample(params["pos_embedding"], arch.grid, sized.grid)
    path = folder / "fixed.onnx"
    export_model(vit_model(sized, {**params, "pos_embedding": table}), path, target=TARGETS[target])
    return run(path, images)


def assert_close(got, expected, rtol=RTOL):
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= rtol * np.abs(expected).max()


@pytest.mark.parametrize(
    ("pool", "target", "layout"),
    [
        ("tok", "rtx", "NHWC"),
        ("tok", "trt8", "NCHW"),
        ("gap", "trt10", "NHWC"),
        ("map", "trt11", "NHWC"),
        ("map", "trt8", "NHWC"),
        ("none", "rtx", "NCHW"),
    ],
)
def test_equals_the_graph_of_each_size(tmp_path, pool, target, layout):
    arch = architecture(pool=pool)
    params = random_params(arch)
    report = export_dynamic(tmp_path / "dynamic.onnx", arch, params, target, layout)
    assert report.nodes_per_block <= TARGETS[target].max_nodes_per_block
    for size in SIZES:
        images = random_images(dataclasses.replace(arch, image_size=size), 3)
        assert_close(
            run(tmp_path / "dynamic.onnx", images, layout), fixed_logits(tmp_path, arch, params, images, target)
        )


@pytest.mark.parametrize(
    ("own", "size"),
    [
        ((16, 64), (48, 32)),
        ((64, 16), (64, 48)),
        ((16, 16), (32, 48)),
        ((48, 64), (16, 80)),
        ((48, 64), (64, 16)),
        ((448, 448), (768, 752)),
    ],
    ids=[
        "one row to three",
        "one column to three",
        "one patch to many",
        "three rows to one",
        "four columns to one",
        "28 to 48",
    ],
)
def test_single_rows_and_pairs_that_scipy_gets_wrong(tmp_path, own, size):
    arch = architecture(image_size=own, depth=1)
    params = random_params(arch)
    export_dynamic(tmp_path / "dynamic.onnx", arch, params)
    images = random_images(dataclasses.replace(arch, image_size=size), 1)
    assert_close(run(tmp_path / "dynamic.onnx", images), fixed_logits(tmp_path, arch, params, images))


def test_jax_runs_at_other_sizes():
    arch = architecture()
    params = random_params(arch)
    size = (80, 48)
    sized = dataclasses.replace(arch, image_size=size)
    images = random_images(sized, 2)
    table = resample(params["pos_embedding"], arch.grid, sized.grid)
    expected = vit_model(sized, {**params, "pos_embedding": table}).run(images)
    found = vit_model(arch, params).run(images)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)  # the same program on the same numbers


def test_graph_is_symbolic_and_computes_with_integers_on_shapes_alone(tmp_path):
    arch = architecture()
    fixed, dynamic = tmp_path / "fixed.onnx", tmp_path / "dynamic.onnx"
    params = random_params(arch)
    before = export_model(vit_model(arch, params), fixed, target=TARGETS["rtx"])
    report = export_dynamic(dynamic, arch, params)
    graph = ir.load(dynamic).graph
    assert list(map(str, graph.inputs[0].shape)) == ["batch", "height", "width", "3"]
    ops = collections.Counter(node.op_type for node in graph)
    # Shape, Gather, Concat and Resize; the addition of the table stands where it stood, before the Transpose instead of
    # behind.
    assert report.num_nodes == before.num_nodes + 4
    assert ops["Resize"] == 1 and ops - collections.Counter(
        node.op_type for node in ir.load(fixed).graph
    ) == collections.Counter(["Shape", "Gather", "Concat", "Resize"])
    whole = {node.op_type for node in graph if any(value.dtype == ir.DataType.INT64 for value in node.outputs)}
    assert whole <= {"Shape", "Gather", "Concat"}
    shapes = [value.const_value.numpy() for node in graph if node.op_type == "Reshape" for value in node.inputs[1:]]
    tokens = int(np.prod(arch.grid))
    assert not any(number in (tokens, tokens + 1) for shape in shapes for number in shape[1:2])
    block = next(value for node in graph for value in node.outputs if value.name == "block_00")
    assert str(block.shape[1]) == "tokens"


def test_position_table_stays_in_fp32(tmp_path):
    arch = architecture()
    export_dynamic(tmp_path / "dynamic.onnx", arch, random_params(arch))
    for lower in (to_fp16, to_bf16):
        typed = lower(ir.load(tmp_path / "dynamic.onnx"))
        assert typed.islands["Resize"] == "interpolates"
        table = typed.model.graph.initializers["pos_embedding"]
        assert table.dtype == ir.DataType.FLOAT


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """The dynamic graph in every precision, and its reference; INT8 calibrated at the size of the table."""
    folder = tmp_path_factory.mktemp("lowered")
    arch = architecture()
    params = random_params(arch)
    export_dynamic(folder / "fp32.onnx", arch, params)
    model = ir.load(folder / "fp32.onnx")
    save_onnx(to_fp16(model).model, folder / "fp16.onnx")
    save_onnx(to_bf16(model).model, folder / "bf16.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (16, *OWN, 3), np.uint8)
    calibration = calibrate(
        folder / "fp32.onnx", pixels, lambda batch: batch.astype(np.float32) / np.float32(127.5) - 1, method="minmax"
    )
    save_onnx(to_fp16(quantize(model, calibration, place(model).sites, target="rtx")).model, folder / "int8.onnx")
    return folder, vit_model(arch, params), arch


# Half precision has 11 bits and three blocks of random weights; INT8 ranges come from another size of the same noise.
@pytest.mark.parametrize(("precision", "cosine"), [("fp16", 0.99999), ("int8", 0.995)])
def test_lower_precisions_run_at_every_size(lowered, precision, cosine):
    folder, model, arch = lowered
    for size in SIZES:
        images = random_images(dataclasses.replace(arch, image_size=size), 3)
        expected, got = model.run(images)["logits"].ravel(), run(folder / f"{precision}.onnx", images).ravel()
        assert expected @ got / np.linalg.norm(expected) / np.linalg.norm(got) > cosine


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_tensorrt_rtx_builds_it(lowered, tmp_path, precision):
    pytest.importorskip("tensorrt_rtx")
    from vit_convert.core.bundle import read_json
    from vit_convert.core.progress import Progress
    from vit_convert.engine.backend.trt import load_backend
    from vit_convert.engine.builder.build import build_engine
    from vit_convert.engine.builder.request import BuildRequest

    folder, _, _ = lowered
    sizes = ImageRange((32, 32), OWN, (96, 112))
    profiles = batch_profiles(image_input(sizes, "NHWC"), sizes, {"min": 1, "opt": 4, "max": 8, "profiles": (2,)})
    request = BuildRequest(folder / f"{precision}.onnx", precision, profiles=profiles)
    result = build_engine(load_backend("rtx"), request, tmp_path / "engine.plan", progress=Progress(quiet=True))
    assert result.bytes > 0
    record = read_json(tmp_path / "engine.plan.json")
    assert record["inputs"][0]["shape"] == [-1, -1, -1, 3]
    assert record["profiles"][1]["images"] == [[1, 32, 32, 3], [4, 48, 64, 3], [8, 96, 112, 3]]


def test_model_without_position_table_is_refused(tmp_path):
    def pooled(params, images):
        return images.mean(axis=(1, 2)) @ params["kernel"]

    model = user_model(pooled, {"kernel": np.ones((3, 2), np.float32)}, image_shape=(*OWN, 3))
    with pytest.raises(ExportError, match="has no position table to resample"):
        export_model(model, tmp_path / "model.onnx", target=TARGETS["rtx"], dynamic_patch=16)


def test_profiles_range_over_batch_and_sizes():
    sizes = ImageRange((160, 128), (224, 224), (448, 512))
    batch = {"min": 1, "opt": 8, "max": 64, "profiles": (32,)}
    fixed, ranged = (profile["images"] for profile in batch_profiles(image_input(sizes, "NHWC"), sizes, batch))
    assert fixed == ((32, 160, 128, 3), (32, 224, 224, 3), (32, 448, 512, 3))
    assert ranged == ((1, 160, 128, 3), (8, 224, 224, 3), (64, 448, 512, 3))
    assert batch_profiles(image_input(sizes, "NCHW"), sizes, batch)[1]["images"][2] == (64, 3, 448, 512)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dynamic:160..448", ImageRange((160, 160), (224, 224), (448, 448))),
        ("dynamic:160..448@384", ImageRange((160, 160), (384, 384), (448, 448))),
        ("dynamic:160x128..448x640@224x384", ImageRange((160, 128), (224, 384), (448, 640))),
        (" dynamic: 160 .. 448x512 ", ImageRange((160, 160), (224, 224), (448, 512))),
    ],
)
def test_ranges_are_read(text, expected):
    assert parse_range(text, (224, 224)) == expected
    assert ImageRange.from_dict(expected.to_dict()) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dynamic", "expected 'dynamic:160..448'"),
        ("dynamic:160", "expected 'dynamic:160..448'"),
        ("dynamic:160-448", "expected 'dynamic:160..448'"),
        ("dynamic:448..160", "second size must lie above"),
        ("dynamic:224..224", "second size must lie above"),
        ("dynamic:0..224", "second size must lie above"),
        ("dynamic:160..448@96", "the size after @, 96x96, lies outside"),
        ("dynamic:256..448", "the checkpoint's own size, 224x224, lies outside"),
    ],
)
def test_bad_ranges_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_range(text, (224, 224))


def test_three_sizes_stand_for_a_range():
    assert parse_range("dynamic:160..448", (224, 224)).sizes() == [(224, 224), (160, 160), (448, 224)]
    assert parse_range("dynamic:160..448", (448, 448)).sizes() == [(448, 448), (160, 160), (448, 160)]
    assert parse_range("dynamic:224x160..224x448@224").sizes() == [(224, 224), (224, 160)]


def test_one_size_is_read_as_before():
    assert [parse_size(value) for value in (None, "", 224, "224", "224x384", (224, 384), [32])] == [
        None,
        None,
        (224, 224),
        (224, 224),
        (224, 384),
        (224, 384),
        (32, 32),
    ]
    for value in ("224x", "a", 0, (1, 2, 3), True, 2.5):
        with pytest.raises(UsageError, match="image_size"):
            parse_size(value)
