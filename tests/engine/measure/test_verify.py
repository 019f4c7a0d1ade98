"""Verification of simulated engines, which compute what onnxruntime computes, give or take an error put in on
purpose."""

import dataclasses

import numpy as np
import onnxruntime
import pytest
import simulated_gpu
from engine_graphs import BATCH, IMAGE
from reconverted import as_left

from vit_convert.core.bundle import Bundle, read_json
from vit_convert.core.engine_results import OutputCheck
from vit_convert.core.errors import BenchmarkError, BuildError, CheckError, UsageError
from vit_convert.core.image_size import ImageRange
from vit_convert.core.progress import Progress
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.core.tolerance import tolerance_for
from vit_convert.engine.commands import add_to_report, verify_bundle
from vit_convert.engine.handoff import read_config, read_facts
from vit_convert.engine.host import EngineHost
from vit_convert.engine.runtime.profiles import ShapeRange
from vit_convert.engine.runtime.session import Session
from vit_convert.engine.verify import _image_size, _where, batches_to_verify
from vit_convert.images.preprocess import Preprocess

QUIET = Progress(quiet=True)
RANGES = [[(size, *IMAGE) for size in BATCH.values()]]


def verify(gpu, path, *precisions, **overrides):
    bundle = Bundle(path)
    config = read_config(bundle)
    config.check.update(overrides)
    return verify_bundle(EngineHost.open(gpu[0], bundle, config, QUIET), precisions=precisions)


def test_right_engine_passes_at_every_batch(gpu, engines):
    path = engines("fp32", "fp16")
    result = verify(gpu, path, "fp32", "fp16")
    found = result.engines["fp32"]
    assert result.passed and found.misses == ()
    # 1, 4 and 8 are the profiles' sizes, 6 lies between.
    assert [row.batch for row in found.rows] == [1, 4, 6, 8]
    assert all(row.passed for row in found.rows) and found.max_rel < 1e-4 and found.cosine > 0.99999
    manifest = {row["name"]: row["result"] for row in read_json(path / "manifest.json")["stages"]}
    # what onnxruntime found in the export's own check
    assert result.top1 == found.top1 == pytest.approx(manifest["check"]["top1"])
    assert found.num_images == 40


# An error of 1e-2 of the scale (about 2) is too much for fp32 and not for fp16, whose cosine hardly sees it; 10 turns
# every logit around.
@pytest.mark.parametrize(
    ("precision", "error", "passes"), [("fp32", 2e-2, False), ("fp16", 2e-2, True), ("fp16", 10.0, False)]
)
def test_wrong_engine_fails_by_its_own_tolerance(gpu, engines, precision, error, passes):
    path = engines(precision, error=error)
    if passes:
        assert verify(gpu, path, precision).engines[precision].max_abs == pytest.approx(error, rel=0.01)
        return
    with pytest.raises(CheckError, match=rf"{precision}: logits at batch 1: max abs {error:.3g}") as caught:
        verify(gpu, path, precision)
    assert caught.value.exit_code == 5 and not caught.value.result.passed


def test_nan_never_passes(gpu, engines):
    with pytest.raises(CheckError, match="max abs inf"):
        verify(gpu, engines("fp16", error=float("nan")), "fp16")


def test_an_image_that_gets_the_result_of_another_is_found(gpu, engines, monkeypatch):
    """Also one that is as far away as the reference has images: those that are tiled would be the same."""
    path = engines("fp32")
    with np.load(Bundle(path).reference) as file:
        distance = len(file["images"])
    run = Session.run

    def swapped(session, images):
        found = run(session, images)
        return {
            name: np.roll(values, distance, axis=0) if len(values) == 8 else values for name, values in found.items()
        }

    monkeypatch.setattr(Session, "run", swapped)
    with pytest.raises(CheckError, match="logits at batch 8"):
        verify(gpu, path, "fp32")


def test_every_engine_is_judged_before_the_first_miss_is_reported(gpu, engines):
    engines("fp32", error=1.0)
    path = engines("fp16")
    with pytest.raises(CheckError) as caught:
        verify(gpu, path, "fp32", "fp16")
    assert [found.passed for found in caught.value.result.engines.values()] == [False, True]


def onnx_logits(path):
    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    images = np.load(path / "evaluation_images.npy")
    fed = Preprocess.from_dict(read_facts(Bundle(path)).preprocess).graph_input(
        images, np.float32, channels_first=False
    )
    return session.run(None, {"images": fed})[0]


def test_agreement_with_jax_is_judged_where_it_is_known(gpu, engines):
    path = engines("fp16")
    logits = onnx_logits(path)
    np.save(path / "evaluation_logits.npy", logits)
    as_left(path, "evaluation_logits.npy")
    assert verify(gpu, path, "fp16").engines["fp16"].agreement == 100
    logits[:2, :] = -logits[:2, :]  # two of 40 images change their first class
    np.save(path / "evaluation_logits.npy", logits)
    as_left(path, "evaluation_logits.npy")
    with pytest.raises(CheckError, match=r"agrees with JAX on 95\.00 % of 40 images; needed 99 %"):
        verify(gpu, path, "fp16")


