"""What loading makes of a tiny file: its numbers, its warnings and its refusals, one by one."""

import hashlib
import pathlib
import threading

import numpy as np
import pytest

from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families import load
from vit_convert.families.load import load_checkpoint

B = "Transformer/encoderblock_0/"
TABLE = "Transformer/posembed_input/pos_embedding"


@pytest.fixture
def edited(checkpoint, tmp_path):
    """Writes a mu/16 of 2 x 2 patches and 10 classes, after a change to its leaves."""

    def write(change=None, **options):
        leaves = dict(np.load(checkpoint("mu/16", **{"image_size": (32, 32), **options})))
        if change is not None:
            change(leaves)
        np.savez(tmp_path / "e.npz", **leaves)
        return tmp_path / "e.npz", leaves

    return write


def test_what_is_known_of_a_file(edited):
    path, leaves = edited()
    loaded = load_checkpoint(str(path))
    assert loaded.path == path and isinstance(loaded.path, pathlib.Path)
    assert loaded.layout.value == loaded.preprocess == "vit_jax"
    assert loaded.architecture.variant == "mu/16" and loaded.architecture.image_size == loaded.source_image_size == (
        32,
        32,
    )
    assert (loaded.title, loaded.variant, loaded.num_classes, loaded.output) == ("ViT", "mu/16", 10, "logits")
    assert (loaded.image_size, loaded.patch_size, loaded.resizable) == ((32, 32), 16, True)
    assert loaded.attentions == ((16, 5),)  # 2 heads of 32 channels; 2 x 2 patches and the class token
    assert loaded.num_params == sum(leaf.size for leaf in leaves.values())
    assert (loaded.warnings, loaded.zero_head) == ((), False)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_hashed_beside_what_comes_next(edited, monkeypatch):
    """Gigabytes take a while, and nothing waits for it but who asks for the sum."""
    returned = threading.Event()
    monkeypatch.setattr(load, "hash_once", lambda file: "the sum" if returned.wait(30) else "nobody returned")
    loaded = load_checkpoint(edited()[0])
    assert not loaded.hashing.done()
    returned.set()
    assert loaded.sha256 == "the sum"


def test_parameters_are_the_files_but_for_the_class_tokens_row(edited):
    path, leaves = edited()
    params = load_checkpoint(path).params
    assert np.array_equal(params["head/kernel"], leaves["head/kernel"])
    assert np.array_equal(params[f"{B}MlpBlock_0/Dense_1/kernel"], leaves[f"{B}MlpBlock_3/Dense_1/kernel"])
    assert np.array_equal(params["pos_embedding"], leaves[TABLE][:, 1:])
    assert np.array_equal(params["cls"], leaves["cls"] + leaves[TABLE][:, :1])


def test_without_a_class_token_no_row_is_folded(edited):
    path, leaves = edited(layout="big_vision", pool="gap")
    loaded = load_checkpoint(path)
    assert "cls" not in loaded.params and np.array_equal(loaded.params["pos_embedding"], leaves["pos_embedding"])
    assert loaded.num_params == sum(leaf.size for leaf in leaves.values())


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_parameters_are_float32(edited, dtype):
    path, leaves = edited(lambda leaves: leaves.update({name: leaf.astype(dtype) for name, leaf in leaves.items()}))
    params = load_checkpoint(path).params
    assert {params[name].dtype for name in params} == {np.dtype(np.float32)}
    assert np.array_equal(params["head/kernel"], leaves["head/kernel"].astype(np.float32))


def test_another_size_resamples_the_table(edited):
    path, leaves = edited()
    loaded = load_checkpoint(path, image_size=(48, 32))
    assert loaded.architecture.image_size == (48, 32) and loaded.source_image_size == (32, 32)
    assert loaded.params["pos_embedding"].shape == loaded.params.leaves["pos_embedding"].shape == (1, 6, 32)
    assert loaded.num_params == sum(leaf.size for leaf in leaves.values())  # of the file
    (warning,) = loaded.warnings
    assert (
        warning
        == "e.npz: position table resampled from 32x32 to 48x32 pixels; accuracy drops unless the model was trained "
        "for both."
    )
    flat_path, _ = edited(lambda leaves: leaves[TABLE].fill(7))
    assert np.allclose(load_checkpoint(flat_path, image_size=(64, 64)).params["pos_embedding"], 7)


