"""Large activations in really exported graphs: a checkpoint whose residual stream reaches 1.4e3, through the whole
pipeline."""

import json

import jax.numpy as jnp
import jax2onnx
import numpy as np
import onnx_ir as ir
import pytest
from flax import traverse_util
from rounded import naive, run_rounded
from tiny_vit import TinyViT, normalize

from vit_convert.convert import convert
from vit_convert.core.compare import compare
from vit_convert.core.config import default_config
from vit_convert.core.errors import UsageError
from vit_convert.core.onnx_file import open_session, run_session
from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint
from vit_convert.families.vit.module import ViT
from vit_convert.quantize.activation_max import largest
from vit_convert.quantize.graph import activations


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Ti/16 on 48x48 pixels with four outlier channels, converted to fp16."""
    root = tmp_path_factory.mktemp("outliers")
    write_random_checkpoint(root / "outliers.npz", "Ti/16", image_size=(48, 48), num_classes=10, outlier_channels=4)
    config = default_config()
    config.name, config.checkpoint, config.precision = "outliers", str(root / "outliers.npz"), "fp16"
    config.engine.backend = "none"
    convert(config, root, quiet=True)
    return root / "outliers"


@pytest.fixture(scope="module")
def reference(bundle):
    with np.load(bundle / "reference.npz") as file:
        return {name: file[name] for name in file.files}


def test_the_typed_graph_survives(bundle, reference):
    report = json.loads((bundle / "report.json").read_text())["checks"]["fp16"]
    assert report["passed"]
    assert compare(reference["logits"], run_rounded(bundle / "model.fp16.onnx", reference["images"])).cosine >= 0.999


def test_the_report_says_how_large_activations_are(bundle, reference):
    blocks = json.loads((bundle / "report.json").read_text())["checks"]["fp16"]["max_abs_activation"]
    assert sorted(blocks) == [*(f"block_{i:02d}" for i in range(12)), "outside"]
    for i in range(12):
        tokens = slice(0, 1) if i == 11 else slice(None)  # the graph's last block computes the class token alone
        found = np.abs(reference[f"block_{i:02d}"][:, tokens]).max()
        if i:  # the first makes the outliers; the largest inside a block is at least its output's
            assert 1.2e3 < found < 1.7e3
        # float32, other order of summation than JAX's
        assert blocks[f"block_{i:02d}"]["max_abs"] >= found * (1 - 1e-4)


def test_a_naive_cast_of_the_plain_export_does_not(bundle, reference, tmp_path):
    checkpoint = load_checkpoint(bundle.parent / "outliers.npz")
    leaves = {name: jnp.asarray(checkpoint.params[name]) for name in checkpoint.params}
    variables = {"params": traverse_util.unflatten_dict(leaves, sep="/")}
    module = ViT(checkpoint.architecture)
    plain = jax2onnx.to_onnx(
        lambda images: module.apply(variables, images)[0], [("batch", 48, 48, 3)], opset=20, return_mode="ir"
    )
    # The export itself is right; only fp16 is not what it is made for.
    ir.save(plain, tmp_path / "plain.onnx")
    feed = plain.graph.inputs[0].name
    (exact,) = run_session(open_session(tmp_path / "plain.onnx"), reference["images"]).values()
    assert compare(reference["logits"], exact).cosine > 0.9999
    ir.save(naive(plain), tmp_path / "naive.onnx")
    ruined = compare(
        reference["logits"], run_rounded(tmp_path / "naive.onnx", reference["images"].astype(np.float16), feed)
    )
    assert not ruined.finite or ruined.cosine < 0.5  # the mean of x² is infinite


@pytest.fixture
def huge(tmp_path):
    """The config of a model whose stream reaches 1.2e5."""
    path = tmp_path / "huge.npz"
    write_random_checkpoint(path, "Ti/16", image_size=(48, 48), num_classes=10, outlier_channels=4)
    with np.load(path) as file:
        leaves = {name: file[name] for name in file.files}
    (kernel,) = [
        name for name in leaves if name.startswith("Transformer/encoderblock_0/") and name.endswith("Dense_1/kernel")
    ]
    leaves[kernel] *= np.where(np.abs(leaves[kernel]).mean(0) > 1, 80, 1).astype(np.float32)
    np.savez(path, **leaves)
    config = default_config()
    config.name, config.checkpoint, config.precision, config.engine.backend = "huge", str(path), "fp16", "none"
    return config


def test_the_pipeline_finds_what_fp16_cannot_hold(huge, tmp_path):
    """fp16's check alone cannot see it, since onnxruntime computes in fp32."""
    report = convert(huge, tmp_path, quiet=True)
    check = report["checks"]["fp16"]
    assert check["max_abs_activation"]["block_05"]["max_abs"] > 65504
    assert check["fp32_islands"]["block_05"].endswith(
        f"reaches {check['max_abs_activation']['block_05']['max_abs']:.3g}"
    )
    with np.load(tmp_path / "huge" / "reference.npz") as file:
        images, logits = file["images"], file["logits"]
    assert compare(logits, run_rounded(tmp_path / "huge" / "model.fp16.onnx", images)).cosine >= 0.999


@pytest.mark.slow
def test_what_a_builder_flag_would_ruin_is_said(huge, tmp_path, capfd):
    """TensorRT 8 has no typed graph: the conversion names the blocks that the build has to keep, and is silent once it
    keeps them."""
    huge.target = "trt8"
    report = convert(huge, tmp_path)
    ranges, said = report["max_abs_activation"], capfd.readouterr().err
    assert "fp16" not in report["checks"] and sorted(ranges) == [*(f"block_{i:02d}" for i in range(12)), "outside"]
    above = [block for block, row in ranges.items() if row["max_abs"] > 65504]
    assert "block_05" in above and "outside" not in above
    largest = max((ranges[block] for block in above), key=lambda row: row["max_abs"])
    found = f"{', '.join(above)}: up to {largest['max_abs']:.3g} ({largest['tensor']}), fp16 holds 65504"
    assert f'{found}; build with --config.keep_fp32="{tuple(above)}"' in said
    huge.keep_fp32 = ("*/fc2", *above[1:])  # of the first of them, what adds to the stream and not the stream
    convert(huge, tmp_path)
    assert f"{above[0]}: up to " in capfd.readouterr().err
    huge.keep_fp32 = tuple(above)
    convert(huge, tmp_path)
    assert "fp16 holds" not in capfd.readouterr().err
    huge.keep_fp32 = ("block_5",)
    with pytest.raises(UsageError, match="keep_fp32: 'block_5' matches no block"):
        convert(huge, tmp_path, quiet=True)


@pytest.mark.parametrize("opset", [17, 20])
def test_ranges(tmp_path, images, opset):
    path = TinyViT(opset=opset).save(tmp_path / "model.onnx")
    names = [name for name in activations(ir.load(path).graph) if name != "images"]
    batches = [normalize(images[:5]), normalize(images[5:8])]
    values = run_session(open_session(path, names), np.concatenate(batches), names)
    for name, found in largest(path, names, batches).items():
        assert found == pytest.approx(np.abs(values[name]).max(), rel=1e-5)  # float32, other batch sizes
    norms = [name for name in names if name.endswith("LayerNorm_0/out")]
    for name, found in largest(path, norms, batches, per_channel=True).items():
        np.testing.assert_allclose(found, np.abs(values[name]).max((0, 1)), rtol=1e-5)
