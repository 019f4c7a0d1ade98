"""What the answers of a server are held against: JAX's outputs, best classes, and similarities; the server is a
function."""

import types

import numpy as np
import pytest

from vit_convert.core.bundle import Bundle
from vit_convert.core.compare import Tolerance
from vit_convert.core.defaults import default_config
from vit_convert.core.errors import BenchmarkError
from vit_convert.core.pair import PairFacts
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.images.patches import packed_patches
from vit_convert.serve.triton import prove as module
from vit_convert.serve.triton.prove import Proved, prove, prove_pair

COUNT, CLASSES = 6, 5
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (COUNT, 4, 4, 3), np.uint8)
SAMPLES = RNG.standard_normal((3, 4, 4, 3)).astype(np.float32)
WEIGHT = RNG.standard_normal((3, CLASSES)).astype(np.float32)


def logits(images):
    """What JAX and a right server give."""
    return (images.astype(np.float32).mean((1, 2)) / 255) @ WEIGHT


@pytest.fixture
def config(monkeypatch):
    found = default_config()
    with found.unlocked():
        found.check.update({"rtol": 0.25, "engine_rtol": 0.5, "fp16_cosine": 0.75, "fp16_similarity": 0.125})
    monkeypatch.setattr(module, "read_config", lambda bundle: found)
    return found


@pytest.fixture
def offered(tmp_path, config):
    """A model of images; evaluated on six of them, if it is."""

    def offered(root="tiny", precision="", evaluated=True, judge="top1", inputs=1, batch=4):
        bundle = Bundle(tmp_path / root)
        bundle.require_writable()
        names = [bundle.images("evaluation"), bundle.predictions] if evaluated else []
        np.save(bundle.images("evaluation"), IMAGES)
        np.save(bundle.predictions, logits(IMAGES))
        taken = [Tensor(f"images{i or ''}", "float32", ("batch", 4, 4, 3)) for i in range(inputs)]
        signature = Signature(tuple(taken), (Output("logits", "float32", ("batch", CLASSES), judge=judge),))
        plans = [types.SimpleNamespace(precision=precision)] if precision else []
        return types.SimpleNamespace(
            bundle=bundle, signature=signature, plans=plans, max_batch=batch, samples={"images": SAMPLES},
            expected={"logits": logits(SAMPLES)}, facts=types.SimpleNamespace(files=names, patches=(0, 0)),
        )  # fmt: skip

    return offered


@pytest.fixture
def server(monkeypatch):
    """Answers as JAX does, and `off` by so much; notes what it was asked."""
    asked = []

    def start(off=None):
        off = off or {}

        def infer(url, model, inputs, timeout):
            assert url == "localhost:8001" and timeout == 120
            asked.append((model, {name: value.shape for name, value in inputs.items()}))
            (values,) = inputs.values()
            found = logits(values) + np.float32(off.get(model, 0))
            if not model.endswith("_pixels"):
                return {"logits": found}
            return {"scores": -np.sort(-found, axis=-1)[:, :2]}

        monkeypatch.setattr(module, "infer", infer)
        return asked

    return start


def test_the_reference_and_the_best_classes(offered, server):
    asked = server()
    found = list(prove("localhost:8001", "m", offered()))
    assert asked == [("m", {"images": (3, 4, 4, 3)}), ("m_pixels", {"pixels": (4, 4, 4, 3)})]  # no more than a batch
    assert [(row.model, row.output, row.passed) for row in found] == [
        ("m", "logits", True),
        ("m_pixels", "scores", True),
    ]
    assert all(row.max_abs == 0 and row.cosine > 0.999999 for row in found)
    assert {row.tolerance for row in found} == {Tolerance(1e-6, 0.25, 0.99999)}


@pytest.mark.parametrize(("model", "failed"), [("m", [False, True]), ("m_pixels", [True, False])])
def test_what_is_off_fails(offered, server, model, failed):
    server({model: 100.0})
    found = list(prove("localhost:8001", "m", offered()))
    assert [row.passed for row in found] == failed
    assert found[failed.index(False)].max_abs == pytest.approx(100.0, abs=1e-4)


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("", Tolerance(1e-6, 0.25, 0.99999)), ("fp32", Tolerance(1e-6, 0.5, 0.99999)),
     ("fp16", Tolerance(0.0, float("inf"), 0.75))],
)  # fmt: skip
def test_engines_are_judged_as_engines(offered, server, precision, tolerance):
    server()
    assert {row.tolerance for row in prove("localhost:8001", "m", offered(precision=precision))} == {tolerance}


@pytest.mark.parametrize("more", [{"evaluated": False}, {"judge": "cosine"}, {"inputs": 2}])
def test_without_classes_of_images_there_are_no_best(offered, server, more):
    asked = server()
    assert [row.model for row in prove("localhost:8001", "m", offered(**more))] == ["m"] and len(asked) == 1


def test_no_more_images_than_sixty_four(offered, server, monkeypatch):
    many = np.repeat(IMAGES, 20, 0)
    found = offered(batch=1000)
    np.save(found.bundle.images("evaluation"), many)
    np.save(found.bundle.predictions, logits(many))
    asked = server()
    assert all(row.passed for row in prove("localhost:8001", "m", found))
    assert asked[1][1] == {"pixels": (64, 4, 4, 3)}


@pytest.mark.parametrize("error", [ValueError("no such model"), ConnectionRefusedError("refused")])
def test_a_server_that_does_not_answer(offered, monkeypatch, error):
    def infer(*arguments, **options):
        raise error

    monkeypatch.setattr(module, "infer", infer)
    with pytest.raises(BenchmarkError, match=f"^m: the server did not answer: {error}"):
        list(prove("localhost:8001", "m", offered()))


