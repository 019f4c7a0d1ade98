"""Several outputs of one model, of every family: what each is, in JAX and in the graph."""

import functools
import pathlib
import tempfile

import numpy as np
import onnxruntime
import pytest

from vit_convert.core.config import OUTPUTS, read_outputs
from vit_convert.core.errors import UsageError
from vit_convert.core.token_samples import sample_texts
from vit_convert.export.exporter import export_model
from vit_convert.export.targets import lowering_named, target_named
from vit_convert.families.load import load_checkpoint
from vit_convert.families.outputs import outputs_of, settle_outputs
from vit_convert.families.random import write_random_checkpoint

# Variant, part of the file, side in pixels, options, class tokens in front of the others, and what the model gives.
CASES = {
    "vit": ("mu/16", "", 64, {}, 1, "logits,features,tokens,grid"),
    "vit_gap": ("mu/16-gap-norep", "", 64, {}, 0, "logits,features,tokens,grid"),
    "vit_map": ("mu/16", "", 64, {"pool": "map"}, 0, "tokens"),
    "hybrid": ("R8+ViT-mu/8", "", 64, {"depth": 2}, 1, "logits,tokens,grid"),
    "mixer": ("Mixer-mu/16", "", 64, {"depth": 2}, 0, "features,tokens,grid"),
    "siglip": ("SigLIP-mu/16", "img", 48, {"depth": 2}, 0, "embedding,features,tokens,grid"),
    "lit_text": ("LiT-mu", "txt", 32, {"depth": 2}, 0, "embedding,features,tokens"),
    "tips": ("TIPS-mu/14", "img", 56, {"depth": 2}, 2, "embedding,features,tokens,grid,class_tokens"),
}
RUN = ["vit", "vit_gap", "mixer", "siglip", "lit_text", "tips", pytest.param("hybrid", marks=pytest.mark.slow)]


@functools.cache
def loaded(case):
    """The checkpoint and its model; the weights are in memory."""
    variant, part, side, options, _, outputs = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.npz"
        size = {} if part else {"num_classes": 10}
        write_random_checkpoint(path, variant, image_size=(side, side), **size, **options)
        found = load_checkpoint(f"{path}:{part}" if part else path, outputs=outputs)
        return found, found.family.model(found)


def called(case):
    """The outputs as the model calls them: a text tower takes `tokens`, and gives what has another name."""
    given = CASES[case][-1].split(",")
    return [{"tokens": "token_features"}.get(name, name) for name in given] if "text" in case else given


@functools.cache
def fed(case):
    taken, generator = loaded(case)[1].signature.inputs[0], np.random.default_rng(0)
    if taken.is_text:
        return sample_texts(taken, 3, generator)
    return generator.uniform(-1, 1, (3, *taken.shape[1:])).astype(np.float32)


@functools.cache
def given(case):
    """What JAX gives."""
    return loaded(case)[1].run(fed(case))


def normalized(case, stream):
    """The last norm of a stream, in float64."""
    params = loaded(case)[0].params
    scope = "pre_head_layer_norm/" if case == "mixer" else "Transformer/encoder_norm/"
    x = stream.astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * params[f"{scope}scale"] + params[f"{scope}bias"]


def close(found, right, *, of_scale=1e-5):
    assert found.shape == right.shape and np.abs(found - right).max() <= of_scale * np.abs(right).max()


@pytest.mark.parametrize("case", RUN)
def test_each_is_what_stands_there_in_the_model(case):
    """Behind the last block: its norm, the pooling and the head, in float64."""
    class_tokens, several = CASES[case][4], given(case)
    checkpoint, model = loaded(case)
    assert list(model.signature.judged) == called(case) and checkpoint.output == called(case)[0]
    for output in model.signature.outputs:
        assert several[output.name].shape == (3, *output.shape[1:])
    last = max(name for name in several if name.startswith("block_") and "/" not in name)
    x = several[last] if case == "lit_text" else normalized(case, several[last])  # BERT's norm is in the block
    close(several["token_features" if "text" in case else "tokens"], x[:, class_tokens:])
    if "grid" in several:
        np.testing.assert_array_equal(several["grid"].reshape(several["tokens"].shape), several["tokens"])
        assert several["grid"].shape[1] == several["grid"].shape[2] > 1
    if "class_tokens" in several:
        close(several["class_tokens"], x[:, :class_tokens])
    pooled = x[:, 0] if class_tokens or "text" in case else x.mean(1)
    if case == "siglip":  # which pools by attention: the embedding says whether it is right
        close(several["embedding"], several["features"] / np.linalg.norm(several["features"], axis=1, keepdims=True))
    elif "features" in several:
        close(several["features"], pooled)
    if "logits" in several:
        close(several["logits"], pooled @ checkpoint.params["head/kernel"] + checkpoint.params["head/bias"])


def test_what_is_traced_is_what_is_run(case="mixer"):
    """Of two blocks all are traced: the function that becomes a graph, and the one that runs part by part."""
    _, model = loaded(case)
    found = model.apply({name: model.params[name] for name in model.traced_shapes}, fed(case))
    assert {*found} == {*model.signature.judged, *model.traced_taps}
    for name, values in found.items():
        close(np.asarray(values), given(case)[name])


