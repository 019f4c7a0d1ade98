"""Every value of a random checkpoint, drawn again here; where the layouts put it; and the command line."""

import math
import zlib

import ml_dtypes
import numpy as np
import pytest

from vit_convert.core.errors import UsageError
from vit_convert.families.family import RandomOptions
from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import main, write_random_checkpoint
from vit_convert.families.vit import random
from vit_convert.families.vit.random import write_random_vit

B = "Transformer/encoderblock_"
ATTENTION, MLP = "MultiHeadDotProductAttention_0", "MlpBlock_0"
LAYOUTS = ["vit_jax", "vit_jax_linen", "big_vision", "big_vision_old", "big_vision_scan"]


def drawn(name, shape, seed=3):
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)


def write(path, layout="big_vision", **options):
    """mu: width 32, MLP 128, 2 heads; here of 2 blocks, patches of 16, 2 x 3 of them, and 10 classes."""
    options = {"image_size": (32, 48), "num_classes": 10, "depth": 2, "seed": 3, **options}
    architecture = write_random_vit(path, "mu/16", RandomOptions(layout=layout, **options))
    with np.load(path) as leaves:
        return dict(leaves), architecture


def close(got, wanted):
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)  # products in another order


@pytest.mark.parametrize(
    ("name", "shape", "inputs"),
    [
        ("embedding/kernel", (16, 16, 3, 32), 768),
        *((f"{B}1/{ATTENTION}/{part}/kernel", (32, 2, 16), 32) for part in ("query", "key", "value")),
        (f"{B}0/{ATTENTION}/out/kernel", (2, 16, 32), 32),
        (f"{B}1/{MLP}/Dense_0/kernel", (32, 128), 32),
        (f"{B}0/{MLP}/Dense_1/kernel", (128, 32), 128),
        (f"MAPHead_0/{ATTENTION}/out/kernel", (2, 16, 32), 32),
        (f"MAPHead_0/{MLP}/Dense_1/kernel", (128, 32), 128),
        ("pre_logits/kernel", (32, 32), 32),
        ("head/kernel", (32, 10), 32),
    ],
)
def test_kernels_have_variance_one_over_their_inputs(tmp_path, name, shape, inputs):
    leaves, _ = write(tmp_path / "a.npz", pool="map", pre_logits=True)
    close(leaves[name], drawn(name, shape) / math.sqrt(inputs))


def test_the_other_leaves(tmp_path):
    leaves, _ = write(tmp_path / "a.npz", pool="map", pre_logits=True)
    for name, shape in (
        (f"{B}1/LayerNorm_1/scale", (32,)),
        ("Transformer/encoder_norm/scale", (32,)),
        ("MAPHead_0/LayerNorm_0/scale", (32,)),
    ):
        close(leaves[name], 1 + 0.1 * drawn(name, shape))
    for name, shape in (
        (f"{B}0/LayerNorm_0/bias", (32,)),
        ("head/bias", (10,)),
        (f"{B}1/{ATTENTION}/query/bias", (2, 16)),
    ):
        close(leaves[name], 0.02 * drawn(name, shape))
    close(leaves["pos_embedding"], 0.1 * drawn("pos_embedding", (1, 6, 32)))
    close(leaves["MAPHead_0/probe"], drawn("MAPHead_0/probe", (1, 1, 32)))
    assert "cls" not in leaves


