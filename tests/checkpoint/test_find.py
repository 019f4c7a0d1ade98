"""Which file an address or a path stands for."""

import dataclasses
import hashlib
import os
import pathlib
import subprocess

import pytest

from vit_convert.checkpoint import published
from vit_convert.checkpoint.fetch import local_name
from vit_convert.checkpoint.find import Found, find_checkpoint
from vit_convert.checkpoint.published import PUBLISHED, Published, published_at, require_published
from vit_convert.core.errors import CheckpointError
from vit_convert.core.progress import Progress, human_bytes
from vit_convert.families.hybrid.architecture import HYBRIDS, Hybrid, feature_size
from vit_convert.families.hybrid.architecture import parameter_count as hybrid_count
from vit_convert.families.mixer.architecture import Mixer
from vit_convert.families.mixer.architecture import parameter_count as mixer_count
from vit_convert.families.mixer.infer import parse_variant as parse_mixer
from vit_convert.families.vit.shapes import parameter_count
from vit_convert.families.vit.variants import architecture_of

MIB = 1 << 20
ADDRESS = "gs://models/fine/ViT.npz"
LISTED = Published(ADDRESS, 384, size="1.5 MiB")


@pytest.fixture(autouse=True)
def _table(monkeypatch):
    monkeypatch.setitem(published.PUBLISHED, "listed", LISTED)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")  # nobody listens: nothing can be fetched
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def write(path, size=int(1.5 * MIB)):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def test_published_name_comes_first(folder):
    write(folder / local_name(ADDRESS))
    write(folder / "ViT.npz")
    assert find_checkpoint(ADDRESS) == Found(folder.relative_to(folder.parent) / "ViT.npz", "", ADDRESS, LISTED)
    (folder / "ViT.npz").unlink()
    assert find_checkpoint(ADDRESS).path.name == local_name(ADDRESS)


