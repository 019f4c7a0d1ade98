"""The data that ships: the digits checkpoint's record holds for the files beside it."""

import json
import pathlib
import zipfile

import numpy as np
import pytest

from vit_convert.core.bundle import hash_file
from vit_convert.core.compare import top1_accuracy
from vit_convert.images.decode import decode_split
from vit_convert.images.preprocess import Preprocess, preprocess_for
from vit_convert.images.sources import open_images

FOLDER = pathlib.Path(__file__).parents[2] / "checkpoints"


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((FOLDER / "vit_digits.json").read_text())


def test_record_is_of_these_files(record):
    assert {name: hash_file(FOLDER / name) for name in record["sha256"]} == record["sha256"]
    assert Preprocess.from_dict(record["preprocess"]) == preprocess_for("vit_jax", (32, 32))


def test_splits_are_disjoint_and_cover_every_class():
    held_out, calibration = (
        zipfile.ZipFile(FOLDER / "digits" / f"{name}.zip").namelist() for name in ("heldout", "calibration")
    )
    rows = [{name.split("/")[1] for name in names} for names in (held_out, calibration)]
    assert (len(rows[0]), len(rows[1])) == (450, 256)
    assert not rows[0] & rows[1]
    # The data set has 174 to 183 of each digit; a quarter of that, and 256 of the 1347 that remain, kept in proportion.
    assert np.bincount([int(name[0]) for name in held_out]).tolist() == pytest.approx([45] * 10, abs=2)
    assert np.bincount([int(name[0]) for name in calibration]).tolist() == pytest.approx([25.6] * 10, abs=2)


def test_images_are_scikit_learns(tmp_path):
    data = pytest.importorskip("sklearn.datasets").load_digits()
    source = open_images(FOLDER / "digits" / "heldout.zip")
    for i in range(0, len(source), 29):
        row = int(pathlib.Path(source.names[i]).stem)
        assert source.labels is not None
        assert source.labels[i] == data.target[row]
        # Means over the 4x4 pixels that came of one: bicubic enlarging mixes in the neighbours, so they correlate but
        # are not equal.
        small = source.read(i)[..., 0].reshape(8, 4, 8, 4).mean(axis=(1, 3))
        assert np.corrcoef(small.ravel(), data.images[row].ravel())[0, 1] > 0.97


def test_accuracy_is_the_recorded_one(record, tmp_path):
    pytest.importorskip("jax")
    from vit_convert.families.load import load_checkpoint
    from vit_convert.families.vit.model import vit_model

    source, preprocess = open_images(FOLDER / "digits" / "heldout.zip"), preprocess_for("vit_jax", (32, 32))
    split = decode_split(source, tmp_path / "i.npy", tmp_path / "l.npy", 32, 32, preprocess)
    saved = load_checkpoint(FOLDER / "vit_digits.npz")
    logits = vit_model(saved.architecture, saved.params).run(preprocess.normalize(split.images))["logits"]
    assert split.labels is not None
    accuracy = top1_accuracy(logits, split.labels)
    assert accuracy >= 97.5
    # Another CPU's rounding may turn one image whose two best classes are level: 0.22 points of 450.
    assert accuracy == pytest.approx(record["top1_percent"]["held_out"], abs=0.23)


def test_checkpoint_is_small_and_in_the_old_layout(record):
    assert (FOLDER / "vit_digits.npz").stat().st_size <= 4 * 2**20
    assert sum((FOLDER / "digits" / f"{name}.zip").stat().st_size for name in ("heldout", "calibration")) <= 2**20
    with np.load(FOLDER / "vit_digits.npz") as leaves:
        block = "Transformer/encoderblock_5"
        assert leaves["Transformer/posembed_input/pos_embedding"].shape == (1, 17, 96)
        assert leaves[f"{block}/MultiHeadDotProductAttention_1/query/kernel"].shape == (96, 3, 32)
        assert leaves[f"{block}/LayerNorm_2/scale"].shape == (96,)
        assert leaves[f"{block}/MlpBlock_3/Dense_0/kernel"].shape == (96, 384)
        assert len(leaves.files) == 16 * 6 + 8
        assert {leaves[name].dtype for name in leaves.files} == {np.dtype(np.float32)}
        assert sum(leaves[name].size for name in leaves.files) == record["num_params"]
    assert all(
        info.compress_type == zipfile.ZIP_STORED for info in zipfile.ZipFile(FOLDER / "vit_digits.npz").infolist()
    )


def test_the_description_states_the_record(record):
    assert f"**Accuracy: {record['top1_percent']['held_out']:.2f} % top-1**" in (FOLDER / "DIGITS.md").read_text()