def test_words_and_cells():
    row = Proved("m", "logits", 0.00123, 0.000456, 0.99999, Tolerance(1e-6, 0.25, 0.5), True)
    assert row.cells() == ["m", "logits", "0.0012", "0.00046", "0.9999900", "passed"]
    assert row.words().startswith("max abs 0.00123 (0.000456 of scale), cosine 0.9999900; needed max_abs <= 1e-06")
    assert Proved("m", "x", 1.0, 1.0, 0.0, Tolerance(0, 0, 1), False).cells()[-1] == "FAILED"


def unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


@pytest.fixture
def pair(offered, monkeypatch):
    """Two towers with embeddings of six images and three texts, whose cosines are known."""

    def pair(image="", text="", known=True):
        towers = [offered(f"pair/{name}", precision) for name, precision in (("image", image), ("text", text))]
        for tower in towers:
            tower.facts.files = [tower.bundle.embeddings] if known else []
        np.save(towers[1].bundle.tokens("evaluation"), np.arange(12, dtype=np.int32).reshape(3, 4))
        generator = np.random.default_rng(5)
        embeddings = {"image": generator.standard_normal((COUNT, 8)), "text": generator.standard_normal((3, 8))}
        monkeypatch.setattr(module, "jax_embeddings", lambda bundle, facts: embeddings[bundle.root.name])
        right = 10.0 * unit(embeddings["image"]) @ unit(embeddings["text"]).T - 2.0
        facts = PairFacts(10.0, -2.0, "sigmoid", {})
        tokens = types.SimpleNamespace(name="tokens")
        return types.SimpleNamespace(image=towers[0], text=towers[1], facts=facts, tokens=tokens), right

    return pair


@pytest.fixture
def similarity(monkeypatch):
    """A server whose similarities are so far off, after towers that are right."""

    def start(right, off=(0.0, 0.0)):
        asked, offs = [], iter(off)

        def infer(url, model, inputs, timeout):
            asked.append((model, {name: value.shape for name, value in inputs.items()}))
            if not model.endswith("_similarity"):
                return {"logits": logits(inputs["images"])}
            found = right + next(offs)
            return {"logits": found, "similarity": 1 / (1 + np.exp(-found))}

        monkeypatch.setattr(module, "infer", infer)
        return asked

    return start


def test_a_pair_is_asked_twice(pair, similarity):
    found, right = pair()
    asked = similarity(right)
    rows = list(prove_pair("localhost:8001", "p", found))
    assert [name for name, _ in asked] == ["p_image_tower", "p_text", "p_similarity", "p_similarity"]
    assert asked[2][1] == {"pixels": IMAGES.shape, "tokens": (3, 4)}
    assert [row.output for row in rows[2:]] == ["similarity", "logits"] * 2 and all(row.passed for row in rows)


def test_what_is_off_the_second_time_fails(pair, similarity):
    """The texts are known then; a logit may be off by the scale times what the cosine may."""
    found, right = pair(image="fp16")
    similarity(right, off=(1.2, 1.3))  # 10 times 0.125
    rows = [
        row for row in prove_pair("localhost:8001", "p", found) if row.output == "logits" and "similarity" in row.model
    ]
    assert [row.passed for row in rows] == [True, False]


@pytest.mark.parametrize(
    ("image", "text", "cosine"),
    [("", "", 0.25 + 1e-6), ("fp32", "", 0.5 + 1e-6), ("fp16", "fp32", 0.125), ("fp32", "fp16", 0.125)],
)
def test_the_lower_of_two_towers_counts(pair, similarity, image, text, cosine):
    found, right = pair(image, text)
    similarity(right)
    rows = [row for row in prove_pair("localhost:8001", "p", found) if row.model == "p_similarity"][:2]
    assert [row.tolerance for row in rows] == [
        Tolerance(pytest.approx(10.0 * cosine / 2), 0.0, -1.0),  # a sigmoid moves by less than half of its logit
        Tolerance(pytest.approx(10.0 * cosine), 0.0, -1.0),
    ]


def test_images_of_any_aspect_are_asked_one_by_one(pair, similarity, monkeypatch):
    """Put together from the patches that are kept; without prompts the reference's texts stand in."""
    pytest.importorskip("PIL")  # images are resized with it
    found, right = pair()
    sizes = [(16, 48), (48, 16), (32, 32), (16, 16), (16, 32), (32, 16)]
    images = [RNG.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    packed = np.stack([packed_patches(image, 16, 3) for image in images])
    np.save(found.image.bundle.images("evaluation"), packed)
    found.image.facts.patches, found.text.facts.files = (3, 16), []
    found.text.samples = {"images": SAMPLES, "tokens": np.arange(12, dtype=np.int32).reshape(3, 4)}
    asked, rows = [], iter([*right, *right])

    def infer(url, model, inputs, timeout):
        if not model.endswith("_similarity"):
            return {"logits": logits(inputs["images"])}
        asked.append(inputs)
        row = next(rows)[None]
        return {"logits": row, "similarity": 1 / (1 + np.exp(-row))}

    monkeypatch.setattr(module, "infer", infer)
    proved = [row for row in prove_pair("localhost:8001", "p", found) if row.model == "p_similarity"]
    assert len(proved) == 4 and all(row.passed for row in proved) and len(asked) == 2 * COUNT
    for inputs, kept in zip(asked, packed):
        np.testing.assert_array_equal(packed_patches(inputs["pixels"][0], 16, 3), kept)
        assert inputs["tokens"].tolist() == found.text.samples["tokens"].tolist()


def test_without_embeddings_the_towers_alone(pair, similarity):
    found, right = pair(known=False)
    asked = similarity(right)
    assert [row.model for row in prove_pair("localhost:8001", "p", found)] == ["p_image_tower", "p_text"]
    assert len(asked) == 2