def test_the_same_size_resamples_nothing(edited):
    path, leaves = edited()
    loaded = load_checkpoint(path, image_size=(32, 32))
    assert loaded.warnings == () and np.array_equal(loaded.params["pos_embedding"], leaves[TABLE][:, 1:])


def test_a_grid_that_is_given(edited):
    path, leaves = edited(image_size=(16, 64))
    loaded = load_checkpoint(path, posemb_grid=(1, 4))
    assert loaded.architecture.image_size == loaded.source_image_size == (16, 64) and loaded.warnings == ()
    assert np.array_equal(loaded.params["pos_embedding"], leaves[TABLE][:, 1:])
    # of as many patches, elsewhere
    (warning,) = load_checkpoint(path, posemb_grid=(1, 4), image_size=(64, 16)).warnings
    assert "resampled from 16x64 to 64x16" in warning


def test_a_computed_table(edited):
    path, leaves = edited(layout="big_vision", pool="gap", posemb="sincos2d")
    loaded = load_checkpoint(path, image_size=(32, 64))
    assert loaded.architecture.image_size == loaded.source_image_size == (32, 64) and loaded.warnings == ()
    assert loaded.params["pos_embedding"].shape == (1, 8, 32) and loaded.params["pos_embedding"].dtype == np.float32
    assert loaded.num_params == sum(leaf.size for leaf in leaves.values())  # which holds none


