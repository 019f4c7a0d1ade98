"""Checkpoints in which a kind of leaf is missing or misshapen everywhere: refused by its name, whatever else would be
read from it."""

import numpy as np
import pytest

from vit_convert.core.errors import CheckpointError, ConvertError, UsageError
from vit_convert.families.load import load_checkpoint

LAYOUTS = {
    "vit_jax": None,
    "vit_jax_linen": None,
    "big_vision": "map",
    "big_vision_scan": "gap",
    "big_vision_old": "tok",
}


@pytest.fixture
def leaves(checkpoint):
    return lambda layout, **options: dict(
        np.load(
            checkpoint(
                "mu/16", layout=layout, pool=LAYOUTS[layout], num_classes=10, depth=2, image_size=(64, 64), **options
            )
        )
    )


def save(path, leaves):
    np.savez(path, **leaves)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "missing",
    [
        ("query/bias", "key/bias", "value/bias"),
        ("query/bias",),
        ("out/bias",),
        ("Dense_0/bias",),
        ("Dense_1/bias",),
        ("/bias",),
        ("/scale",),
    ],
)
@pytest.mark.parametrize("variant", ["auto", "mu/16"])
def test_what_a_model_without_biases_lacks_is_named(leaves, tmp_path, layout, missing, variant):
    """qkv_bias=False of timm, use_bias=False of Flax: no size may be read from the missing leaf alone."""
    path = save(tmp_path / "a.npz", {name: leaf for name, leaf in leaves(layout).items() if not name.endswith(missing)})
    with pytest.raises(CheckpointError, match=rf"{missing[0]}: missing, variant|nothing tells") as error:
        load_checkpoint(path, variant=variant)
    assert any(kind in str(error.value) for kind in missing)


MISSHAPEN = {
    "scalar": lambda leaf: np.float32(1),
    "flat": np.ravel,
    "transposed": np.transpose,
    "one axis more": lambda leaf: leaf[None],
    "empty": lambda leaf: leaf[:0],
    "empty at the end": lambda leaf: leaf[..., :0],
    "complex": lambda leaf: leaf + 1j,
    "not there": None,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", MISSHAPEN)
def test_no_shape_ends_in_a_traceback(leaves, tmp_path, layout, how):
    whole, change = leaves(layout), MISSHAPEN[how]
    kinds = sorted({name.split("/", 2)[-1] if "block" in name else name for name in whole})
    for kind in kinds:
        changed = {name: change(leaf) if change and name.endswith(kind) else leaf for name, leaf in whole.items()}
        if change is None:
            changed = {name: leaf for name, leaf in whole.items() if not name.endswith(kind)}
        if all(
            np.shape(changed.get(name)) == leaf.shape and changed[name].dtype == leaf.dtype
            for name, leaf in whole.items()
        ):
            continue  # such as a flat vector
        path = save(tmp_path / "a.npz", changed)
        for options in ({}, {"variant": "mu/16"}, {"outputs": "features"}):
            try:
                load_checkpoint(path, **options)
            except ConvertError as e:
                assert e.exit_code == 3 or "image_size" in e.fix, (kind, e)
            else:
                # without its head or its table's module a file is another one, and whole
                assert kind.startswith("head/") or how == "not there", (kind, how)


@pytest.mark.parametrize("number", ["7", "99999999999999", "9" * 5000, "x"])
def test_numbers_of_blocks_that_nobody_has(leaves, tmp_path, number):
    """The first ones take gigabytes where all that are missing are listed."""
    name = f"Transformer/encoderblock_{number}/LayerNorm_0/scale"
    path = save(tmp_path / "a.npz", leaves("vit_jax_linen"))
    import io
    import zipfile

    content = io.BytesIO()
    np.save(content, np.ones(32, np.float32))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", content.getvalue())
    with pytest.raises(CheckpointError, match=r"encoder block 2(, 3)? missing|belongs to no part"):
        load_checkpoint(path)


# --- position tables --------------------------------------------------------------------------------------------------


def table(leaves: dict[str, np.ndarray]) -> str:
    return next(name for name in leaves if name.endswith("pos_embedding"))


def test_table_that_lost_the_class_tokens_row(leaves, tmp_path):
    whole = leaves("vit_jax")
    path = save(tmp_path / "a.npz", whole | {table(whole): whole[table(whole)][:, 1:]})
    with pytest.raises(CheckpointError, match=r"\(1, 16, 32\).*class token's row") as error:
        load_checkpoint(path)
    assert "posemb_grid" not in error.value.fix and "row of the class token" in error.value.fix


@pytest.mark.parametrize("layout", LAYOUTS)
def test_table_with_other_axes(leaves, tmp_path, layout):
    whole = leaves(layout)
    for change in (lambda t: t[0], lambda t: t[None], np.ravel):
        path = save(tmp_path / "a.npz", whole | {table(whole): change(whole[table(whole)])})
        with pytest.raises(CheckpointError, match=r"needed is \(1, rows, width\)") as error:
            load_checkpoint(path)
        assert "posemb_grid" not in error.value.fix


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trained", [(4, 4), (2, 8)])
def test_rows_that_fit_two_grids(leaves, tmp_path, layout, trained):
    """2x8 and 4x4 patches have 16 rows each: read as the other, every position would be wrong, and no shape shows
    it."""
    whole = leaves(layout)
    path = save(tmp_path / "a.npz", whole)
    with pytest.raises(UsageError, match=r"16 rows|17 rows") as error:
        load_checkpoint(path, image_size=(32, 128))
    assert "posemb_grid" in error.value.fix and "(4, 4)" in error.value.fix and "(2, 8)" in error.value.fix
    loaded = load_checkpoint(path, image_size=(32, 128), posemb_grid=trained)
    stored = whole[table(whole)][0, -16:]
    if layout in ("vit_jax", "vit_jax_linen", "big_vision_old"):
        assert loaded.source_image_size == (trained[0] * 16, trained[1] * 16)
    got = loaded.params["pos_embedding"][0]
    assert np.array_equal(got, stored) == (trained == (2, 8))
    assert np.array_equal(load_checkpoint(path).params["pos_embedding"][0], stored)  # and without a wish it is square
