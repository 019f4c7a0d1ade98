"""What is asked for, as a sidecar keeps it: each option for itself, so that another one is another engine."""

import types

import pytest

from vit_convert.core.calibration_cache import CacheKey
from vit_convert.core.version import __version__
from vit_convert.engine.builder.request import BuildRequest

KEY = CacheKey("entropy", "8.6.1", "abc")
KEPT_KEY = {"algorithm": "entropy", "version": "8.6.1", "source_hash": "abc"}
CALIBRATOR = types.SimpleNamespace(key=KEY)
PROFILE = {"images": ([1, 4, 4, 3], [8, 4, 4, 3], [64, 4, 4, 3])}


@pytest.fixture
def request_of(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"graph")
    return lambda **options: BuildRequest(tmp_path / "m.onnx", "int8", **options)


def test_nothing_but_what_is_asked_for(request_of):
    found = request_of().asked.to_dict()
    assert (found["vit_convert"], found["precision"], found["profiles"]) == (__version__, "int8", [])
    assert not any(found["options"].get(key) for key in ("ranges", "calibrator", "tf32", "keep_fp32"))
    assert found["options"]["opt_level"] == 3 and found["options"]["workspace_gib"] is None


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"workspace_gib": 2.5}, {"workspace_gib": 2.5}),
        ({"opt_level": 5}, {"opt_level": 5}),
        ({"tf32": True}, {"tf32": True}),
        ({"keep_fp32": ["block_11"]}, {"keep_fp32": ["block_11"]}),
        ({"hardware_compatible": True}, {"hardware_compatible": True}),
        ({"version_compatible": True}, {"version_compatible": True}),
        ({"calibrator": CALIBRATOR}, {"calibrator": KEPT_KEY}),
    ],
)
def test_each_option_is_kept(request_of, options, kept):
    plain, found = request_of().asked.to_dict()["options"], request_of(**options).asked.to_dict()["options"]
    assert {key: value for key, value in found.items() if value != plain.get(key)} == kept


def test_ranges_by_their_hash(request_of):
    found = [request_of(ranges=ranges).asked.options.ranges for ranges in ({}, {"x": 1.0}, {"x": 1.5}, {"y": 1.0})]
    assert found[0] is None and len({*found[1:]}) == 3 and all(isinstance(text, str) for text in found[1:])
    assert request_of(ranges={"a": 1.0, "b": 2.0}).asked == request_of(ranges={"b": 2.0, "a": 1.0}).asked


def test_who_decides_int8(request_of):
    assert not request_of().has_calibrator
    assert request_of(calibrator=CALIBRATOR).has_calibrator and request_of(ranges={"x": 1.0}).has_calibrator


def test_profiles_and_preprocessing(request_of):
    found = request_of(profiles=[PROFILE], preprocessing={"mean": [0.5]}).asked
    assert found.to_dict()["profiles"] == [{"images": [[1, 4, 4, 3], [8, 4, 4, 3], [64, 4, 4, 3]]}]
    assert found.preprocessing == {"mean": [0.5]}


def test_the_graph_as_it_was_at_first(request_of, tmp_path):
    request, before = request_of(), request_of().asked
    assert request.asked == before
    (tmp_path / "m.onnx").write_bytes(b"another graph")
    assert request.asked == before != request_of().asked