@pytest.mark.parametrize(("width", "sound"), [(4, False), (8, True), (10, False), (12, True), (14, False)])
def test_widths_for_which_a_table_is_computed(tmp_path, width, sound):
    """Sines and cosines of rows and of columns: a multiple of four, and frequencies from the first to the last, so two
    of each."""
    heads = 2
    attention = {f"{name}/kernel": (width, heads, width // heads) for name in ("query", "key", "value")}
    attention |= {f"{name}/bias": (heads, width // heads) for name in ("query", "key", "value")}
    attention |= {"out/kernel": (heads, width // heads, width), "out/bias": (width,)}
    shapes = {"embedding/kernel": (16, 16, 3, width), "embedding/bias": (width,)}
    shapes |= {f"{B}MultiHeadDotProductAttention_0/{name}": shape for name, shape in attention.items()}
    for i in range(2):
        shapes |= {f"{B}LayerNorm_{i}/scale": (width,), f"{B}LayerNorm_{i}/bias": (width,)}
    shapes |= {f"{B}MlpBlock_0/Dense_0/kernel": (width, 20), f"{B}MlpBlock_0/Dense_0/bias": (20,)}
    shapes |= {f"{B}MlpBlock_0/Dense_1/kernel": (20, width), f"{B}MlpBlock_0/Dense_1/bias": (width,)}
    shapes |= {"Transformer/encoder_norm/scale": (width,), "Transformer/encoder_norm/bias": (width,)}
    shapes |= {"head/kernel": (width, 3), "head/bias": (3,)}
    np.savez(tmp_path / "w.npz", **{name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    if sound:
        assert load_checkpoint(tmp_path / "w.npz", image_size=(32, 32)).params["pos_embedding"].shape == (1, 4, width)
    else:
        with pytest.raises(
            CheckpointError, match=f"no position table, and sincos2d has none for width {width}: 8, 12, 16"
        ):
            load_checkpoint(tmp_path / "w.npz", image_size=(32, 32))


# --- the head ---------------------------------------------------------------------------------------------------------


def test_features_have_no_head(edited):
    path, leaves = edited()
    loaded = load_checkpoint(path, outputs="features")
    assert loaded.architecture.num_classes == 0 and not [name for name in loaded.params if name.startswith("head/")]
    assert loaded.num_params == sum(leaf.size for name, leaf in leaves.items() if not name.startswith("head/"))


def test_a_head_of_zeros(edited):
    path, _ = edited(lambda leaves: leaves.update({"head/kernel": np.zeros_like(leaves["head/kernel"])}))
    loaded = load_checkpoint(path)
    assert loaded.zero_head
    (warning,) = loaded.warnings
    assert warning.startswith("e.npz: head/kernel is all zeros, so every class gets the same logit")
    features = load_checkpoint(path, outputs="features")
    assert (features.zero_head, features.warnings) == (False, ())
    path, _ = edited(lambda leaves: leaves["head/kernel"].__setitem__((slice(None), slice(1, None)), 0))
    assert not load_checkpoint(path).zero_head  # one class is told from the others


def test_no_head(edited):
    path, _ = edited(num_classes=0)
    with pytest.raises(CheckpointError, match=rf"{path}: no head/kernel, so there are no logits") as error:
        load_checkpoint(path)
    assert error.value.fix == "Set outputs='features'."
    assert load_checkpoint(path, outputs="features").architecture.num_classes == 0


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_arguments_are_checked_before_the_file_is_opened():
    with pytest.raises(UsageError, match=r"^family 'vitt': unknown\. Did you mean vit, lit\?") as error:
        load_checkpoint("gone.npz", family="vitt")
    assert error.value.fix.startswith("Use auto or ") and "vit" in error.value.fix
    with pytest.raises(
        UsageError, match=r"^config\.outputs='feature': 'feature' is not one of .* Did you mean features\?"
    ) as error:
        load_checkpoint("gone.npz", outputs="feature")
    assert error.value.fix == "Use auto, or known names separated by commas."


@pytest.mark.parametrize("family", ["".join(["au", "to"]), "vit"])  # not the one that the module holds
def test_families(edited, family):
    assert load_checkpoint(edited()[0], family=family).architecture.family == "vit"


SIZES = {
    "width": lambda name: name.endswith(("/scale", "embedding/kernel")),
    "depth": lambda name: name.startswith("Transformer/encoderblock"),
    "mlp_dim": lambda name: "Dense_0" in name,
    "num_heads": lambda name: "MultiHeadDotProductAttention" in name,
}


@pytest.mark.parametrize("size", ["mlp_dim", "num_heads", "width"])
def test_a_size_that_nothing_tells(edited, size):
    def change(leaves):
        for name in [name for name in leaves if SIZES[size](name)]:
            del leaves[name]

    path, _ = edited(change)
    with pytest.raises(
        CheckpointError, match=rf"{path}: nothing tells the model's {size}, .* is missing or empty"
    ) as error:
        load_checkpoint(path)
    assert "whole" in error.value.fix


def test_the_leaf_that_would_tell_it_is_named(edited):
    path, _ = edited(lambda leaves: [leaves.pop(name) for name in list(leaves) if "Dense_0" in name])
    with pytest.raises(
        CheckpointError, match=r"model's mlp_dim, Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel is missing"
    ):
        load_checkpoint(path)


@pytest.mark.parametrize("prefix", ["", "params/"])
def test_a_missing_leaf_is_named_as_the_file_would(edited, prefix):
    path, _ = edited(lambda leaves: leaves.pop(f"{prefix}{B}LayerNorm_2/scale"), prefix=prefix)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert str(error.value) == f"{path}: {prefix}{B}LayerNorm_2/scale: missing, variant mu/16 needs (32,)."


def test_a_table_of_another_width(edited):
    path, _ = edited(lambda leaves: leaves.update({TABLE: leaves[TABLE][..., :7]}))
    with pytest.raises(CheckpointError, match=r"checkpoint \(1, 5, 7\), variant mu/16 needs \(1, 5, 32\)"):
        load_checkpoint(path)


@pytest.mark.parametrize(("variant", "hint"), [("S/16", "Did you mean mu/16?"), ("mu/32", "Did you mean mu/16?")])
def test_another_variant_than_the_files(edited, variant, hint):
    path, _ = edited()
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, variant=variant)
    assert hint in str(error.value) and error.value.fix == "Set variant to the checkpoint's, or to auto."
    assert load_checkpoint(path, variant="mu/16").architecture.variant == "mu/16"


def test_a_value_that_is_not_finite(edited):
    path, _ = edited(lambda leaves: leaves["head/bias"].__setitem__(3, np.nan))
    with pytest.raises(CheckpointError, match=r"head/bias\[3\]: nan, a parameter must be finite"):
        load_checkpoint(path)


def test_a_part_of_a_file(edited):
    path, leaves = edited(layout="big_vision", pool="map", num_classes=0)
    inside = {f"img/{name}": leaf for name, leaf in leaves.items()}
    np.savez(path, **inside, **{"txt/x": np.full(3, np.nan), "t": np.ones(1), "b": np.ones(1)})
    loaded = load_checkpoint(f"{path}:img", outputs="features")  # what lies beside it is not looked at
    assert (loaded.path, loaded.preprocess, loaded.architecture.pool) == (path, "siglip", "map")
    assert np.array_equal(loaded.params["MAPHead_0/probe"], leaves["MAPHead_0/probe"])
