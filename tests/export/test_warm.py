"""What a process keeps between conversions changes no byte of what they write."""

from collections.abc import Iterator

import numpy as np
import pytest

from vit_convert.core import warm
from vit_convert.export.exporter import export_model
from vit_convert.export.targets import target_named
from vit_convert.families.load import load_checkpoint
from vit_convert.families.random import write_random_checkpoint


@pytest.fixture
def keeping() -> Iterator[None]:
    warm.keep()
    yield
    warm.keep(False)


def written(folder, seed, variant="mu/16", side=32, *, ran=False, **options):
    """The bytes of a graph and of its weights, and what JAX makes of an image."""
    path = folder / f"{seed}.npz"
    write_random_checkpoint(path, variant, image_size=(side, side), num_classes=10, seed=seed)
    checkpoint = load_checkpoint(path)
    model = checkpoint.family.model(checkpoint)
    graph = folder / "model.onnx"
    report = export_model(model, graph, target=target_named("rtx"), **options)
    images = np.random.default_rng(0).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    outputs = model.run(images) if ran else {}
    return graph.read_bytes(), graph.with_name("model.onnx.data").read_bytes(), report, outputs


def same(one, other):
    for a, b in zip(one[:3], other[:3]):
        assert a == b
    assert one[3].keys() == other[3].keys()
    for name, value in one[3].items():
        np.testing.assert_array_equal(value, other[3][name])


@pytest.mark.parametrize("options", [{}, {"taps": True}, {"layout": "NCHW"}, {"dynamic_patch": 16}], ids=str)
def test_the_second_of_a_kind_is_what_it_is_alone(tmp_path, keeping, options):
    first = written(tmp_path, 0, **options)
    second = written(tmp_path, 1, ran=not options, **options)
    warm.keep(False)
    same(first, written(tmp_path, 0, **options))
    same(second, written(tmp_path, 1, ran=not options, **options))


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "side"), [("Mixer-mu/16", 32), ("R8+ViT-mu/8", 32)])
def test_other_families(tmp_path, keeping, variant, side):
    written(tmp_path, 0, variant, side)
    second = written(tmp_path, 1, variant, side, ran=True)
    warm.keep(False)
    same(second, written(tmp_path, 1, variant, side, ran=True))


def test_settings_do_not_get_each_others_graph(tmp_path, keeping):
    plain, tapped = written(tmp_path, 0), written(tmp_path, 0, taps=True)
    assert plain[0] != tapped[0] and plain[0] != written(tmp_path, 0, layout="NCHW")[0]
    assert plain[0] == written(tmp_path, 0)[0]


def test_a_kind_is_traced_once(tmp_path, keeping, monkeypatch):
    from vit_convert.export import lower

    traced = []
    trace = lower.trace
    monkeypatch.setattr(lower, "trace", lambda *given: traced.append(given) or trace(*given))
    written(tmp_path, 0)
    written(tmp_path, 1)
    assert len(traced) == 1
    written(tmp_path, 1, side=64)
    assert len(traced) == 2


def test_nothing_is_kept_by_default_and_the_oldest_goes_first(keeping, monkeypatch):
    monkeypatch.setattr(warm, "_LIMIT", 2)
    made: list[str] = []
    for key in "abacb":  # "b" was the least recently used when "c" came
        warm.shared(key, lambda key=key: made.append(key))
    assert made == ["a", "b", "c", "b"]
    warm.shared(["unhashable"], lambda: made.append("d"))
    warm.shared(["unhashable"], lambda: made.append("d"))
    assert made[4:] == ["d", "d"]
    warm.keep(False)
    warm.shared("a", lambda: made.append("a"))
    warm.shared("a", lambda: made.append("a"))
    assert made[6:] == ["a", "a"]


def test_what_stays_is_left_out_of_searches_for_cycles_once(monkeypatch):
    frozen = []
    monkeypatch.setattr(warm, "_settled", False)
    monkeypatch.setattr(warm.gc, "freeze", lambda: frozen.append(True))
    warm.settle()
    warm.settle()
    assert frozen == [True]
