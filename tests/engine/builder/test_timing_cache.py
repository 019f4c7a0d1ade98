"""Kernel timings kept between builds: by version and GPU, used where TensorRT takes them, and never a reason to
fail."""

import dataclasses
import types

import pytest

from vit_convert.core.progress import Progress
from vit_convert.engine.backend.cuda import Gpu
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.builder.timing_cache import find_timings, load_timings, save_timings

GPU = Gpu("NVIDIA H100 80GB HBM3", "sm90", 80 << 30, "550.54", "12.4")
BACKEND = Backend("tensorrt", "8.6.0", None, GPU, None)


class BuilderConfig:
    """A builder config that makes timing caches of some contents alone: `made`, and accepts `accepted` of these."""

    def __init__(self, made, accepted):
        self.made, self.accepted = made, accepted
        self.timing_cache = None

    def create_timing_cache(self, data):
        return types.SimpleNamespace(data=data, serialize=lambda: data + b"+") if data in self.made else None

    def set_timing_cache(self, timing_cache, ignore_mismatch):
        assert ignore_mismatch is False
        if timing_cache.data not in self.accepted:
            return False
        self.timing_cache = timing_cache
        return True


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Simulated", "timing-8.6.0-Simulated.cache"),
        ("NVIDIA H100 80GB HBM3", "timing-8.6.0-NVIDIA-H100-80GB-HBM3.cache"),
        ("GRID A100D-1-10C MIG 1g.10gb/a b", "timing-8.6.0-GRID-A100D-1-10C-MIG-1g.10gb-a-b.cache"),
    ],
)
def test_a_file_for_each_version_and_gpu(tmp_path, name, file):
    backend = dataclasses.replace(BACKEND, gpu=dataclasses.replace(GPU, name=name))
    assert find_timings(backend, tmp_path / "timing") == tmp_path / "timing" / file
    assert find_timings(dataclasses.replace(backend, version="10.1.2"), str(tmp_path)) == tmp_path / file.replace(
        "8.6.0", "10.1.2"
    )


def test_where_there_are_no_timings(tmp_path):
    assert find_timings(BACKEND, None) is None
    assert find_timings(dataclasses.replace(BACKEND, gpu=None), tmp_path) is None
    assert find_timings(dataclasses.replace(BACKEND, name="rtx"), tmp_path) is None


def test_timings_are_kept_from_build_to_build(tmp_path, capsys):
    path = tmp_path / "timing" / "x.cache"
    for kept in (b"", b"+", b"++"):
        builder_config = BuilderConfig(made=[kept], accepted=[kept])
        timing_cache = load_timings(builder_config, path, Progress())
        assert builder_config.timing_cache is timing_cache and timing_cache.data == kept
        save_timings(path, timing_cache, Progress())
    assert path.read_bytes() == b"+++" and capsys.readouterr().err == ""


@pytest.mark.parametrize("made", [[b""], [b"old", b""]])
def test_timings_that_tensorrt_does_not_take_are_begun_anew(tmp_path, capsys, made):
    path = tmp_path / "timing.cache"
    path.write_bytes(b"old")
    builder_config = BuilderConfig(made, accepted=[b""])
    assert load_timings(builder_config, path, Progress()).data == b""
    assert "timing.cache: TensorRT does not accept it" in capsys.readouterr().err
    assert load_timings(BuilderConfig([], []), path, Progress(quiet=True)) is None


def test_timings_that_cannot_be_read_are_begun_anew(tmp_path, capsys):
    folder = tmp_path / "timing.cache"
    folder.mkdir()
    builder_config = BuilderConfig(made=[b""], accepted=[b""])
    assert load_timings(builder_config, folder, Progress()).data == b""
    assert (
        "timing.cache: cannot be read (Is a directory); timing anew" in (said := capsys.readouterr().err)
        and "accept" not in said
    )


def test_timings_that_cannot_be_kept_only_warn(tmp_path, capsys):
    (tmp_path / "timing").write_text("a file where the folder should be")
    timing_cache = types.SimpleNamespace(serialize=lambda: b"timings")
    save_timings(tmp_path / "timing" / "timing.cache", timing_cache, Progress())
    assert "timing.cache: the timings of this build are not kept" in capsys.readouterr().err