def test_top1_drop_is_judged(gpu, engines):
    path = engines("fp16")
    np.save(path / "evaluation_labels.npy", (np.argmax(onnx_logits(path), axis=-1) + 1) % 10)  # every answer wrong
    as_left(path, "evaluation_labels.npy")
    with pytest.raises(CheckError, match=r"top-1 is 0\.00 %, .* points below JAX's .* %; allowed 1"):
        verify(gpu, path, "fp16")


def test_missing_parts(gpu, engines, tmp_path):
    path = engines("fp32")
    with pytest.raises(BuildError, match=r"int8\.plan: there is no such engine"):
        verify(gpu, path, "int8")
    (path / "reference.npz").unlink()
    with pytest.raises(BenchmarkError, match=r"reference\.npz: there is no such file, which stage reference left"):
        verify(gpu, path, "fp32")
    (path / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="stage checkpoint is not done"):
        read_facts(Bundle(path))


@pytest.mark.parametrize(
    "name", ["reference.npz", "evaluation_images.npy", "evaluation_labels.npy", "evaluation_logits.npy"]
)
@pytest.mark.parametrize("kept", [0, 0.5])
def test_damaged_files_are_named(gpu, engines, name, kept):
    path = engines("fp16")
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(BenchmarkError, match=rf"{name}: is not the file that stage (reference|images) left") as caught:
        verify(gpu, path, "fp16")
    assert caught.value.exit_code == 8 and "Copy the whole bundle from the export host." in caught.value.fix
    as_left(path, name)  # damaged before it was hashed
    with pytest.raises(BenchmarkError, match=rf"{name}: cannot be read \("):
        verify(gpu, path, "fp16")


def test_a_reference_of_another_model_is_named(gpu, engines):
    path = engines("fp32")
    with np.load(path / "reference.npz") as file:
        reference = dict(file)
    count = len(reference["images"])
    for changed, message in (
        (
            {"logits": reference["logits"][:, :7]},
            rf"reference\.npz: logits: \[{count}, 7\], the engine gives \[{count}, 10\]",
        ),
        ({"logits": reference["logits"][:1]}, rf"reference\.npz: logits: \[1, 10\], the engine gives \[{count}, 10\]"),
    ):
        np.savez(path / "reference.npz", **{**reference, **changed})
        as_left(path, "reference.npz")
        with pytest.raises(BenchmarkError, match=message):
            verify(gpu, path, "fp32")
    np.savez(path / "reference.npz", logits=reference["logits"])
    as_left(path, "reference.npz")
    with pytest.raises(BenchmarkError, match=r"reference\.npz: holds \['logits'\] and no images"):
        verify(gpu, path, "fp32")


def test_an_evaluation_of_another_size_is_named(gpu, engines):
    path = engines("fp16")
    np.save(path / "evaluation_logits.npy", np.zeros((40, 7), np.float32))
    as_left(path, "evaluation_logits.npy")
    with pytest.raises(BenchmarkError, match=r"evaluation_logits\.npy: \[40, 7\], the engine gives \[40, 10\]"):
        verify(gpu, path, "fp16")
    np.save(path / "evaluation_labels.npy", np.zeros(39, np.int64))
    as_left(path, "evaluation_labels.npy")
    with pytest.raises(BenchmarkError, match=r"evaluation_labels\.npy: \[39\], the images are \[40\]"):
        verify(gpu, path, "fp16")


def test_report_gets_what_was_found(gpu, engines):
    path = engines("fp32", "fp16")
    bundle = Bundle(path)
    before = read_json(bundle.report)
    host = EngineHost.open(gpu[0], bundle, read_config(bundle), QUIET)
    add_to_report(host, verify=verify(gpu, path, "fp32"))
    add_to_report(host, verify=verify(gpu, path, "fp16"))
    after = read_json(bundle.report)
    assert set(after["verify"]["engines"]) == {"fp32", "fp16"} and after["verify"]["passed"]
    assert after["accuracy"]["engine"] == after["verify"]["engines"]["fp16"]["top1"]
    assert after["checkpoint"] == before["checkpoint"]


def test_batches_to_verify():
    def spans(*triples):
        return [ShapeRange(*((size, 8, 8, 3) for size in triple)) for triple in triples]

    assert batches_to_verify(spans((1, 8, 64))) == [1, 8, 36, 64]
    assert batches_to_verify(spans((8, 8, 8), (64, 64, 64))) == [1, 8, 36, 64]
    assert batches_to_verify(spans((1, 1, 1))) == [1]
    assert batches_to_verify(spans((1, 1, 2))) == [1, 2]


