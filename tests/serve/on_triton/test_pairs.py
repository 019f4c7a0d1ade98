"""A pair of towers in a repository: its models, its similarity by what clients have, texts that are kept, and refusals.

The pair is written by hand, and what is right is a forward pass in float64.
"""

import json

import numpy as np
import pytest
from fake_triton import MODELS, MetricFamily, request
from pair_by_hand import IMAGES, LENGTH, TOKENS, WIDTH, WORDS, embeddings, pixels, probabilities, write_pair

from vit_convert.core.bundle import Bundle, read_json, write_json
from vit_convert.core.errors import BuildError, CalibrationError, UsageError
from vit_convert.serve.triton.__main__ import main
from vit_convert.serve.triton.models.similarity import Kept, TritonPythonModel
from vit_convert.serve.triton.models.tokenize import TritonPythonModel as Tokenize
from vit_convert.serve.triton.models.tokenize import words_of
from vit_convert.serve.triton.pairs import models_of_pair, read_pair_offered
from vit_convert.serve.triton.parts import Asked
from vit_convert.serve.triton.repository import write_models
from vit_convert.text.prompting import Prompting

WITHOUT = ["_image_tower", "_image_preprocess", "_image", "_pixels_preprocess", "_pixels", "_text"]
TEXTS = {b"a cat": [3, 4, 1, 1, 1], b"a dog": [3, 5, 1, 1, 1]}


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path / "pair")


