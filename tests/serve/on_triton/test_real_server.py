"""A real tritonserver on the CPU: the graph, our session and the ensembles give what JAX gave, over HTTP and gRPC.

What is wrong is refused by its name; no answer is wrong or lost while models are loaded again and an engine fails."""

import fcntl
import json
import os
import pathlib
import subprocess
import sys
import urllib.request

import ml_collections
import numpy as np
import pytest
from pair_by_hand import IMAGES, LENGTH, embeddings, pixels, probabilities, write_pair

from vit_convert.core import config as configs
from vit_convert.core.pair import read_pair
from vit_convert.core.similarity import logits_of
from vit_convert.serve.triton.__main__ import main
from vit_convert.serve.triton.client import infer
from vit_convert.serve.triton.server import find_server, running

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[3]
ATOL = 1e-5  # float32 logits of order 1: onnxruntime and JAX sum in other orders
NO_INDEX = (
    "No matching distribution",
    "Could not find a version",
    "connection",
    "resolve",
    "timed out",
    "ConnectTimeout",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment with the extra `triton`: the one of VIT_CONVERT_TRITON, or one made here for all processes."""
    if at_hand := os.environ.get("VIT_CONVERT_TRITON"):
        return pathlib.Path(at_hand)
    tomllib = pytest.importorskip("tomllib")
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("the index has a server for Linux on x86_64 alone")
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / "triton.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = base / "triton.json"
        if not said.exists():
            said.write_text(json.dumps(install(base / "triton", tomllib)))
    if why := json.loads(said.read_text()):
        pytest.skip(why)
    return base / "triton"


def install(folder, tomllib):
    """Makes the environment; returns why there can be none, or ""."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=300)
    extras = project["optional-dependencies"]
    words = [line for line in extras["text"] if line.startswith("sentencepiece")]  # the other one brings a dozen more
    wanted = [*project["dependencies"], *extras["triton"], *words]
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    done = subprocess.run([*pip, *wanted], capture_output=True, text=True, check=False, timeout=900)
    if done.returncode != 0 and any(word in done.stderr for word in NO_INDEX):
        return f"no package index with a server: {done.stderr.strip().splitlines()[-1]}"
    assert done.returncode == 0, done.stderr[-2000:]
    return ""


@pytest.fixture(scope="module")
def yard():
    """The module that the benchmarks share."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import serve_accidents
        import triton_yard

        yield triton_yard, serve_accidents
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pair of towers, and a tokenizer of letters for it."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the extra `text` is not installed")
    folder = tmp_path_factory.mktemp("pair")
    letters = {"model_type": "char", "vocab_size": 20, "hard_vocab_limit": False}
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat", "a dog"] * 9),
        model_prefix=str(folder / "spiece"),
        minloglevel=2,
        **letters,
        **ids,
    )
    return write_pair(folder / "clip"), folder / "spiece.model"


@pytest.fixture(scope="module")
def served(environment, yard, converted, pair, tmp_path_factory):
    """A server of two bundles: the graph, its ensembles and our session, and a pair; what is known of the first."""
    from vit_convert.serve.triton.server import find_server, running

    root = tmp_path_factory.mktemp("models")
    offered = yard[0].write_repository(converted, root, failing="")
    assert main(["triton", str(pair[0]), f"--output={root}", f"--tokenizer={pair[1]}"]) == 0
    with running(find_server(environment), root) as server:
        yield server, offered


def asked_of(offered, png):
    """By model, input and output: what to send, and what JAX gave."""
    images, logits = offered.samples["images"], offered.expected["logits"]
    pixels, scores = np.load(offered.bundle.images("evaluation")), np.load(offered.bundle.predictions)
    best = -np.sort(-scores, axis=-1)[:, :5]
    return {
        "graph/images/logits": (images, logits),
        "session/images/logits": (images, logits),
        "graph_pixels/pixels/scores": (pixels, best),
        "graph_image/image/scores": (np.array([[png(image)] for image in pixels], object), best),
    }


def test_http(served, yard):
    server, offered = served
    for key, (value, expected) in asked_of(offered, yard[0].png).items():
        model, name, output = key.split("/")
        np.testing.assert_allclose(infer(server.http, model, {name: value})[output], expected, atol=ATOL, err_msg=key)


def test_grpc(served, yard, environment, tmp_path):
    server, offered = served
    asked = asked_of(offered, yard[0].png)
    np.savez(tmp_path / "asked.npz", **{key: value for key, (value, _) in asked.items()})
    script = pathlib.Path(__file__).parent / "grpc_client.py"
    words = [
        pathlib.Path(environment) / "bin" / "python",
        script,
        server.grpc,
        tmp_path / "asked.npz",
        tmp_path / "out.npz",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as answers:
        for key, (_, expected) in asked.items():
            np.testing.assert_allclose(answers[key], expected, atol=ATOL, err_msg=key)


def test_images_of_other_sizes_are_preprocessed_bit_for_bit(served, yard):
    """The ensemble's own step against the images room, on a photograph-like image that has to shrink."""
    server, offered = served
    from vit_convert.images.preprocess import Preprocess

    rows, columns = np.mgrid[0:90, 0:130]
    image = np.stack([rows * 2, columns, (rows * columns) % 256], axis=-1).astype(np.uint8)
    found = infer(server.http, "graph_image_preprocess", {"image": [[yard[0].png(image)]]})["images"]
    preprocess = Preprocess.from_dict(offered.facts.preprocess)
    expected = preprocess.graph_input(preprocess.fit(image, 32, 32)[None], "float32", channels_first=False)
    assert found.dtype == np.float32 and np.array_equal(found, expected)


def wrong_questions(png):
    """Model, inputs, and what the refusal has to name."""
    images = np.zeros((1, 32, 32, 3), np.float32)
    spoilt = images.copy()
    spoilt[0, 5, 5, 1] = np.nan
    jpeg = png(np.zeros((32, 32, 3), np.uint8))
    return {
        "shape": ("graph", {"images": images[:, :16, :16]}, "images"),
        "dtype": ("graph", {"images": images.astype(np.float16)}, "images"),
        "batch": ("session", {"images": np.zeros((9, 32, 32, 3), np.float32)}, "batch-size must be <= 8"),
        "name": ("graph", {"pictures": images}, "pictures"),
        "NaN": ("session", {"images": spoilt}, "images: NaN or infinity at place 0 of 1"),
        "half a file": ("graph_image", {"image": [[jpeg[: len(jpeg) // 2]]]}, "image image[0] of 1: cannot be decoded"),
        "no file": ("graph_image", {"image": [[b"cat"]]}, "image image[0] of 1: cannot be decoded"),
        "no colours": ("graph_pixels", {"pixels": np.zeros((1, 5, 5, 4), np.uint8)}, "pixels"),
        "no pixels": ("graph_pixels", {"pixels": np.zeros((1, 0, 5, 3), np.uint8)}, "pixels"),
    }


def test_what_is_wrong_is_refused_by_name_and_the_server_lives_on(served, yard):
    server, offered = served
    for what, (model, inputs, named) in wrong_questions(yard[0].png).items():
        with pytest.raises(ValueError) as raised:
            infer(server.http, model, inputs)
        assert named in str(raised.value), what
    found = infer(server.http, "session", {"images": offered.samples["images"]})["logits"]
    np.testing.assert_allclose(found, offered.expected["logits"], atol=ATOL)


def test_a_pair(served, pair, yard):
    """Images as files or pixels, texts as prompts or ids, in every combination, against float64."""
    import sentencepiece

    server, _ = served
    model = sentencepiece.SentencePieceProcessor(model_file=str(pair[1]))
    prompts = ["a cat", "A dog", "dog"]  # the pair lowers them, cuts them to its length and keeps their end
    ids = [model.encode(prompt.lower())[: LENGTH - 1] for prompt in prompts]
    tokens = np.array([row + [1] * (LENGTH - len(row)) for row in ids], np.int32)
    files = [yard[0].png(image) for image in IMAGES]
    expected = probabilities(IMAGES, tokens)
    for image in ({"image": files}, {"pixels": IMAGES}):
        for text in ({"prompt": [prompt.encode() for prompt in prompts]}, {"tokens": tokens}):
            found = infer(server.http, "clip_similarity", {**image, **text})["similarity"]
            np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=f"{[*image, *text]}")
    of_prompt = infer(server.http, "clip_prompt", {"prompt": [[b"a cat"]]})["embedding"]
    np.testing.assert_allclose(of_prompt, embeddings("text", tokens[:1]), atol=1e-6)
    of_image = infer(server.http, "clip_image", {"image": [[files[0]]]})["embedding"]
    np.testing.assert_allclose(of_image, embeddings("image", pixels(IMAGES[:1])), atol=1e-6)
    with urllib.request.urlopen(server.metrics, timeout=10) as reply:
        text = reply.read().decode()
    assert 'vit_convert_texts_total{model="clip_similarity",version="1"} 12' in text
    assert 'vit_convert_texts_computed_total{model="clip_similarity",version="1"} 3' in text
    for inputs, named in (
        ({"pixels": IMAGES}, "neither tokens nor prompt is given"),
        ({"pixels": IMAGES, "tokens": tokens + 20}, "tokens[0] of 3: ids lie between 0 and 19"),
        ({"image": [files[0][:40]], "tokens": tokens}, "image image[0] of 1: cannot be decoded"),
        ({"image": files[:1], "prompt": [b"\xff"]}, "prompt[0] of 1: no UTF-8"),
        ({"pixels": IMAGES, "tokens": tokens[:, :3]}, "tokens"),
    ):
        with pytest.raises(ValueError) as raised:
            infer(server.http, "clip_similarity", inputs)
        assert named in str(raised.value), named


def test_a_naflex_pair(environment, yard, tmp_path, capsys):
    """Photographs of several aspects in one request, as files, against JAX's embeddings of the patches."""
    pytest.importorskip("jax2onnx")
    pillow = pytest.importorskip("PIL.Image")
    from vit_convert.convert import convert
    from vit_convert.families.random import write_random_checkpoint

    generator, photos = np.random.default_rng(2), tmp_path / "photos"
    photos.mkdir()
    sizes = [(60, 200), (200, 60), (120, 120)]
    for i, size in enumerate(sizes):
        pillow.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(photos / f"{i}.png")
    write_random_checkpoint(tmp_path / "naflex.npz", "SigLIP2-mu/16-naflex", depth=1)
    given = {"checkpoint": str(tmp_path / "naflex.npz"), "precision": "fp32", "evaluation": {"data": str(photos)}}
    given |= {"engine": {"backend": "none"}, "batch": {"opt": 2, "max": 4}, "check": {"consistency": False}}
    convert(configs.complete(ml_collections.ConfigDict(given), "naflex"), tmp_path, quiet=True)
    bundle, models = tmp_path / "naflex", tmp_path / "models"
    words = [f"--output={models}", "--check", "--serve", f"--environment={environment}"]
    assert main(["triton", str(bundle), *words]) == 0
    assert capsys.readouterr().out.count("passed") == 6  # the towers, and similarities and logits, twice
    files = [path.read_bytes() for path in sorted(photos.iterdir())]
    image = np.load(bundle / "image" / "evaluation_embeddings.npy")
    text = np.load(bundle / "text" / "reference.npz")
    with running(find_server(environment), models) as server:
        found = infer(server.http, "naflex_image", {"image": [[file] for file in files]})["embedding"]
        np.testing.assert_allclose(found, image, atol=ATOL)
        given = {"image": files, "tokens": text["tokens"]}
        logits = infer(server.http, "naflex_similarity", given)["logits"]
    expected = logits_of(image, text["embedding"], read_pair(bundle))
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_metrics_say_what_it_runs_on(served):
    server, _ = served
    infer(server.http, "session", {"images": np.zeros((2, 32, 32, 3), np.float32)})
    with urllib.request.urlopen(server.metrics, timeout=10) as reply:
        text = reply.read().decode()
    about = 'model="session",runs_on="{}",version="1"'
    assert f"vit_convert_runs_on{{{about.format('onnxruntime')}}} 1" in text
    assert f"vit_convert_runs_on{{{about.format('tensorrt')}}} 0" in text
    assert 'vit_convert_images_total{model="session",version="1"}' in text


def test_the_command_checks_and_serves(environment, converted, tmp_path, capsys):
    words = [f"--output={tmp_path}", "--check", "--serve", f"--environment={environment}", "--runtime=python"]
    assert main(["triton", str(converted), *words]) == 0
    said = capsys.readouterr().out
    assert said.count(" ok") == 6 and said.count("passed") == 2 and "tiny_pixels" in said
    config = tmp_path / "tiny" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 8", "max_batchsize: 8"))
    assert main(["triton", f"--output={tmp_path}", "--check", f"--environment={environment}"]) == 2
    assert 'no field named "max_batchsize"' in capsys.readouterr().err


def test_the_command_checks_and_serves_a_pair(environment, pair, tmp_path, capsys):
    words = [f"--output={tmp_path}", "--check", "--serve", f"--environment={environment}", f"--tokenizer={pair[1]}"]
    assert main(["triton", str(pair[0]), *words]) == 0
    said = capsys.readouterr().out
    # both towers, and the similarity and its logits twice: of new texts, and of known ones
    assert said.count(" ok") == 9 and said.count("passed") == 6
    (tmp_path / "clip_tokenize" / "config.pbtxt").unlink()
    assert main(["triton", f"--output={tmp_path}", "--check", f"--environment={environment}"]) == 2
    said = capsys.readouterr()
    assert "asks clip_tokenize: the repository has no such model" in said.out + said.err


def test_a_model_that_does_not_load_is_told(environment, converted, tmp_path, capsys):
    assert main(["triton", str(converted), f"--output={tmp_path}"]) == 0
    (tmp_path / "tiny" / "1" / "model.onnx" / "model.onnx").write_bytes(b"cut")
    assert main(["triton", f"--output={tmp_path}", "--serve", f"--environment={environment}"]) == 8
    assert "failed to load 'tiny'" in capsys.readouterr().err


def test_no_answer_is_wrong_or_lost_while_models_are_loaded_and_an_engine_fails(environment, yard, converted):
    found = yard[1].run(str(converted), str(environment), seconds=6, clients=8, reload_seconds=1.5)
    for name, row in found["rows"].items():
        assert row["answers"] > 8 and row["wrong"] == [] and row["lost"] == [], name
    assert found["loads"] >= 2 and found["engine_failures_since_last_load"] >= 1
