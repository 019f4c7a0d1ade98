"""Files appear whole or not at all."""

import errno
import json
import os
import tempfile

import numpy as np
import pytest

from vit_convert.core.bundle import (
    Bundle,
    atomic,
    folder_errors,
    hash_file,
    hash_value,
    read_json,
    utf8_path,
    write_json,
)
from vit_convert.core.errors import UsageError


def test_atomic_file_and_folder(tmp_path):
    with atomic(tmp_path / "new" / "file") as temporary:
        temporary.write_text("whole")
        assert not (tmp_path / "new" / "file").exists()
    assert (tmp_path / "new" / "file").read_text() == "whole"
    for content in ("one", "two"):
        with atomic(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["two"]


def test_a_file_does_not_take_a_folders_place(tmp_path):
    """`--output=FOLDER` of a command that writes one file removed the folder with all that lay in it."""
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "kept").write_text("mine")
    with (
        pytest.raises(UsageError, match=r"out: cannot be written \(Is a directory\)"),
        atomic(tmp_path / "out") as temporary,
    ):
        temporary.write_text("a page")
    assert (tmp_path / "out" / "deep" / "kept").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENXIO, "no device")])
@pytest.mark.parametrize("folder", [False, True])
def test_crash_leaves_nothing_and_what_was_there(tmp_path, error, folder):
    (tmp_path / "file").write_text("before")
    with pytest.raises(type(error)), atomic(tmp_path / "file") as temporary:
        if folder:
            temporary.mkdir()
            (temporary / "part").write_text("half")
        else:
            temporary.write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EFBIG, "no space left"),
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EACCES, "cannot be written"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_full_disk_is_a_users_mistake(tmp_path, number, message):
    with pytest.raises(UsageError, match=f"file: {message}"), atomic(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_becomes_read_only_is_said(tmp_path, monkeypatch):
    """Not even what was begun can be removed then."""

    def refuse(path, *arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", os.fspath(path))

    with pytest.raises(UsageError, match=r"file: cannot be written"), atomic(tmp_path / "file") as temporary:
        temporary.write_text("half")
        monkeypatch.setattr(os, "unlink", refuse)
        monkeypatch.setattr(os, "replace", refuse)


def test_what_was_begun_in_a_folder_that_cannot_be_removed_hides_no_error(tmp_path, monkeypatch):
    def refuse(path, *arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", os.fspath(path))

    with pytest.raises(ValueError, match="the reason"), atomic(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "part").write_text("half")
        monkeypatch.setattr(os, "unlink", refuse)
        monkeypatch.setattr(os, "rmdir", refuse)
        raise ValueError("the reason")


def failing(number, path=None):
    return OSError(number, os.strerror(number)) if path is None else OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("number", "path", "said"),
    [
        (errno.ENOSPC, "{root}/model.onnx", "{root}/model.onnx: no space left on the disk"),
        (errno.EROFS, "{root}/model.onnx", "{root}/model.onnx: cannot be written (Read-only file system)"),
        (errno.EACCES, b"{root}/a", "{root}/a: cannot be written (Permission denied)"),
        (errno.ENOSPC, None, "{root}: no space left on the disk"),  # as a write through a descriptor has it
        (errno.EROFS, 7, "{root}: cannot be written (Read-only file system)"),  # a descriptor in a name's place
        (errno.EDQUOT, "/elsewhere/cache", "/elsewhere/cache: no space left on the disk"),
        (errno.EACCES, "/elsewhere/checkpoint.npz", ""),  # what cannot be read is not the bundle's
        (errno.EROFS, "{root}-of-another/a", ""),
        (errno.EIO, "{root}/model.onnx", "{root}/model.onnx: cannot be written (Input/output error)"),
        (errno.EISDIR, "{root}/a/b", "{root}/a/b: cannot be written (Is a directory)"),
        (errno.EIO, None, ""),  # perhaps a read of a checkpoint
        (errno.EIO, "/elsewhere/checkpoint.npz", ""),
        (errno.ENOENT, "{root}/model.onnx", ""),  # that a stage forgot to write
        (errno.ENOENT, None, ""),
    ],
)
def test_the_disk_under_a_folder_is_a_users_mistake_and_other_files_are_not(tmp_path, number, path, said):
    root = tmp_path / "b32"
    root.mkdir()
    if isinstance(path, bytes):
        path = path.decode().format(root=root).encode()
    path = path.format(root=root) if isinstance(path, str) else path
    error = failing(number, path)
    with pytest.raises((UsageError, OSError)) as caught, folder_errors(root):
        raise error
    if said:
        assert str(caught.value) == said.format(root=root) and caught.value.__cause__ is error
    else:
        assert caught.value is error


@pytest.mark.parametrize("name", ["b32/model.onnx", ""])
def test_a_folder_that_disappears(tmp_path, name):
    root = tmp_path / "b32"
    with (
        pytest.raises(UsageError, match="b32: was removed while the command worked in it") as caught,
        folder_errors(root),
    ):
        raise failing(errno.ENOENT, str(tmp_path / name)) if name else failing(errno.ENOENT)
    assert caught.value.fix == "Run it again."
    elsewhere = failing(errno.ENOENT, str(tmp_path / "checkpoint.npz"))
    with pytest.raises(FileNotFoundError), folder_errors(root):
        raise elsewhere


def test_what_succeeds_and_what_is_no_error_of_the_disk_passes(tmp_path):
    with folder_errors(tmp_path):
        done = True
    assert done
    with pytest.raises(ZeroDivisionError), folder_errors(tmp_path):
        raise ZeroDivisionError


def test_numpy_writes_to_a_full_disk(tmp_path):
    """The device that is always full: numpy reports a short write as an OSError without a number."""
    with (
        pytest.raises(UsageError, match="file: no space left"),
        atomic(tmp_path / "file"),
        open("/dev/full", "wb", buffering=0) as f,
    ):
        np.zeros(1 << 16).tofile(f)


def test_bundle_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        Bundle(tmp_path / "file" / "b32").require_writable()


def test_a_bundle_is_opened_without_writing(tmp_path, monkeypatch):
    """As from a read-only volume; permissions alone would not stop root."""

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(os, "mkdir", refuse)
    assert Bundle(tmp_path / "b32").manifest == tmp_path / "b32" / "manifest.json"
    with pytest.raises(UsageError, match=r"workdir .*b32: cannot be written \(Read-only file system\)"):
        Bundle(tmp_path / "b32").require_writable()


def test_a_bundle_to_be_written_is_made(tmp_path):
    Bundle(tmp_path / "out" / "b32").require_writable()
    assert list((tmp_path / "out" / "b32").iterdir()) == []


# Other hosts and later versions look for these.
NAMES = {
    "config": "config.json",
    "manifest": "manifest.json",
    "events": "events.jsonl",
    "signature": "signature.json",
    "reference": "reference.npz",
    "calibration": "calibration.json",
    "calibration_cache": "calibration.cache",
    "sensitivity": "sensitivity.json",
    "plan_search": "plan_search.json",
    "lowerings": "lowerings",
    "precision_plan": "precision_plan.json",
    "report": "report.json",
    "report_html": "report.html",
    "benchmark": "benchmark.json",
    "tuning": "tune.json",
    "lock": ".lock",
    "pair": "pair.json",
    "predictions": "evaluation_logits.npy",
    "embeddings": "evaluation_embeddings.npy",
}


def test_names(tmp_path):
    bundle = Bundle(str(tmp_path / "b32"))
    for name, file in NAMES.items():
        assert getattr(bundle, name) == tmp_path / "b32" / file, name
    properties = {name for name, value in vars(Bundle).items() if isinstance(value, property)}
    assert properties == {*NAMES}


def test_names_of_what_there_may_be_several_of(tmp_path):
    bundle = Bundle(tmp_path)
    found = {
        **{precision: bundle.onnx(precision) for precision in ("fp32", "fp16", "bf16", "int8", "fp8")},
        "default": bundle.onnx(),
        "lowering": bundle.lowering("matmul"),
        "ranges": bundle.ranges("fused"),
        "reference": bundle.reference_at((32, 48)),
        "images": bundle.images("calibration"),
        "labels": bundle.labels("evaluation"),
        "plan": bundle.plan("rtx", "1.7", "sm90", "fp16"),
    }
    assert {key: path.relative_to(tmp_path).as_posix() for key, path in found.items()} == {
        **{precision: f"model.{precision}.onnx" for precision in ("fp16", "bf16", "int8", "fp8")},
        **{"fp32": "model.onnx", "default": "model.onnx"},
        "lowering": "lowerings/matmul.onnx",
        "ranges": "lowerings/fused.ranges.json",
        "reference": "reference.32x48.npz",
        "images": "calibration_images.npy",
        "labels": "evaluation_labels.npy",
        "plan": "engines/rtx-1.7-sm90/fp16.plan",
    }


def test_a_folder_is_made_with_those_above_it_and_used_again(tmp_path):
    bundle = Bundle(tmp_path / "out" / "b32")
    for _ in range(2):
        bundle.require_writable()
        assert list(bundle.root.iterdir()) == []


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"x": np.float32(0.5), "n": np.int64(3), "p": tmp_path, "l": np.arange(2)})
    assert read_json(tmp_path / "a.json") == {"x": 0.5, "n": 3, "p": str(tmp_path), "l": [0, 1]}
    (tmp_path / "a.json").write_text("{half")
    assert read_json(tmp_path / "a.json", {}) == {}
    assert read_json(tmp_path / "none.json") is None