@pytest.fixture
def tokenizer(tmp_path, pair):
    """BERT's words, in a file; the pair takes them."""
    pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
    (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", "[SEP]", "[CLS]", "a", "cat", "dog"]) + "\n")
    text = {"tokenizer": "bert", "length": LENGTH, "vocabulary": WORDS, "start": -1, "end": 1, "pad": 1}
    path = Bundle(pair).pair
    write_json(path, {**read_json(path), "text": {**text, "lower": True, "sticky_end": True}})
    return tmp_path / "vocab.txt"


def models(pair, **asked):
    return {model.name: model for model in models_of_pair(read_pair_offered(pair), Asked("clip", **asked))}


def parameters(model):
    """The free parameters in a config, as the server reads them."""
    lines = [line for line in model.config.splitlines() if line.startswith("parameters ")]
    pairs = [
        line.removeprefix("parameters { key: ").removesuffix(" } }").split(" value { string_value: ") for line in lines
    ]
    return {json.loads(key): {"string_value": json.loads(value)} for key, value in pairs}


def initialized(kind, model, folder, inputs):
    found = kind()
    config = {"input": [{"name": name} for name in inputs], "output": [{"name": "tokens"}]}
    about = {"model_repository": str(folder), "model_version": "1", "model_name": "clip_similarity"}
    found.initialize({**about, "model_config": json.dumps({**config, "parameters": parameters(model)})})
    return found


@pytest.fixture
def served(utils, pair, tmp_path, monkeypatch):
    """The similarity of a pair whose other models are the float64 forward pass; and what the text tower was asked."""
    asked = []

    def text(inputs):
        asked.append(len(inputs["tokens"]))
        return {"embedding": embeddings("text", inputs["tokens"]).astype(np.float32)}

    def image(inputs):
        return {"embedding": embeddings("image", pixels(inputs["pixels"])).astype(np.float32)}

    def tokenize(inputs):
        return {"tokens": np.array([TEXTS[word] for word in inputs["prompt"].reshape(-1)], np.int32)}

    for name, model in {"clip_text": text, "clip_pixels": image, "clip_tokenize": tokenize}.items():
        monkeypatch.setitem(MODELS, name, model)
    names = ["image", "pixels", "tokens", "prompt"]
    return initialized(TritonPythonModel, models(pair)["clip_similarity"], tmp_path, names), asked


def test_the_models_of_a_pair(pair, tmp_path):
    found = models(pair)
    assert [*found] == [f"clip{part}" for part in (*WITHOUT, "_similarity")]
    tower = " ".join(found["clip_text"].config.split())
    assert f'name: "tokens" data_type: TYPE_INT32 dims: [ {LENGTH} ]' in tower and f"dims: [ {WIDTH} ]" in tower
    assert 'model_name: "clip_image_tower"' in found["clip_image"].config and "embedding" in found["clip_image"].config
    similarity = " ".join(found["clip_similarity"].config.split())
    assert f'name: "tokens" data_type: TYPE_INT32 dims: [ -1, {LENGTH} ] optional: true' in similarity
    assert "max_batch_size: 0" in similarity and "prompt" not in similarity
    for name, kind, dims in (("image", "STRING", "-1"), ("pixels", "UINT8", "-1, -1, -1, 3")):
        assert f'name: "{name}" data_type: TYPE_{kind} dims: [ {dims} ] optional: true' in similarity
    for name in ("similarity", "logits"):  # of each image to each text
        assert f'name: "{name}" data_type: TYPE_FP32 dims: [ -1, -1 ]' in similarity
    written = parameters(found["clip_similarity"])["pair"]["string_value"]
    told = json.loads(written)
    assert written == json.dumps(told, sort_keys=True)  # the same in each run, so that a repository can be compared
    assert (told["logit_scale"], told["logit_bias"], told["similarity"]) == (20.0, -3.0, "sigmoid")
    assert main(["triton", str(pair), f"--output={tmp_path / 'models'}", "--name=clip"]) == 0
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted(found)


def test_of_a_pair_the_answers_to_texts_are_kept(pair):
    found = models(pair, response_cache=True)
    assert [name for name, model in found.items() if "response_cache" in model.config] == ["clip_text"]


def test_prompts_where_there_is_a_tokenizer(utils, pair, tokenizer, tmp_path):
    found = models(pair, tokenizer=str(tokenizer))
    assert [*found] == [f"clip{part}" for part in (*WITHOUT, "_tokenize", "_prompt", "_similarity")]
    assert 'name: "prompt" data_type: TYPE_STRING dims: [ -1 ]' in found["clip_similarity"].config
    (folder,) = write_models(tmp_path / "models", [found["clip_tokenize"]])
    model = initialized(Tokenize, found["clip_tokenize"], folder, ["prompt"])
    answers = model.execute([request(prompt=np.array([[b"A cat"], [b"a dog"]], object)),
                             request(prompt=np.array([[b"\xff"]], object))])  # fmt: skip
    assert answers[0]["tokens"].tolist() == [*TEXTS.values()] and answers[0]["tokens"].dtype == np.int32
    assert "prompt[0] of 1: no UTF-8" in answers[1].problem.message()


def test_similarities(served):
    model, _ = served
    (answer,) = model.execute([request(pixels=IMAGES, tokens=TOKENS)])
    np.testing.assert_allclose(
        answer["similarity"], probabilities(IMAGES, TOKENS), rtol=1e-4
    )  # 20 times a float32 cosine
    logits = answer["logits"].astype(float)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), probabilities(IMAGES, TOKENS), rtol=1e-4)
    (of_words,) = model.execute([request(pixels=IMAGES, prompt=np.array([*TEXTS], object))])
    np.testing.assert_allclose(of_words["similarity"], probabilities(IMAGES, np.array([*TEXTS.values()])), rtol=1e-4)


def test_texts_are_computed_once(served):
    model, asked = served
    model.execute([request(pixels=IMAGES[:1], tokens=TOKENS[[0, 1, 0]])])
    assert asked == [2]
    (answer,) = model.execute([request(pixels=IMAGES[:2], tokens=TOKENS[[1, 2, 0]])])
    assert asked == [2, 1]
    np.testing.assert_allclose(answer["similarity"], probabilities(IMAGES[:2], TOKENS[[1, 2, 0]]), rtol=1e-4)
    label = (("model", "clip_similarity"), ("version", "1"))
    assert MetricFamily.values[("vit_convert_texts_total", *label)] == 6
    assert MetricFamily.values[("vit_convert_texts_computed_total", *label)] == 3