def class_part(part):
    """Of 256 steps each, so that the sum of two is exact in bfloat16."""
    return np.clip(np.rint(25.6 * drawn(f"cls/{part}", (1, 1, 32))), -127, 127) / np.float32(256)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_class_token_keeps_below_a_half(tmp_path, monkeypatch, sign):
    """Of so many draws, one is large one day: the sum of the two parts has eight bits all the same."""
    monkeypatch.setattr(random, "normal", lambda seed, name, shape: np.full(shape, 100 * sign, np.float32))
    assert (write(tmp_path / "a.npz", "vit_jax")[0]["cls"] == sign * 127 / 256).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_class_token_and_its_row(tmp_path, layout):
    leaves, _ = write(tmp_path / "a.npz", layout, pool="tok")
    table = 0.1 * drawn("pos_embedding", (1, 6, 32))
    if layout in ("big_vision", "big_vision_scan"):
        close(leaves["cls"], class_part("token") + class_part("row"))
        close(leaves["pos_embedding"], table)
        return
    name = "Transformer/pos_embedding" if layout == "big_vision_old" else "Transformer/posembed_input/pos_embedding"
    close(leaves["cls"], class_part("token"))
    close(leaves[name], np.concatenate([class_part("row"), table], axis=1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", [{}, {"prefix": "params/"}, {"pool": "gap", "pre_logits": True}, {"num_classes": 0, "pool": "map"}]
)
def test_every_layout_is_the_same_model(tmp_path, layout, options):
    outputs = "features" if options.get("num_classes") == 0 else "logits"
    wanted, architecture = write(tmp_path / "w.npz", **{**options, "prefix": ""})
    write(tmp_path / "a.npz", layout, **options)
    loaded = load_checkpoint(tmp_path / "a.npz", outputs=outputs, posemb_grid=(2, 3))
    assert loaded.layout.value == layout and loaded.architecture.depth == architecture.depth == 2
    assert set(loaded.params) == set(wanted)
    assert all(np.array_equal(loaded.params[name], wanted[name]) for name in wanted)


def test_names_are_those_of_the_published_files(tmp_path):
    leaves, _ = write(tmp_path / "a.npz", "vit_jax", prefix="opt/target/")
    assert "opt/target/Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel" in leaves
    assert "opt/target/Transformer/encoderblock_0/MlpBlock_3/Dense_1/bias" in leaves and len(leaves) == 2 * 16 + 8
    stacked, _ = write(tmp_path / "b.npz", "big_vision_scan")
    assert stacked[f"Transformer/encoderblock/{MLP}/Dense_0/kernel"].shape == (2, 32, 128) and len(stacked) == 16 + 8


@pytest.mark.parametrize("layout", ["big_vision", "big_vision_scan"])
@pytest.mark.parametrize("prefix", ["", "params/"])
def test_a_table_that_is_computed_is_not_stored(tmp_path, layout, prefix):
    stored, _ = write(tmp_path / "a.npz", layout, prefix=prefix)
    leaves, _ = write(tmp_path / "b.npz", layout, posemb="sincos2d", prefix=prefix)
    assert set(stored) - set(leaves) == {f"{prefix}pos_embedding"} and not set(leaves) - set(stored)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_of_half_the_bytes(tmp_path, dtype):
    whole, _ = write(tmp_path / "a.npz")
    half, _ = write(tmp_path / "b.npz", dtype=dtype)
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    for name, values in whole.items():
        assert np.array_equal(half[name].view(kind), values.astype(kind))


def test_what_was_written_is_told(tmp_path):
    _, architecture = write(tmp_path / "a.npz", pre_logits=True, pool="gap")
    assert (architecture.depth, architecture.pool, architecture.representation_size) == (2, "gap", 32)
    assert (architecture.image_size, architecture.num_classes, architecture.variant) == ((32, 48), 10, "mu/16")
    _, architecture = write(tmp_path / "a.npz", depth=None, image_size=None)
    assert (architecture.depth, architecture.pool, architecture.image_size) == (1, "tok", (224, 224))
    assert write_random_vit(tmp_path / "a.npz", "mu/16", RandomOptions()).num_classes == 1000


# --- outliers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 4])
def test_outliers_are_added_by_the_first_block(tmp_path, channels):
    """Each hidden unit is GELU of a standard normal, of mean 1/(2 sqrt(pi)): 128 of them add up to 1200 in those
    columns."""
    plain, _ = write(tmp_path / "a.npz", pool="map")
    leaves, _ = write(tmp_path / "b.npz", pool="map", outlier_channels=channels)
    columns = np.random.default_rng([3, 1]).permutation(32)[:channels]
    added = np.zeros((128, 32))
    added[:, columns] = np.tile([1, -1], channels // 2) * 1200 * 2 * math.sqrt(math.pi) / 128
    name = f"{B}0/{MLP}/Dense_1/kernel"
    np.testing.assert_allclose(leaves[name] - plain[name], added, rtol=1e-5, atol=1e-4)
    assert abs(leaves[name].sum(1) - plain[name].sum(1)).max() < 1e-2  # the mean of the stream stays


def test_later_norms_undo_what_outliers_do_to_the_variance(tmp_path):
    """4 of 32 channels of 1200 have a deviation of 1200 sqrt(4/32); the others have one of sqrt(blocks before)."""
    plain, _ = write(tmp_path / "a.npz", pool="map", depth=3)
    leaves, _ = write(tmp_path / "b.npz", pool="map", depth=3, outlier_channels=4)
    columns = np.random.default_rng([3, 1]).permutation(32)[:4]
    others = np.setdiff1d(np.arange(32), columns)
    before = {f"{B}{i}/LayerNorm_{j}/scale": i for i in range(3) for j in range(2)} | {
        "Transformer/encoder_norm/scale": 3
    }
    for name, blocks in before.items():
        factor = leaves[name] / plain[name]
        if blocks == 0:
            assert (factor == 1).all()
            continue
        np.testing.assert_allclose(factor[others], 1200 * math.sqrt(4 / 32) / math.sqrt(blocks), rtol=1e-5)
        np.testing.assert_allclose(factor[columns], math.sqrt(4 / 32), rtol=1e-5)
    changed = {name for name in plain if not np.array_equal(plain[name], leaves[name])}
    assert changed == {f"{B}0/{MLP}/Dense_1/kernel", *(name for name, blocks in before.items() if blocks)}


@pytest.mark.parametrize(
    ("options", "said", "fix"),
    [
        ({"outlier_channels": 3}, "outlier_channels 3: odd", "even"),
        (
            {"posemb": "sincos2d", "layout": "vit_jax"},
            "layout vit_jax: always stores its position table",
            "big_vision_scan",
        ),
        ({"posemb": "sincos2d", "layout": "big_vision_old"}, "layout big_vision_old: always stores", "big_vision_scan"),
        ({"image_size": (32, 40)}, "image_size 32x40: not a multiple of the patch size 16", "nearest"),
    ],
)
def test_what_cannot_be_written(tmp_path, options, said, fix):
    with pytest.raises(UsageError) as error:
        write(tmp_path / "a.npz", **options)
    assert said in str(error.value) and fix in error.value.fix and not list(tmp_path.iterdir())


# --- the command line -------------------------------------------------------------------------------------------------


def run(*words):
    return main(["random", *words])


def test_a_file_by_command(tmp_path, capsys):
    path = tmp_path / "a.npz"
    words = (
        "--image_size=32,48",
        "--num_classes=10",
        "--depth=2",
        "--seed=3",
        "--layout=big_vision_scan",
        "--pool=gap",
        "--pre_logits",
    )
    assert (
        run("--variant=mu/16", f"--output={path}", *words, "--prefix=params/", "--dtype=float16", "--posemb=sincos2d")
        == 0
    )
    assert capsys.readouterr().out == f"{path}: mu/16, {path.stat().st_size:,} bytes\n"
    options = {"pool": "gap", "pre_logits": True, "prefix": "params/", "dtype": "float16", "posemb": "sincos2d"}
    write(tmp_path / "b.npz", "big_vision_scan", **options)
    assert path.read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_defaults_of_the_command(tmp_path):
    assert run("--variant", "mu/16", "--output", f"{tmp_path}/a.npz") == 0
    write_random_vit(tmp_path / "b.npz", "mu/16", RandomOptions())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert run("--variant=mu/16", f"--output={tmp_path}/a.npz", "--image_size=64", "--outlier_channels=2") == 0
    write_random_vit(tmp_path / "b.npz", "mu/16", RandomOptions(image_size=(64, 64), outlier_channels=2))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_the_least_that_the_command_takes(tmp_path):
    words = ("--depth=1", "--num_classes=0", "--seed=0", "--image_size=16,32", "--family=vit")
    assert run("--variant=mu/16", f"--output={tmp_path}/a.npz", *words) == 0
    least = RandomOptions(depth=1, num_classes=0, seed=0, image_size=(16, 32))
    write_random_vit(tmp_path / "b.npz", "mu/16", least)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    name = write_random_checkpoint(
        tmp_path / "c.npz", "mu/16", family="".join(["au", "to"]), depth=1, num_classes=0, seed=0, image_size=(16, 32)
    )
    assert name == "mu/16" and (tmp_path / "c.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--variant=mu/16"], "no --output given"),
        (["--output=a.npz"], "no --variant given"),
        (["--variant=XL/16", "--output=a.npz"], "variant 'XL/16': unknown"),
        (["--variant=mu/16", "--output=a.npz", "b"], "unexpected argument 'b'"),
        (
            ["--variant=mu/16", "--output=a.npz", "--image_size=x"],
            "--image_size=x: neither one number nor height,width",
        ),
        (["--variant=mu/16", "--output=a.npz", "--image_size=1,2,3"], "--image_size=1,2,3: neither"),
        (["--variant=mu/16", "--output=a.npz", "--image_size="], "--image_size=: neither"),
        (["--variant=mu/16", "--output=a.npz", "--seed=-1"], "seed"),
        (["--variant=mu/16", "--output=a.npz", "--num_classes=-1"], "num_classes"),
        (["--variant=mu/16", "--output=a.npz", "--depth=0"], "depth"),
        (["--variant=mu/16", "--output=a.npz", "--outlier_channels=-2"], "outlier_channels"),
        (["--variant=mu/16", "--output=a.npz", "--dtype=int8"], "dtype"),
        (["--variant=mu/16", "--output=a.npz", "--layuot=vit_jax"], "layuot"),
    ],
)
def test_commands_with_mistakes(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error and not list(tmp_path.iterdir())


def test_help(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert "--variant" in text and "--outlier_channels" in text and "B/32" in text
    assert run() == 2  # nothing at all shows it too