def test_json_has_no_nan(tmp_path):
    """Other readers than Python's refuse it."""
    write_json(
        tmp_path / "a.json", {"x": [np.float32("nan"), float("inf"), 1.5], "y": {"z": -float("inf")}, "p": tmp_path}
    )
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    write_json(tmp_path / "b.json", {"x": [None, None, 1.5], "y": {"z": None}, "p": str(tmp_path)})
    assert text == (tmp_path / "b.json").read_text()  # it reads as all others do
    assert read_json(tmp_path / "a.json") == {"x": [None, None, 1.5], "y": {"z": None}, "p": str(tmp_path)}


def test_two_writers_of_one_file_do_not_share_what_is_half_done(tmp_path):
    """Not even with one number of a process, as on two hosts."""
    with atomic(tmp_path / "a") as one, atomic(tmp_path / "a") as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "a").read_text() == "one"


def test_paths_for_libraries_that_take_utf8(tmp_path):
    assert utf8_path(tmp_path / "ü×日") == f"{tmp_path}/ü×日"
    with pytest.raises(UsageError, match=r"out/\?\?: its name is not UTF-8"):
        utf8_path(os.fsdecode(b"out/\xff\xfe"))


def test_hashes(tmp_path):
    import hashlib

    data = np.random.default_rng(0).bytes(9 << 20)  # several chunks and a rest
    (tmp_path / "data").write_bytes(data + b"rest")
    assert hash_file(tmp_path / "data") == hashlib.sha256(data + b"rest").hexdigest()
    assert hash_value({"a": 1, "b": [2]}) == hash_value({"b": [2], "a": 1}) != hash_value({"a": 1, "b": [3]})
    json.loads(json.dumps(hash_value([1])))