@pytest.mark.slow
def test_a_swins_grid_is_that_of_the_image():
    """Windows of 7 in a last stage of 14 x 14: their tokens lie row by row of the image, not window by window."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "swin.safetensors"
        write_random_checkpoint(path, "Swin-mu/7", image_size=(112, 112), num_classes=10, depth=2)
        found = load_checkpoint(path, image_size=(112, 112), outputs="features,tokens,grid")
        given = found.family.model(found).run(
            np.random.default_rng(0).uniform(-1, 1, (2, 112, 112, 3)).astype(np.float32)
        )
    expected = np.empty_like(given["grid"])
    for window, (row, column) in enumerate([(0, 0), (0, 7), (7, 0), (7, 7)]):
        places = given["norm"][:, window * 49 : window * 49 + 49].reshape(2, 7, 7, -1)
        expected[:, row : row + 7, column : column + 7] = places
    np.testing.assert_array_equal(given["grid"], expected)
    np.testing.assert_array_equal(given["tokens"], expected.reshape(given["tokens"].shape))
    close(given["features"], expected.astype(np.float64).mean((1, 2)))


def test_of_attention_pooling_nothing_is_left_in_a_model_of_tokens():
    alone, model = loaded("vit_map")
    assert (alone.output, alone.judge, model.signature.judged) == ("tokens", "cosine", ("tokens",))
    assert not [name for name in alone.params if name.startswith(("MAPHead_0", "head"))]
    assert alone.num_params == sum(leaf.size for leaf in alone.params.leaves.values())


def check_graph(case, path):
    model = loaded(case)[1]
    session = onnxruntime.InferenceSession(path)
    assert [value.name for value in session.get_outputs()] == called(case)
    for name, found in zip(called(case), session.run(None, {model.signature.inputs[0].name: fed(case)})):
        close(found, given(case)[name], of_scale=1e-4)


@pytest.mark.parametrize(
    ("case", "target"), [("vit", "rtx"), ("vit_gap", "trt8"), ("lit_text", "rtx"), ("tips", "trt10"), ("mixer", "trt8")]
)
def test_graphs_give_all_of_them(tmp_path, case, target):
    export_model(loaded(case)[1], tmp_path / "model.onnx", target=target_named(target))
    check_graph(case, tmp_path / "model.onnx")


def test_the_stream_behind_the_last_block_keeps_its_name_where_it_is_an_output_too(tmp_path):
    report = export_model(loaded("lit_text")[1], tmp_path / "model.onnx", target=target_named("rtx"))
    assert report.taps == ("embedded", "block_00", "block_01")


def test_a_lowering_gives_all_of_them(tmp_path):
    export_model(loaded("vit")[1], tmp_path / "model.onnx", target=lowering_named("trt8", "matmul"))
    check_graph("vit", tmp_path / "model.onnx")


def test_tokens_of_images_of_any_size(tmp_path):
    """Behind a class token, whose place is cut off without a word of how many tokens follow."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.npz"
        write_random_checkpoint(path, "mu/16", image_size=(64, 64), num_classes=10)
        found = load_checkpoint(path, outputs="logits,tokens")
        model = found.family.model(found)
    path = tmp_path / "model.onnx"
    export_model(model, path, target=target_named("rtx", dynamic=True), dynamic_patch=16)
    session = onnxruntime.InferenceSession(path)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 80, 96, 3)).astype(np.float32)  # larger than what it is for
    right = model.run(images)
    assert right["tokens"].shape == (2, 30, 32)
    for name, values in zip(("logits", "tokens"), session.run(None, {"images": images})):
        close(values, right[name], of_scale=1e-4)


def test_names_are_read_in_one_order():
    assert read_outputs("auto") == () and read_outputs(" tokens,logits ") == ("logits", "tokens")
    assert read_outputs(",".join(reversed(OUTPUTS))) == OUTPUTS
    for wrong in ("token", "logits,", "auto,tokens", ""):
        with pytest.raises(UsageError, match="is not one of auto, logits"):
            read_outputs(wrong)
    with pytest.raises(UsageError, match="this model has no grid, but logits or features") as error:
        settle_outputs("grid,logits", ("logits", "features"), "a.npz")
    assert error.value.fix == "Use logits or features."


def test_what_each_output_is():
    shapes = {"logits": (10,), "features": (8,), "embedding": (4,), "tokens": ("length", 8), "grid": (2, 3, 8)}
    found = outputs_of([*shapes], shapes)
    assert [(output.name, output.shape[0], output.shape[1:]) for output in found] == [
        (name, "batch", shape) for name, shape in shapes.items()
    ]
    assert [output.judge for output in found] == ["top1", "cosine", "embedding", "cosine", "cosine"]
    assert {output.dtype for output in found} == {"float32"}


@pytest.mark.parametrize(
    ("offered", "said"), [(["logits"], "logits"), (["a", "logits"], "a or logits"), (["a", "b", "c"], "a, b or c")]
)
def test_what_a_model_gives_is_said_where_it_gives_another(offered, said):
    assert settle_outputs("auto", offered, "a.npz") == (offered[0],)
    with pytest.raises(UsageError) as error:
        settle_outputs("features", offered, "a.npz", "a tower")
    assert str(error.value) == f"a.npz: outputs='features': a tower has no features, but {said}"
    assert error.value.fix == f"Use {said}."
    with pytest.raises(UsageError, match="has no features, but"):  # the first of those that are missing
        settle_outputs("features,tokens", offered, "a.npz")
