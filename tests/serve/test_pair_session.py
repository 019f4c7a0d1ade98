"""One session of two towers against a forward pass in float64, under onnxruntime and on the simulated GPU."""

import numpy as np
import pytest
import simulated_gpu
from pair_by_hand import IMAGES, LENGTH, SIDE, TOKENS, embeddings, pixels, probabilities, write_pair

import vit_convert
from vit_convert.core.bundle import Bundle
from vit_convert.core.errors import BenchmarkError, UsageError
from vit_convert.engine.handoff import open_bundle
from vit_convert.serve.pair import PairSession


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path / "pair")


def test_a_session_of_a_pair(pair):
    with vit_convert.Session(pair) as session:
        assert isinstance(session, PairSession) and session.runs_on == {"image": "onnxruntime", "text": "onnxruntime"}
        expected = probabilities(IMAGES, TOKENS)
        np.testing.assert_allclose(
            session.similarity(pixels(IMAGES), TOKENS), expected, rtol=1e-4
        )  # 20 times a float32 cosine
        texts = session.text(TOKENS.astype(np.int64))
        np.testing.assert_allclose(texts, embeddings("text", TOKENS), atol=1e-6)
        np.testing.assert_allclose(session.image(pixels(IMAGES)), embeddings("image", pixels(IMAGES)), atol=1e-6)
        kept = session.similarity(pixels(IMAGES[:2]), texts)  # without the text tower
        np.testing.assert_allclose(kept, expected[:2], rtol=1e-4)
        logits = session.similarity(pixels(IMAGES), texts, logits=True)
        np.testing.assert_allclose(1 / (1 + np.exp(-logits.astype(float))), expected, rtol=1e-4)
        for both in ((pixels(IMAGES), texts[:, :3]), (session.image(pixels(IMAGES))[:, :3], texts)):
            with pytest.raises(BenchmarkError, match="differ in width"):
                session.similarity(*both)
        for wrong, said in (
            (TOKENS[:, :2], r"ids \[6, 2\], the model takes \[texts, 5\]"),
            (TOKENS - 1, "ids -1 to"),  # which a graph would look up from the end of its table
            (TOKENS + 20, "the model has 20 tokens"),
        ):
            with pytest.raises(BenchmarkError, match=said):
                session.text(wrong)
    with pytest.raises(BenchmarkError, match="closed"):
        session.image(pixels(IMAGES))
    with pytest.raises(UsageError, match="a pair of towers, and one engine is given"):
        vit_convert.Session(pair, "x.plan")


def test_a_session_runs_the_engines_that_are_proved(gpu, monkeypatch, pair):
    monkeypatch.setattr("vit_convert.serve.session.load_backend", lambda name, **_: gpu[0])
    for tower, shape in (("image", (SIDE, SIDE, 3)), ("text", (LENGTH,))):
        bundle = Bundle(pair / tower)
        plan = bundle.plan("tensorrt", "8.6.0", "sm90", "fp32")
        simulated_gpu.write_plan(plan, bundle.onnx(), [((1, *shape), (4, *shape), (4, *shape))])
    with vit_convert.Session(pair) as session:
        assert session.runs_on == {"image": "tensorrt", "text": "tensorrt"} and session.reason == {
            "image": "",
            "text": "",
        }
        np.testing.assert_allclose(session.similarity(pixels(IMAGES), TOKENS), probabilities(IMAGES, TOKENS), rtol=1e-4)


def test_commands_for_one_model_name_the_two(pair):
    with pytest.raises(UsageError, match="a pair of towers, which are two bundles") as raised:
        open_bundle(str(pair))
    assert str(pair / "image") in raised.value.fix and str(pair / "text") in raised.value.fix