def test_texts_beyond_those_that_are_kept():
    asked = []

    def embed(tokens):
        asked.append(tokens[:, 0].tolist())
        return tokens.astype(np.float32)

    kept = Kept(embed, 2)
    for texts in ([1, 2], [1, 3], [2], [3, 2, 1, 3]):  # 2 is the one that was not asked for when 3 came
        tokens = np.array(texts, np.int32)[:, None]
        np.testing.assert_array_equal(kept(tokens), tokens)
    assert asked == [[1, 2], [3], [2], [1]]


def test_large_requests_are_asked_in_parts(served):
    model, asked = served  # the towers take 4 at once
    model.execute([request(pixels=IMAGES, tokens=TOKENS)])
    assert asked == [4, 2]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"pixels": IMAGES}, "neither tokens nor prompt is given. Send one of tokens, prompt."),
        ({"tokens": TOKENS}, "neither image nor pixels is given"),
        ({"pixels": IMAGES, "tokens": TOKENS, "prompt": TOKENS}, "tokens and prompt are given"),
        ({"pixels": IMAGES, "tokens": TOKENS[:0]}, f"tokens [0, {LENGTH}]: no text"),
        ({"pixels": IMAGES, "tokens": TOKENS + WORDS}, f"tokens[0] of 6: ids lie between 0 and {WORDS - 1}, found"),
        ({"pixels": IMAGES, "tokens": -1 - TOKENS}, f"tokens[0] of 6: ids lie between 0 and {WORDS - 1}, found -"),
        ({"image": np.array([b"x"], object), "tokens": TOKENS}, "clip_image"),  # what the other model says
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(served, inputs, said):
    wrong, right = served[0].execute([request(**inputs), request(pixels=IMAGES, tokens=TOKENS)])
    assert said in wrong.problem.message() and right["logits"].shape == (9, 6)


def test_what_is_not_finite_is_no_similarity(served, monkeypatch):
    monkeypatch.setitem(MODELS, "clip_pixels", lambda inputs: {"embedding": np.full((9, WIDTH), np.nan, np.float32)})
    (answer,) = served[0].execute([request(pixels=IMAGES, tokens=TOKENS)])
    assert "clip_pixels: embedding: NaN or infinity at place 0 of 9" in answer.problem.message()


def test_words():
    assert words_of(np.array([["ä".encode()], [b""]], object)) == ["ä", ""]


def test_pairs_that_cannot_be_served_so(pair, tokenizer, tmp_path, capsys):
    with pytest.raises(UsageError, match="clip is a pair of towers, and gives no classes"):
        models(pair, labels="names.txt")
    (tmp_path / "other.txt").write_text("[UNK]\n[CLS]\n[SEP]\n")
    with pytest.raises(CalibrationError, match="has id 2 for the end of a text, the model 1"):
        models(pair, tokenizer=str(tmp_path / "other.txt"))
    with pytest.raises(BuildError, match="has no engine of TensorRT"):
        models(pair, runtime="tensorrt")
    words = [f"--output={tmp_path / 'models'}", f"--tokenizer={tokenizer}"]
    assert main(["triton", str(pair / "image"), *words]) == 2
    assert "is not a pair of towers" in capsys.readouterr().err and not (tmp_path / "models").exists()


def test_the_rule_of_prompts_comes_from_the_pair(pair, tokenizer):
    told = parameters(models(pair, tokenizer=str(tokenizer))["clip_tokenize"])
    written = told["prompting"]["string_value"]
    assert written == json.dumps(json.loads(written), sort_keys=True)
    assert Prompting.from_dict(json.loads(told["prompting"]["string_value"])) == Prompting.from_dict(
        read_json(Bundle(pair).pair)["text"]
    )
