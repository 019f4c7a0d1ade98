import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from vit_convert.core.errors import CheckpointError, UsageError
from vit_convert.families.load import load_checkpoint

FC1 = "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"


@pytest.fixture
def edited(checkpoint, tmp_path):
    """Writes a mu/16 checkpoint after a change to its dictionary of leaves."""

    def write(change, variant="mu/16", **options):
        leaves = dict(np.load(checkpoint(variant, **options)))
        change(leaves)
        path = tmp_path / "edited.npz"
        np.savez(path, **leaves)
        return path

    return write


def refused(path, match, **options):
    with pytest.raises(CheckpointError, match=match) as error:
        load_checkpoint(path, **options)
    assert pathlib.Path(str(path)).name in str(error.value)
    assert error.value.exit_code == 3
    return error.value


def test_missing_file(tmp_path):
    assert "gs://" in refused(tmp_path / "none.npz", "cannot be read .No such file").fix


def test_folder(tmp_path):
    refused(tmp_path, "a folder")


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_truncated_zip(checkpoint, tmp_path, kept):
    data = checkpoint("mu/16").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: int(len(data) * kept)])
    refused(tmp_path / "cut.npz", "truncated or damaged zip")


def test_not_a_zip(tmp_path):
    (tmp_path / "notes.npz").write_text("the weights of last week")
    refused(tmp_path / "notes.npz", "not a zip")


def test_pickled_objects_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "exploded",)

    np.savez(tmp_path / "pickled.npz", params=np.array([Bomb()], dtype=object))
    refused(tmp_path / "pickled.npz", "member params: a pickled object array")
    assert not (tmp_path / "exploded").exists()


def test_pytorch_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    refused(tmp_path / "model.npz", "a PyTorch file")


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a//b", "a\\b"])
def test_names_that_climb(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "climb.npz", "w") as archive:
        archive.writestr(f"{name}.npy", b"")
    refused(tmp_path / "climb.npz", "not a parameter's name")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(checkpoint):
    path = checkpoint("mu/16")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("cls.npy", archive.read("cls.npy"))
    refused(path, "two of that name")


