"""TensorRT's calibration cache: its format, and what is refused."""

import hashlib
import json
import os

import numpy as np
import pytest

from vit_convert.core import calibration_cache
from vit_convert.core.calibration_cache import (
    CacheKey,
    format_cache,
    hash_source,
    key_path,
    load_cache,
    load_ranges,
    parse_cache,
    save_cache,
)
from vit_convert.core.errors import CalibrationError

KEY = CacheKey("entropy", "8.6.0", "a" * 64)
CACHE = (
    b"TRT-8600-EntropyCalibration2\nimages: 3caa54fc\n(Unnamed Layer* 64) [Shuffle]_output: "
    b"3d1f2e3a\nblock_00/x: y: 0\n"
)


@pytest.mark.parametrize(
    ("version", "algorithm", "header"),
    [
        ("8.6.0", "entropy", "TRT-8600-EntropyCalibration2"),
        ("8.6.1", "minmax", "TRT-8601-MinMaxCalibration"),
        ("10.14.1.48", "entropy", "TRT-101401-EntropyCalibration2"),
        ("10.0.0b6", "entropy", "TRT-100000-EntropyCalibration2"),
    ],
)
def test_header(version, algorithm, header):
    assert CacheKey(algorithm, version, "").header == header


def test_a_version_that_is_none():
    with pytest.raises(CalibrationError, match=r"TensorRT 11\.x: the calibration cache of such a version is unknown"):
        CacheKey("entropy", "11.x", "").header  # noqa: B018


def test_scales_are_big_endian_float32():
    header, scales = parse_cache(CACHE)
    assert header == KEY.header
    # What a cache of ImageNet-normalised images holds, known to six digits.
    assert scales["images"] == pytest.approx(0.020792, abs=5e-7)
    expected = np.frombuffer(bytes.fromhex("3d1f2e3a"), ">f4")[0]
    assert scales["(Unnamed Layer* 64) [Shuffle]_output"] == expected
    assert scales["block_00/x: y"] == 0.0


@pytest.mark.parametrize(
    "damaged",
    [
        *(
            b"",
            b"TRT-8600-EntropyCalibration2\nimages 3caa54fc\n",
            b"TRT\nimages: xyz\n",
            b"TRT\nimages: 3caa54fc00\n",
            b"\xff\xfe",
        ),
        *(b"TRT\nimages: 7fc00000\n", b"TRT\nimages: 7f800000\n", b"TRT\nimages: bf800000\n"),  # NaN, infinity, -1
    ],
)
def test_damaged_cache(damaged):
    with pytest.raises(CalibrationError, match="calibration cache: not one of TensorRT"):
        parse_cache(damaged)


def test_bytes():
    ranges = {
        "images": parse_cache(CACHE)[1]["images"] * 127,
        "(Unnamed Layer* 64) [Shuffle]_output": 127.0,
        "a: b": 0.0,
    }
    data = format_cache(CacheKey("entropy", "8.6.1", ""), ranges)
    assert (
        data
        == b"TRT-8601-EntropyCalibration2\nimages: 3caa54fc\n(Unnamed Layer* 64) [Shuffle]_output: 3f800000\na: b: 0\n"
    )
    _, scales = parse_cache(data)
    assert format_cache(CacheKey("entropy", "8.6.1", ""), {name: scale * 127 for name, scale in scales.items()}) == data
    with pytest.raises(CalibrationError, match="'percentile' is not TensorRT's"):
        format_cache(CacheKey("percentile", "8.6.1", ""), ranges)


def test_cache_comes_back_whole(tmp_path):
    path = tmp_path / "calibration.cache"
    assert load_cache(path, KEY) is None
    save_cache(path, KEY, CACHE, num_images=64)
    assert load_cache(path, KEY) == CACHE


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            CacheKey("minmax", "8.6.0", "a" * 64),
            "made as TRT-8600-EntropyCalibration2, needed TRT-8600-MinMaxCalibration",
        ),
        (CacheKey("entropy", "8.6.1", "a" * 64), "needed TRT-8601-EntropyCalibration2"),
        (
            CacheKey("entropy", "8.6.0", "b" * 64),
            "made from graph, weights and images aaaaaaaaaaaa…, needed bbbbbbbbbbbb…",
        ),
    ],
)
def test_cache_of_another_build_is_refused(tmp_path, key, message):
    path = tmp_path / "calibration.cache"
    save_cache(path, KEY, CACHE, num_images=64)
    with pytest.raises(CalibrationError, match=message) as caught:
        load_cache(path, key)
    assert str(path) in caught.value.fix