@pytest.mark.parametrize(
    ("layout", "shape", "size"),
    [("NHWC", (2, 8, 12, 3), (8, 12)), ("NCHW", (2, 3, 8, 12), (8, 12)), ("", (2, 8, 12, 3), (0, 0))],
)
def test_the_size_that_a_row_is_of(layout, shape, size):
    """Tokens have none."""
    signature = Signature(
        (Tensor("x", "float32", ("batch", *shape[1:]), layout),), (Output("y", "float32", ("batch",)),)
    )
    assert _image_size(signature, {"x": np.zeros(shape, np.float32)}) == size


def test_a_miss_names_the_size_where_there_are_several(converted):
    facts = read_facts(Bundle(converted))
    row = OutputCheck.from_dict({"image_size": [8, 12], "output": "y", "batch": 1})
    several = dataclasses.replace(facts, image_size=ImageRange((8, 8), (8, 12), (16, 16)))
    assert (_where(row, facts), _where(row, several)) == ("", " of 8x12")


def test_tolerances(converted):
    config = read_config(Bundle(converted))
    strict = tolerance_for(config, "fp32", engine=True)
    assert (strict.rtol, strict.cosine) == (1e-3, config.check.cosine)
    assert tolerance_for(config, "fp32").rtol == tolerance_for(config, "smooth").rtol == config.check.rtol
    assert tolerance_for(config, "fp32", engine=True, tf32=True) == tolerance_for(config, "fp16")
    assert tolerance_for(config, "int8", engine=True) == dataclasses.replace(
        strict, atol=0.0, rtol=float("inf"), cosine=config.check.int8_cosine
    )


def test_channels_first_and_uint8_inputs():
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    half = Preprocess(resize="bilinear", antialias=False, resize_short=0, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert half.graph_input(pixels, np.uint8, channels_first=False) is pixels
    fed = half.graph_input(pixels, np.float32, channels_first=True)
    assert fed.shape == (2, 3, 4, 4) and fed.flags.c_contiguous
    # (x - 127.5) / 127.5 to within 2.4e-7, as the preprocessing record documents.
    np.testing.assert_allclose(fed[1, 2, 3, 0], (float(pixels[1, 3, 0, 2]) - 127.5) / 127.5, atol=2.4e-7)


def test_rows_that_depend_on_their_place_are_seen_without_jax(gpu, engines):
    """2e-4 of scale a row is within what JAX's outputs allow at batch 1 to 4, and so is each row by itself."""
    path = engines("fp32", by_place=1e-3)
    with pytest.raises(CheckError, match="logits does not agree with itself") as caught:
        verify(gpu, path, "fp32", engine_rtol=1e-5)
    rows = caught.value.result.engines["fp32"].consistency
    assert {row.check: row.passed for row in rows} == {
        "identical rows": False,
        "permuted batch": False,
        "batch of one": True,  # the first of a batch has nothing before it
        "finite": True,
    }
    found = verify(gpu, engines("fp32"), "fp32").engines["fp32"].consistency
    assert all(row.passed for row in found) and len(found) == 4


def test_without_consistency_none_is_run(gpu, engines):
    assert verify(gpu, engines("fp32"), "fp32", consistency=False).engines["fp32"].consistency == ()


def test_two_builds_of_a_bundle_have_to_agree(gpu, engines):
    path = engines("fp16")
    own = path / "engines" / "tensorrt-8.6.0-sm90"
    other = path / "engines" / "tensorrt-8.6.0-portable"
    simulated_gpu.write_plan(other / "fp16.plan", path / "model.onnx", RANGES, precision="fp16", error=1e-4)
    found = verify(gpu, path, "fp16").engines["fp16"].consistency
    (row,) = [row for row in found if row.check == "tensorrt-8.6.0-portable"]
    assert row.passed and row.max_abs == pytest.approx(1e-4, rel=0.01)
    simulated_gpu.write_plan(other / "fp16.plan", path / "model.onnx", RANGES, precision="fp16", error=10.0)
    with pytest.raises(CheckError, match=r"logits does not agree with itself \(tensorrt-8\.6\.0-portable\)"):
        verify(gpu, path, "fp16")
    assert (own / "fp16.plan").exists()


def test_every_other_build_of_this_graph_is_compared_and_none_of_another(gpu, engines):
    """Whatever its folder is called, before or after the engine's own."""
    path = engines("fp16")
    folders = ["tensorrt-8.6.0-a", "tensorrt-8.6.0-z", "tensorrt-8.6.0-of-another-graph", "rtx-1.7.1-all"]
    for folder in folders:
        plan = path / "engines" / folder / "fp16.plan"
        simulated_gpu.write_plan(
            plan, path / "model.onnx", RANGES, precision="fp16", error=10.0 if "-of-" in folder else 0
        )
    graph = read_json(plan.parent.parent / folders[2] / "fp16.plan.json")["onnx"]
    simulated_gpu.change_sidecar(path / "engines" / folders[2] / "fp16.plan", onnx={**graph, "sha256": "0" * 64})
    result = verify(gpu, path, "fp16").engines["fp16"]
    compared = [row.check for row in result.consistency if row.check.startswith(("tensorrt-", "rtx-"))]
    assert compared == folders[:2] and result.passed