def test_header_that_promises_more_than_is_there(tmp_path):
    # One terabyte promised by 4 bytes: refused from the headers, before anything is allocated.
    with zipfile.ZipFile(tmp_path / "big.npz", "w") as archive, archive.open("cls.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (1 << 38,)})
        member.write(b"\0" * 4)
    refused(tmp_path / "big.npz", f"member cls: 4 bytes, shape .{1 << 38},. of float32 needs {1 << 40}")


def test_member_that_is_no_array(checkpoint):
    path = checkpoint("mu/16")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("README", "hello, this is no array")
    refused(path, "member README: unreadable")


@pytest.mark.parametrize("compressed", [False, True])
def test_flipped_byte(checkpoint, tmp_path, compressed):
    leaves = dict(np.load(checkpoint("mu/16")))
    path = tmp_path / "flipped.npz"
    (np.savez_compressed if compressed else np.savez)(path, **leaves)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda info: info.compress_size)
    data[member.header_offset + member.compress_size // 2] ^= 1
    path.write_bytes(data)
    refused(path, f"{member.filename.removesuffix('.npy')}: damaged")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite(edited, value):
    def change(leaves):
        leaves[FC1][3, 7] = value
        leaves[FC1][5, 0] = np.nan

    refused(edited(change), rf"{FC1}\[3, 7\]: {value}")


def test_not_finite_in_safetensors_and_beyond_float32(checkpoint, tmp_path):
    leaves = {name: value.astype(np.float64) for name, value in np.load(checkpoint("mu/16")).items()}
    leaves["head/bias"][4] = 1e300
    safetensors.numpy.save_file(leaves, tmp_path / "large.safetensors")
    refused(tmp_path / "large.safetensors", r"head/bias\[4\]: inf")


def test_damaged_safetensors(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes((40).to_bytes(8, "little") + b'{"a":{"dtype":"F32"')
    refused(tmp_path / "bad.safetensors", "not a valid .safetensors")


def test_integers(edited):
    refused(edited(lambda leaves: leaves.update({"head/bias": np.arange(10)})), "head/bias: dtype int64")


def test_missing_leaf(edited):
    path = edited(lambda leaves: leaves.pop(FC1))
    refused(path, rf"{FC1}: missing, variant mu/16 needs \(32, 128\)")


@pytest.mark.parametrize("layout", ["vit_jax", "big_vision"])
def test_missing_norm_is_not_mistaken_for_its_neighbour(edited, layout):
    def change(leaves):
        for name in [name for name in leaves if "encoderblock_3/LayerNorm_0" in name]:
            del leaves[name]

    path = edited(change, "Ti/16", layout=layout)
    refused(
        path, r"Transformer/encoderblock_3/LayerNorm_0/scale: missing, variant Ti/16 needs \(192,\)\. \(and 1 more\)"
    )


def test_missing_position_table(edited):
    name = "Transformer/posembed_input/pos_embedding"
    refused(edited(lambda leaves: leaves.pop(name)), f"{name}: missing")


def test_extra_leaf(edited):
    refused(
        edited(lambda leaves: leaves.update({"ema/kernel": np.zeros(3, np.float32)})),
        "ema/kernel: belongs to no part of variant mu/16",
    )


@pytest.mark.parametrize(
    "name",
    [FC1, "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel", "embedding/kernel", "head/kernel"],
)
def test_transposed_leaf(edited, name):
    path = edited(lambda leaves: leaves.update({name: np.ascontiguousarray(leaves[name].T)}))
    refused(path, rf"{name}: checkpoint \(.*\), variant mu/16 needs \(.*\)\. It looks transposed\.")


def test_wrong_variant(checkpoint):
    path = checkpoint("S/32", image_size=(224, 224))
    error = refused(
        path,
        r"embedding/kernel: checkpoint \(32, 32, 3, 384\), variant S/16 needs \(16, 16, 3, 384\)\.",
        variant="S/16",
    )
    assert "Did you mean S/32?" in str(error)
    error = refused(path, r"variant Ti/32 needs \(32, 32, 3, 192\)\. Did you mean S/32\?", variant="ViT-Ti_32")
    assert "auto" in error.fix
    assert load_checkpoint(path, variant="ViT-S_32").architecture.variant == "S/32"


def test_wrong_pooling(checkpoint):
    refused(checkpoint("S/32"), "cls: belongs to no part of variant S/32", variant="S/32-gap-norep")
    refused(
        checkpoint("S/32", pool="gap", pre_logits=True),
        "pre_logits/kernel: belongs to no part",
        variant="S/32-gap-norep",
    )


def test_stacked_leaves_that_disagree(edited):
    name = "Transformer/encoderblock/LayerNorm_0/scale"
    path = edited(lambda leaves: leaves.update({name: leaves[name][:-1]}), "Ti/16", layout="big_vision_scan")
    refused(path, rf"{name}: checkpoint \(11, 192\), the other leaves are stacks of 12")


def test_zero_head_is_a_warning(edited):
    path = edited(lambda leaves: leaves.update({"head/kernel": np.zeros_like(leaves["head/kernel"])}))
    assert "head/kernel is all zeros" in load_checkpoint(path).warnings[0]
    assert "outputs='features'" in load_checkpoint(path).warnings[0]
    assert load_checkpoint(path, outputs="features").warnings == ()


def test_no_head(checkpoint):
    assert "features" in refused(checkpoint("mu/16", num_classes=0), "no head/kernel").fix


def test_image_size_not_a_multiple(checkpoint):
    with pytest.raises(UsageError, match="65x64: not a multiple of the patch size 16"):
        load_checkpoint(checkpoint("mu/16"), image_size=(65, 64))


@pytest.mark.parametrize("layout", ["vit_jax", "big_vision"])
def test_grid_that_is_not_square(checkpoint, layout):
    path = checkpoint("mu/16", layout=layout, image_size=(32, 112))  # 2x7 patches, and 14 + 1 is no square either
    assert "posemb_grid" in refused(path, r"pos_embedding: checkpoint \(1, 1[45], 32\), which is not a square grid").fix
    refused(path, "not posemb_grid 3x5", posemb_grid=(3, 5))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["img/embedding/kernel", "txt/head/kernel", "t"], "an image tower and a text tower"),
        (["params/img/embedding/kernel", "params/llm/x"], "encoder block 0 missing"),
        (["img/embedding/kernel", "t"], "encoder block 0 missing"),
        (["visual/transformer/resblocks.0/ln_1/bias", "text/x"], "an image tower and a text tower"),
        (["vision_model/embeddings/x"], "block 0 missing"),
        (["vit/embeddings/cls_token"], "Hugging Face"),
        (["vit.embeddings.cls_token"], "Hugging Face"),
        (["cls_token", "blocks.0.attn.qkv.weight"], "PyTorch"),
        (["visual.conv1.weight"], "PyTorch"),
        (["kernel"], "no known layout; it holds kernel"),
    ],
)
def test_other_families_are_named(tmp_path, names, found):
    np.savez(tmp_path / "other.npz", **{name: np.zeros(1, np.float32) for name in names})
    refused(tmp_path / "other.npz", found)


def test_naflex(checkpoint, tmp_path):
    leaves = dict(np.load(checkpoint("mu/16", layout="big_vision", pool="map")))
    leaves["embedding/kernel"] = leaves["embedding/kernel"].reshape(-1, 32)
    leaves["pos_embedding"] = leaves["pos_embedding"].reshape(4, 4, 32)
    np.savez(tmp_path / "naflex.npz", **leaves)
    refused(tmp_path / "naflex.npz", "NaFlex")


def test_empty_subtree(checkpoint):
    with pytest.raises(CheckpointError, match="no parameters under 'img/'"):
        load_checkpoint(f"{checkpoint('mu/16')}:img")


def test_arguments(checkpoint):
    path = checkpoint("mu/16")
    with pytest.raises(UsageError, match=r"family 'vitt': unknown. Did you mean vit"):
        load_checkpoint(path, family="vitt")
    with pytest.raises(UsageError, match=r"outputs='feature': 'feature' is not one of .*\. Did you mean features\?"):
        load_checkpoint(path, outputs="feature")
