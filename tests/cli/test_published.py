"""A config that names a public file runs as it stands: with the file in a folder, from a bucket, or with an error that
names it."""

import pathlib
import re
import shutil

import pytest

from vit_convert.__main__ import main
from vit_convert.checkpoint import published
from vit_convert.checkpoint.fetch import local_name
from vit_convert.checkpoint.published import PUBLISHED, Published

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
_NAMED = {
    path.name: re.search(r'published_config\("(.+)"\)', path.read_text(encoding="utf-8"))
    for path in CONFIGS.glob("*.py")
}
OF_A_PUBLIC_FILE = sorted(name for name, match in _NAMED.items() if match)
OF_A_BUCKET = [name for name in OF_A_PUBLIC_FILE if PUBLISHED[_NAMED[name][1]].address.startswith("gs://")]
ADDRESS = "gs://models/mu/mu.npz"


@pytest.fixture
def tiny(convert, checkpoint_file, monkeypatch):
    """The tiny conversion, of a published file of 32 pixels and 10 classes."""
    monkeypatch.setitem(published.PUBLISHED, "tiny", Published(ADDRESS, 32, num_classes=10))
    monkeypatch.chdir(convert.workdir.parent)

    def run(*flags):
        return convert(f"--config.checkpoint={ADDRESS}", "--until=checkpoint", *flags)

    run.convert, run.file, run.folder = convert, checkpoint_file, convert.workdir.parent
    return run


@pytest.fixture
def _offline(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")  # nobody listens


def test_most_configs_are_of_public_files():
    assert len(OF_A_PUBLIC_FILE) == len(PUBLISHED)


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("name", OF_A_PUBLIC_FILE)
def test_without_a_network_each_config_names_its_file(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["vit_convert", f"--config={name}", "--checkpoints=mine"]) == 3
    error = capsys.readouterr().err
    (file,) = (file for file in PUBLISHED.values() if file.address in error)
    assert f"{file.address}: cannot be fetched" in error
    assert f"Put {file.name} into mine/" in error and "Traceback" not in error


@pytest.mark.parametrize("name", OF_A_BUCKET)
def test_each_config_asks_the_bucket_for_its_file(name, tmp_path, monkeypatch, capsys, bucket):
    """Of which a damaged one is served, and refused: by its size where that is listed, else as no checkpoint."""
    monkeypatch.chdir(tmp_path)
    asked = _asked(name, bucket)
    (file,) = (file for file in PUBLISHED.values() if file.address.endswith(asked))
    assert file.size == "" or "not the size of the published file" in capsys.readouterr().err


def _asked(name, bucket):
    assert main(["vit_convert", f"--config={name}"]) == 3  # 404
    (path, _) = bucket.requests[-1]
    bucket.files[path] = b"PK, and no more"
    assert main(["vit_convert", f"--config={name}"]) == 3
    return f"//{path}"


def test_file_is_fetched_once_and_used(tiny, bucket):
    bucket.files["models/mu/mu.npz"] = tiny.file.read_bytes()
    bucket.cut = 50_000  # every reply breaks
    assert tiny() == 0
    fetched = tiny.folder / "checkpoints" / local_name(ADDRESS)
    assert fetched.read_bytes() == tiny.file.read_bytes()
    assert tiny.convert.report()["checkpoint"]["path"] == f"checkpoints/{fetched.name}"
    assert (
        tiny.convert.report()["checkpoint"]["sha256"]
        == fetched.with_name(f"{fetched.name}.sha256").read_text().split()[0]
    )
    bucket.files.clear()
    assert tiny() == 0
    assert tiny.convert.statuses() == {"checkpoint": "fresh"}


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("flags", [[], ["--checkpoints=a,b"], ["--checkpoints=a", "--checkpoints", "b"]])
def test_file_that_lies_in_a_folder(tiny, flags):
    folder = tiny.folder / ("b" if flags else "checkpoints")
    folder.mkdir()
    shutil.copy(tiny.file, folder / "mu.npz")
    assert tiny(*flags) == 0
    assert tiny.convert.report()["checkpoint"]["path"] == f"{folder.name}/mu.npz"


@pytest.mark.usefixtures("_offline")
def test_folder_with_a_comma_in_its_name(tiny):
    (tiny.folder / "a, b").mkdir()
    shutil.copy(tiny.file, tiny.folder / "a, b" / "mu.npz")
    assert tiny("--checkpoints=a, b") == 0


@pytest.mark.usefixtures("_offline")
def test_another_model_under_the_published_name(tiny, checkpoint, capsys):
    folder = tiny.folder / "checkpoints"
    folder.mkdir()
    shutil.copy(checkpoint("mu/16", image_size=(64, 64)), folder / "mu.npz")
    assert tiny() == 3
    assert f"checkpoints/mu.npz: 64x64 pixels, {ADDRESS} has 32x32 pixels" in capsys.readouterr().err
    assert tiny("--config.checkpoint=checkpoints/mu.npz") == 0  # as the message advises


@pytest.mark.usefixtures("_offline")
def test_file_that_changed_since_it_was_first_seen(tiny, checkpoint, capsys):
    folder = tiny.folder / "checkpoints"
    folder.mkdir()
    shutil.copy(tiny.file, folder / "mu.npz")
    assert tiny() == 0
    shutil.copy(checkpoint("mu/16", image_size=(32, 32), seed=1), folder / "mu.npz")
    assert tiny() == 3
    assert "mu.npz.sha256 says" in capsys.readouterr().err
    (folder / "mu.npz.sha256").unlink()
    assert tiny() == 0


@pytest.mark.usefixtures("_offline")
def test_fetch_that_fails_is_a_failed_conversion(tiny):
    assert tiny() == 3
    assert tiny.convert.report()["status"] == "failed"
    assert tiny.convert.statuses() == {"checkpoint": "failed"}
