import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families.load import load_checkpoint
from vit_convert.families.vit.layouts import Layout
from vit_convert.families.vit.posemb import resample, sincos2d
from vit_convert.families.vit.shapes import leaf_shapes

LAYOUTS = [layout.value for layout in Layout]


def assert_same_params(first, second):
    assert list(first) == list(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype == np.float32
        assert value.shape == first.leaves[name].shape
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.fixture
def reference(checkpoint):
    return load_checkpoint(checkpoint("Ti/16", name="reference.npz", layout="big_vision"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
def test_every_layout_and_prefix_is_the_same_model(checkpoint, reference, layout, prefix):
    loaded = load_checkpoint(checkpoint("Ti/16", layout=layout, prefix=prefix))
    assert loaded.layout.value == layout
    assert loaded.architecture == reference.architecture
    assert loaded.warnings == ()
    assert_same_params(loaded.params, reference.params)


def test_names_on_disk_are_the_published_ones(checkpoint):
    names = set(np.load(checkpoint("mu/16")))
    block = "Transformer/encoderblock_0"
    assert {
        "cls",
        "embedding/kernel",
        "Transformer/posembed_input/pos_embedding",
        f"{block}/LayerNorm_0/scale",
        f"{block}/MultiHeadDotProductAttention_1/query/kernel",
        f"{block}/LayerNorm_2/bias",
        f"{block}/MlpBlock_3/Dense_1/kernel",
        "Transformer/encoder_norm/scale",
        "head/bias",
    } <= names
    assert len(names) == 16 + 8  # 16 for each block, 8 around them
    stacked = np.load(checkpoint("Ti/16", layout="big_vision_scan", name="scan.npz"))
    assert stacked["Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"].shape == (12, 192, 3, 64)


@pytest.mark.parametrize("pool", ["tok", "gap", "map"])
@pytest.mark.parametrize("layout", ["big_vision", "big_vision_scan", "vit_jax"])
def test_pooling_is_read_from_the_leaves(checkpoint, pool, layout):
    loaded = load_checkpoint(checkpoint("mu/16", layout=layout, pool=pool, pre_logits=True))
    assert loaded.architecture.pool == pool
    assert loaded.architecture.representation_size == 32
    assert set(loaded.params) == set(leaf_shapes(loaded.architecture))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_is_read_exactly(checkpoint, dtype, layout):
    full = load_checkpoint(checkpoint("mu/16", layout=layout))
    half = load_checkpoint(checkpoint("mu/16", layout=layout, dtype=dtype, name="half.npz"))
    rounding = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    for name, value in half.params.items():
        np.testing.assert_array_equal(value, full.params[name].astype(rounding).astype(np.float32), err_msg=name)


def test_bfloat16_as_numpy_writes_it(checkpoint, tmp_path):
    # numpy's own savez of ml_dtypes arrays, whose header says two raw bytes, is how the public bfloat16 files came to
    # be.
    path = checkpoint("mu/16", layout="big_vision")
    leaves = {name: value.astype(ml_dtypes.bfloat16) for name, value in np.load(path).items()}
    np.savez(tmp_path / "numpy.npz", **leaves)
    assert np.load(tmp_path / "numpy.npz")["cls"].dtype == np.dtype("V2")
    loaded = load_checkpoint(tmp_path / "numpy.npz")
    np.testing.assert_array_equal(loaded.params["head/kernel"], leaves["head/kernel"].astype(np.float32))


def test_compressed_and_safetensors_are_the_same_model(checkpoint, tmp_path):
    path = checkpoint("mu/16")
    leaves = dict(np.load(path))
    np.savez_compressed(tmp_path / "small.npz", **leaves)
    safetensors.numpy.save_file(leaves, tmp_path / "same.safetensors")
    safetensors.numpy.save_file(
        {k: v.astype(ml_dtypes.bfloat16) for k, v in leaves.items()}, tmp_path / "half.safetensors"
    )
    reference = load_checkpoint(path)
    for name in ("small.npz", "same.safetensors"):
        assert_same_params(load_checkpoint(tmp_path / name).params, reference.params)
    half = load_checkpoint(tmp_path / "half.safetensors").params["head/kernel"]
    np.testing.assert_array_equal(half, leaves["head/kernel"].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_fortran_order_and_double_precision(checkpoint, tmp_path):
    leaves = dict(np.load(checkpoint("mu/16")))
    np.savez(
        tmp_path / "other.npz", **{name: np.asfortranarray(value.astype(np.float64)) for name, value in leaves.items()}
    )
    assert_same_params(load_checkpoint(tmp_path / "other.npz").params, load_checkpoint(checkpoint("mu/16")).params)


def test_optimizer_state_is_ignored(checkpoint, tmp_path):
    leaves = {f"params/{name}": value for name, value in np.load(checkpoint("mu/16")).items()}
    moments = {f"opt/0/mu/{name}": value * np.nan for name, value in leaves.items()}
    np.savez(tmp_path / "trained.npz", **leaves, **moments, **{"chrono/accum_train_time": np.array(7)})
    loaded = load_checkpoint(tmp_path / "trained.npz")
    assert_same_params(loaded.params, load_checkpoint(checkpoint("mu/16")).params)


def test_subtree(checkpoint, tmp_path):
    path = checkpoint("mu/16", layout="big_vision", pool="map")
    image = {f"params/img/{name}": value for name, value in np.load(path).items()}
    np.savez(
        tmp_path / "two.npz", **image, **{"params/txt/Embed_0/embedding": np.zeros((3, 4)), "params/t": np.zeros(1)}
    )
    loaded = load_checkpoint(f"{tmp_path}/two.npz:img")
    assert loaded.path == tmp_path / "two.npz"
    assert_same_params(loaded.params, load_checkpoint(path).params)
    with pytest.raises(CheckpointError, match="image tower and a text tower") as error:
        load_checkpoint(tmp_path / "two.npz")
    assert ":img" in error.value.fix


def test_inlined_map_head(checkpoint, tmp_path):
    path = checkpoint("mu/16", layout="big_vision", pool="map")
    np.savez(
        tmp_path / "inlined.npz", **{name.removeprefix("MAPHead_0/"): value for name, value in np.load(path).items()}
    )
    assert_same_params(load_checkpoint(tmp_path / "inlined.npz").params, load_checkpoint(path).params)


def test_sincos2d_is_computed_where_no_table_is_stored(checkpoint):
    path = checkpoint("mu/16", layout="big_vision", pool="gap", posemb="sincos2d")
    loaded = load_checkpoint(path, image_size=(64, 96))
    np.testing.assert_array_equal(loaded.params["pos_embedding"], sincos2d((4, 6), 32))
    with pytest.raises(UsageError, match="does not tell its image size"):
        load_checkpoint(path)


def test_other_image_sizes_resample_the_table(checkpoint):
    path = checkpoint("mu/16")
    stored = load_checkpoint(path)
    loaded = load_checkpoint(path, image_size=(96, 48))
    assert (stored.architecture.image_size, loaded.architecture.image_size) == ((64, 64), (96, 48))
    assert loaded.source_image_size == (64, 64)
    assert loaded.num_params == stored.num_params
    np.testing.assert_array_equal(
        loaded.params["pos_embedding"], resample(stored.params["pos_embedding"], (4, 4), (6, 3))
    )
    np.testing.assert_array_equal(loaded.params["cls"], stored.params["cls"])
    assert "resampled from 64x64 to 96x48" in loaded.warnings[0]


@pytest.mark.parametrize("layout", ["vit_jax", "big_vision", "big_vision_old"])
def test_a_table_that_is_not_square(checkpoint, layout):
    path = checkpoint("mu/16", layout=layout, image_size=(32, 80))  # 2x5 patches
    for resolved in ({"posemb_grid": (2, 5)}, {"image_size": (32, 80)}):
        loaded = load_checkpoint(path, **resolved)
        assert loaded.source_image_size == loaded.architecture.image_size == (32, 80)
        assert loaded.params["pos_embedding"].shape == (1, 10, 32)
    assert load_checkpoint(path, posemb_grid=(2, 5), image_size=(64, 64)).params["pos_embedding"].shape == (1, 16, 32)


def test_features_leave_the_head_out(checkpoint):
    loaded = load_checkpoint(checkpoint("mu/16", pre_logits=True), outputs="features")
    assert loaded.architecture.num_classes == 0
    assert "pre_logits/kernel" in loaded.params and "head/kernel" not in loaded.params
    headless = load_checkpoint(checkpoint("mu/16", num_classes=0, name="headless.npz"), outputs="features")
    assert headless.architecture.num_classes == 0


def test_mu_is_recognised_and_others_are_custom(checkpoint, tmp_path):
    assert load_checkpoint(checkpoint("mu/8")).architecture.variant == "mu/8"
    path = checkpoint("Ti/16", layout="big_vision")
    np.savez(tmp_path / "short.npz", **{k: v for k, v in np.load(path).items() if "encoderblock_1" not in k})
    blocks = load_checkpoint(checkpoint("Ti/16")).architecture
    assert (blocks.variant, blocks.depth) == ("Ti/16", 12)
    with pytest.raises(CheckpointError, match="encoder block 1 missing"):
        load_checkpoint(tmp_path / "short.npz")
    half = {k: v for k, v in np.load(path).items() if not any(f"encoderblock_{i}/" in k for i in range(6, 12))}
    np.savez(tmp_path / "half.npz", **half)
    loaded = load_checkpoint(tmp_path / "half.npz").architecture
    assert (loaded.variant, loaded.depth, loaded.num_heads) == ("custom", 6, 3)


def test_members_are_stored_uncompressed(checkpoint):
    members = zipfile.ZipFile(checkpoint("mu/16")).infolist()
    assert all(member.compress_type == zipfile.ZIP_STORED for member in members)