def test_folders_are_looked_through_in_order(folder, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second", folder]
    write(folder / "ViT.npz")
    assert find_checkpoint(ADDRESS, folders).path == folder / "ViT.npz"
    write(folders[1] / "models" / "fine" / "ViT.npz")  # as `gsutil cp -r` and mirrors leave it
    assert find_checkpoint(ADDRESS, folders).path == folders[1] / "models" / "fine" / "ViT.npz"


@pytest.mark.parametrize("size", [int(1.4 * MIB), 100])
def test_file_of_that_name_and_another_size_is_passed_over(folder, capsys, size):
    write(folder / "ViT.npz", size)
    with pytest.raises(CheckpointError, match=f"{ADDRESS}: cannot be fetched"):
        find_checkpoint(ADDRESS, progress=Progress())
    assert (
        f"checkpoints/ViT.npz has {human_bytes(size)}, {ADDRESS} 1.5 MiB: it is another file, or incomplete"
        in capsys.readouterr().err
    )
    write(folder / local_name(ADDRESS))
    assert find_checkpoint(ADDRESS).path.name == local_name(ADDRESS)


def test_address_that_no_table_knows_is_not_guessed_by_its_base_name(folder):
    address = "gs://models/other/ViT.npz"
    write(folder / "ViT.npz")
    with pytest.raises(CheckpointError, match="cannot be fetched") as error:
        find_checkpoint(address)
    assert f"Put {local_name(address)} into checkpoints/" in error.value.fix
    write(folder / "models" / "other" / "ViT.npz")
    assert find_checkpoint(address).path == folder.relative_to(folder.parent) / "models" / "other" / "ViT.npz"


@pytest.mark.parametrize("address", ["https://../../ViT.npz", "https:///etc/hostname"])
def test_addresses_do_not_climb(folder, address):
    write(folder.parent.parent / "ViT.npz")
    with pytest.raises((CheckpointError, ValueError)):
        find_checkpoint(address)


def test_what_is_missing_is_fetched_to_the_first_folder(bucket, tmp_path):
    bucket.files["models/fine/ViT.npz"] = b"y" * int(1.5 * MIB)
    folders = [tmp_path / "mine", tmp_path / "checkpoints"]
    found = find_checkpoint(f"{ADDRESS}:img", folders)
    assert found == Found(folders[0] / local_name(ADDRESS), "img", ADDRESS, LISTED)
    assert found.path.stat().st_size == 1.5 * MIB
    assert find_checkpoint(ADDRESS, folders).path == found.path
    assert len(bucket.requests) == 1


def test_published_size_is_required_of_the_server(bucket, tmp_path):
    bucket.files["models/fine/ViT.npz"] = b"y" * MIB
    with pytest.raises(CheckpointError, match=f"{MIB} bytes at .*not the size of the published file") as error:
        find_checkpoint(ADDRESS, [tmp_path])
    assert "#sha256=" in error.value.fix
    sha256 = hashlib.sha256(bucket.files["models/fine/ViT.npz"]).hexdigest()
    found = find_checkpoint(f"{ADDRESS}#sha256={sha256}", [tmp_path])  # as that error advises
    found.require_sha256(sha256)
    with pytest.raises(CheckpointError, match="the address says 00"):
        find_checkpoint(f"{ADDRESS}#sha256=00", [tmp_path]).require_sha256(sha256)


def test_fetched_file_of_another_size_is_not_taken(bucket, tmp_path):
    """As one that was fetched by its sum before the published file was replaced."""
    bucket.files["models/fine/ViT.npz"] = b"y" * int(1.5 * MIB)
    stale = write(tmp_path / local_name(ADDRESS), MIB)
    with pytest.raises(CheckpointError, match=f"{MIB} bytes, which is not the size of {ADDRESS}"):
        find_checkpoint(ADDRESS, [tmp_path])
    stale.unlink()
    assert find_checkpoint(ADDRESS, [tmp_path]).path == stale


def test_paths(folder, tmp_path):
    assert find_checkpoint("a.npz:img") == Found(tmp_path.relative_to(tmp_path) / "a.npz", "img")
    write(folder / "a.npz")
    assert find_checkpoint("a.npz").path == folder.relative_to(tmp_path) / "a.npz"
    write(tmp_path / "a.npz")
    assert find_checkpoint("a.npz").path == (tmp_path / "a.npz").relative_to(tmp_path)
    assert find_checkpoint(str(tmp_path / "no.npz")).path == tmp_path / "no.npz"


def test_sha256_is_kept_when_first_seen(folder):
    path = write(folder / "ViT.npz")
    found = find_checkpoint(ADDRESS)
    found.require_sha256(hashlib.sha256(path.read_bytes()).hexdigest())
    assert subprocess.run(["sha256sum", "--check", "--quiet", "ViT.npz.sha256"], cwd=folder).returncode == 0
    found.require_sha256(hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(CheckpointError, match=r"ViT\.npz: sha256 00, .*ViT\.npz\.sha256 says") as error:
        found.require_sha256("00")
    assert "Remove it and ViT.npz.sha256" in error.value.fix


def test_sha256_of_a_file_without_an_address_is_not_kept(folder):
    Found(write(folder / "mine.npz")).require_sha256("00")
    assert [file.name for file in folder.iterdir()] == ["mine.npz"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="Linux's folder that root too cannot write to")
def test_folder_that_is_read_only():
    Found(pathlib.Path("/proc/self/status"), address=ADDRESS).require_sha256("00")


@pytest.mark.parametrize(
    ("size", "num_bytes", "fits"),
    [
        ("336.89 MiB", 353_253_686, True),  # what this project's writer of random weights makes of B/32 at 384 pixels
        ("336.89 MiB", int(336.61 * MIB), False),  # SAM's ViT-B_32.npz, at 224 pixels
        ("336.89 MiB", 400 * MIB, False),
        ("1.14 GiB", int(1.1425 * 1024 * MIB), True),
        ("1.14 GiB", int(1.13 * 1024 * MIB), False),
        ("", 1, True),
    ],
)
def test_sizes(size, num_bytes, fits):
    assert Published("gs://a/b.npz", 384, size=size).may_have(num_bytes) == fits


@pytest.mark.parametrize("variant", [variant for variant, file in PUBLISHED.items() if file.size])
def test_listed_sizes_are_those_of_the_variants(variant):
    """The head and the resolution of the table, by the bytes of its parameters; what is listed has the zip's headers
    besides."""
    file = PUBLISHED[variant]
    assert file.may_have(4 * _count(variant, file.image_size, file.num_classes, pre_logits=file.zero_head) + 64_000)
    other = _count(variant, 224, 21843 if "Mixer" in variant else 1000)
    assert file.size.endswith("GiB") or not file.may_have(4 * other + 64_000)


def _count(variant, side, num_classes, *, pre_logits=False):
    """The pretrained ones have `pre_logits`."""
    if variant.startswith("Mixer-"):
        sizes, patch = parse_mixer(variant)
        return mixer_count(
            Mixer(
                variant, **dataclasses.asdict(sizes), patch_size=patch, image_size=(side, side), num_classes=num_classes
            )
        )
    row = HYBRIDS.get(variant)
    of_trunk = f"{row.letters}/{row.patch_size}" if row else variant
    size = feature_size((side, side), row.stages) if row else (side, side)
    trunk = architecture_of(of_trunk, size, num_classes)
    trunk = dataclasses.replace(trunk, representation_size=trunk.width if pre_logits else 0)
    if not row:
        return parameter_count(trunk, trunk.num_tokens)
    return hybrid_count(Hybrid(variant, row.stages, (side, side), trunk), trunk.num_tokens)


def test_every_address_is_published_once():
    addresses = [file.address for file in PUBLISHED.values()]
    assert len(set(addresses)) == len(addresses)
    assert published_at(PUBLISHED["B/32"].address) is PUBLISHED["B/32"]
    assert PUBLISHED["B/32"].name == "ViT-B_32.npz"
    assert published_at("gs://nobody/x.npz") is None


def test_another_model_of_that_name():
    require_published(LISTED, "ViT.npz", (384, 384), 1000)
    require_published(LISTED, "ViT.npz", (384, 384), 0)  # features
    for size, classes, text in (
        ((224, 224), 1000, "224x224 pixels, gs://models/fine/ViT.npz has 384x384"),
        ((384, 384), 21843, "21843 classes, .* 1000"),
    ):
        with pytest.raises(CheckpointError, match=f"ViT.npz: {text}") as error:
            require_published(LISTED, "ViT.npz", size, classes)
        assert "--config.checkpoint=ViT.npz" in error.value.fix
    without_table = Published(ADDRESS, 224, stores_positions=False)
    require_published(without_table, "ViT.npz", (448, 448), 1000)  # the size is what was asked for