def test_cache_without_a_key_or_a_scale_is_refused(tmp_path):
    path = tmp_path / "calibration.cache"
    path.write_bytes(CACHE)
    with pytest.raises(CalibrationError, match=r"a graph and images that no calibration\.cache\.json names"):
        load_cache(path, KEY)
    save_cache(path, KEY, b"TRT-8600-EntropyCalibration2\n", num_images=64)
    with pytest.raises(CalibrationError, match="holds no scale"):
        load_cache(path, KEY)


@pytest.mark.parametrize("version", ["8.6.0", "8.6.1", "10.16.1"])
def test_ranges_may_be_of_another_version_and_nothing_else(tmp_path, version):
    """TensorRT's own calibration of one version is no other's; thresholds of ours are the model's."""
    path = tmp_path / "calibration.cache"
    assert load_ranges(path, KEY) is None
    made = CacheKey("entropy", version, KEY.source_hash)
    ranges = {"images": 2.0, "block_00/x: y": 127.0}
    save_cache(path, made, format_cache(made, ranges), num_images=64)
    found = load_ranges(str(path), KEY)
    assert found["block_00/x: y"] == 127.0 and found["images"] == pytest.approx(2.0, rel=2e-7)  # float32
    with pytest.raises(CalibrationError, match=r"needed TRT-.*MinMaxCalibration"):
        load_ranges(path, CacheKey("minmax", "8.6.0", KEY.source_hash))
    with pytest.raises(CalibrationError, match="needed bbbbbbbbbbbb…"):
        load_ranges(path, CacheKey("entropy", "8.6.0", "b" * 64))
    key_path(path).unlink()
    with pytest.raises(CalibrationError, match="that no calibration"):
        load_ranges(path, made)


def test_the_key_beside_a_cache(tmp_path):
    path = tmp_path / "calibration.cache"
    save_cache(str(path), KEY, CACHE, num_images=64)
    assert key_path(path) == tmp_path / "calibration.cache.json" and path.read_bytes() == CACHE
    expected = {"algorithm": "entropy", "version": "8.6.0", "source_hash": "a" * 64, "num_images": 64}
    assert json.loads(key_path(path).read_text()) == expected


@pytest.mark.parametrize("fails", ["replace", "write_json"])
def test_a_new_cache_never_lies_beside_an_old_key(tmp_path, monkeypatch, fails):
    """Whatever ends it between: a cache without a key is refused, one with another's would be believed."""
    path = tmp_path / "calibration.cache"
    save_cache(path, KEY, CACHE, num_images=64)
    other = CacheKey("entropy", "8.6.0", "b" * 64)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(*((os, "replace") if fails == "replace" else (calibration_cache, "write_json")), killed)
    with pytest.raises(KeyboardInterrupt):
        save_cache(path, other, CACHE.replace(b"3caa54fc", b"3caa54fd"), num_images=64)
    assert not key_path(path).exists()


SOURCE = {
    "graph": {"sha256": "g", "data_sha256": "d"},
    "num_images": 64,
    "preprocessing": {"mean": [0.5], "std": [0.5]},
}


def test_what_ranges_come_from(tmp_path):
    """By its JSON, which other versions of the project have to hash the same."""
    images = tmp_path / "images.npy"
    images.write_bytes(b"pixels")
    parts = [SOURCE["graph"], hashlib.sha256(b"pixels").hexdigest(), 64, SOURCE["preprocessing"]]
    expected = [
        hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() for found in (parts, [*parts, 8])
    ]
    assert hash_source(images_path=images, **SOURCE) == expected[0]
    assert hash_source(images_path=str(images), batch_size=8, **SOURCE) == expected[1]


@pytest.mark.parametrize(
    "change",
    [{"graph": {"sha256": "g"}}, {"num_images": 63}, {"preprocessing": {}}, {"batch_size": 0}, {"pixels": b"others"}],
)
def test_each_part_of_a_source_counts(tmp_path, change):
    images = tmp_path / "images.npy"
    images.write_bytes(b"pixels")
    before = hash_source(images_path=images, **SOURCE)
    images.write_bytes(change.pop("pixels", b"pixels"))
    assert hash_source(images_path=images, **{**SOURCE, **change}) != before


def test_padding_of_the_bits_and_empty_lines():
    """TensorRT leaves leading zeros out; a small scale has some."""
    _, scales = parse_cache(b"TRT-8600-EntropyCalibration2\n\ntiny: a\n\nnone: 0\n")
    assert scales == {"tiny": np.frombuffer(b"\x00\x00\x00\x0a", ">f4")[0], "none": 0.0} and scales["tiny"] > 0
    assert format_cache(KEY, {"tiny": scales["tiny"] * 127}) == b"TRT-8600-EntropyCalibration2\ntiny: a\n"
