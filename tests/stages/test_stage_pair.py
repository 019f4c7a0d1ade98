"""What the stages of a pair say of two towers: one space, one set of classes, similarities of each precision."""

import contextlib
import types

import numpy as np
import pytest
from stage_context import change, make_context

from vit_convert.core.bundle import Bundle, read_json, write_json
from vit_convert.core.defaults import default_config
from vit_convert.core.errors import CalibrationError, CheckError, CheckpointError
from vit_convert.core.pair import PairFacts
from vit_convert.core.pair_results import SimilarityCheck
from vit_convert.core.pipeline import Context
from vit_convert.core.progress import Progress
from vit_convert.core.signature import Output, Signature, Tensor
from vit_convert.stages import pair as module
from vit_convert.stages.pair import PAIR, check_similarity, describe_pair

PROMPTING = {"tokenizer": "sentencepiece", "length": 4, "vocabulary": 9, "start": -1, "end": 1, "pad": 0, "lower": True,
             "sticky_end": True}  # fmt: skip
RECORD = {**PROMPTING, "logit_scale": 9.5, "logit_bias": -10.25, "similarity": "sigmoid"}


@pytest.fixture
def context(tmp_path, monkeypatch):
    """A pair of towers whose embeddings have 8 numbers each."""
    bundle = Bundle(tmp_path / "pair")
    bundle.require_writable()
    found = Context(default_config(), bundle, Progress(bundle.events, quiet=True))
    found.widths = {"image": 8, "text": 8}
    for name in ("image", "text"):
        found.scratch[name] = make_context(bundle.root / name)
        change(found.scratch[name], "images", num_images=3)
    change(found.scratch["text"], "checkpoint", pair=RECORD, text=True)

    def signature_of(tower):
        width = found.widths[tower.bundle.root.name]
        return Signature((Tensor("x", "float32", ("batch", 4)),), (Output("embedding", "float32", ("batch", width)),))

    monkeypatch.setattr(module, "signature_of", signature_of)
    monkeypatch.setattr(module, "_hash", lambda tower, name: f"{tower.bundle.root.name} {name}")
    return found


@pytest.mark.parametrize(
    ("record", "classes", "summary"),
    [
        ({}, {}, "sigmoid, scale 9.5, bias -10.25"),
        ({"logit_bias": None, "similarity": "softmax"}, {}, "softmax, scale 9.5"),
        ({}, {"classes": 3, "templates": 2}, "sigmoid, scale 9.5, bias -10.25, 3 classes"),
    ],
)
def test_what_a_pair_is(context, record, classes, summary):
    change(context.scratch["text"], "checkpoint", pair={**RECORD, **record})
    change(context.scratch["text"], "images", **classes)
    found = describe_pair(context)
    assert found.summary == summary and (found.classes, found.templates) == tuple(
        (classes or {"a": 0, "b": 0}).values()
    )
    written = read_json(context.bundle.pair)
    assert written.pop("graphs") == {name: f"{name} model.onnx" for name in ("image", "text")}
    assert written == {key: value for key, value in found.to_dict().items() if key != "summary"}
    assert written["text"] == PROMPTING and written["logit_scale"] == 9.5
    assert PAIR.outputs(context) == [context.bundle.pair]
    before = PAIR.inputs(context)
    change(context.scratch["text"], "checkpoint", pair={**RECORD, "logit_scale": 7.0})
    assert PAIR.inputs(context) != before


def test_embeddings_of_two_spaces(context):
    context.widths["text"] = 16
    with pytest.raises(CheckpointError, match="an image's embedding has 8 numbers, a text's 16"):
        describe_pair(context)


def check(precision, used, misses=()):
    return SimilarityCheck.from_dict(
        {"precision": precision, **used, "passed": not misses, "misses": list(misses), "max_cosine_error": 0.0125,
         "top1": 99.5, "recall": 100.0, "zero_shot": 70.0 if precision == "fp32" else None}
    )  # fmt: skip


@pytest.fixture
def judged(context, monkeypatch):
    """Judges towers that have these precisions, of which some miss."""

    def judged(image=(), text=(), misses=None, **options):
        for name, precisions in (("image", image), ("text", text)):
            if precisions:
                checks = {precision: {"passed": True} for precision in (*precisions, "smooth")}
                change(context.scratch[name], "quantize", checks=checks)
        used = []

        def of_graph(tower, precision):
            used.append((tower.bundle.root.name, precision))
            return f"{tower.bundle.root.name} {precision}"

        facts = PairFacts.from_dict({**RECORD, "text": {}, "classes": 3, "templates": 2})
        judge = types.SimpleNamespace(
            judges_ranks=options.get("ranks", True), right=None, labels=options.get("labels"), pair=facts,
            zero_shot=lambda embeddings: 71.25,
            check=lambda precision, used, found: check(precision, used, (misses or {}).get(precision, ())),
        )  # fmt: skip
        monkeypatch.setattr(module, "_judge", lambda context: judge)
        monkeypatch.setattr(module, "_of_graph", of_graph)
        return check_similarity(context), used

    return judged


def test_the_next_higher_graph_stands_in(judged):
    found, used = judged(image=["fp16", "int8"], text=["fp16"])
    assert {name: (row.image, row.text) for name, row in found.checks.items()} == {
        "fp32": ("fp32", "fp32"), "fp16": ("fp16", "fp16"), "int8": ("int8", "fp16"),
    }  # fmt: skip
    assert used[-2:] == [("image", "int8"), ("text", "fp16")] and found.source == "evaluation data"
    assert found.summary.split("; ")[0] == "fp32: cosines to 0.013, top-1 99.50 %, recall 100.00 %, zero-shot 70.00 %"
    assert found.summary.endswith("int8: cosines to 0.013, top-1 99.50 %, recall 100.00 %") and found.zero_shot is None


def test_on_noise_and_with_classes(judged):
    found, _ = judged(ranks=False, labels=np.array([0, 2, 1]))
    assert found.source == "seeded noise" and [*found.checks] == ["fp32"]
    assert found.zero_shot.to_dict() == {"classes": 3, "templates": 2, "num_images": 3, "jax": 71.25}


def test_all_are_measured_before_one_fails(judged):
    with pytest.raises(CheckError, match=r"are not JAX's: fp16: a; b") as caught:
        judged(image=["fp16", "int8"], text=["fp16", "int8"], misses={"fp16": ["a", "b"]})
    result = caught.value.result
    assert {name: row.passed for name, row in result.checks.items()} == {"fp32": True, "fp16": False, "int8": True}


@pytest.fixture
def labels(context, monkeypatch):
    """The labels of a tower's images, from class folders if these are named."""

    def labels(values, folders=(), classes=3, known=True):
        image = context.scratch["image"]
        image.config.evaluation.data = "photos"
        np.save(image.bundle.labels("evaluation"), np.asarray(values))
        change(image, "images", class_folders=list(folders))
        files = [image.bundle.labels("evaluation")] if known else []
        monkeypatch.setattr(module.Manifest, "read", lambda bundle: types.SimpleNamespace(files=files))
        return module._labels(image, PairFacts.from_dict({**RECORD, "text": {}, "classes": classes}))

    return labels


def test_labels_of_the_prompts_classes(labels):
    assert labels([0, 2, 1]).tolist() == [0, 2, 1] and labels([1, 2]).tolist() == [1, 2]  # not every class is there
    assert labels([0, 2], ["a", "b", "c"]).tolist() == [0, 2]
    assert labels([0, 2], classes=0) is None and labels([0, 2], known=False) is None  # another conversion's


@pytest.mark.parametrize(
    ("values", "folders", "said"),
    [
        ([0, 3], (), "evaluation.data=photos: label 3, evaluation.prompts lists 3 classes"),
        ([-1, 2], (), "label 2, evaluation.prompts lists 3 classes"),
        ([0, 1], ["a", "b"], "2 class folders, evaluation.prompts lists 3"),
    ],
)
def test_labels_of_other_classes(labels, values, folders, said):
    with pytest.raises(CalibrationError, match=said):
        labels(values, folders)


def test_what_the_similarities_come_from():
    names = [
        "reference.npz",
        "evaluation_images.npy",
        "model.onnx",
        "model.int8.onnx",
        "engines/x.plan",
        "calibration.json",
    ]
    assert [name for name in names if module._is_read(name)] == names[:4]


def test_embeddings_of_all_samples_or_the_references(context):
    image = context.scratch["image"]
    np.save(image.bundle.embeddings, np.ones((3, 8)))
    np.savez(image.bundle.reference, embedding=np.zeros((2, 8)))
    assert module._jax(image).shape == (3, 8)
    change(image, "images", num_images=0)
    assert module._jax(image).shape == (2, 8)


def test_a_graph_is_known_by_its_hash(context, monkeypatch):
    monkeypatch.undo()
    tower, asked = context.scratch["image"], []
    record = types.SimpleNamespace(sha256="ab")
    for found, expected in ((record, "ab"), (None, "")):
        files = types.SimpleNamespace(record=lambda path, found=found: asked.append(path.name) or found)
        monkeypatch.setattr(module.Manifest, "read", lambda bundle, files=files: types.SimpleNamespace(files=files))
        assert module._hash(tower, "model.onnx") == expected
    assert asked == ["model.onnx"] * 2


def test_a_finished_tower_as_its_stages_saw_it(context):
    rows = [
        {"name": "images", "status": "done", "key": "k", "files": [], "result": {"summary": "s", "num_images": 5}},
        {"name": "export", "status": "failed", "key": "k", "files": [], "result": {"summary": "s", "taps": ["a"]}},
    ]
    (context.bundle.root / "image").mkdir(exist_ok=True)
    write_json(context.bundle.root / "image" / "manifest.json", {"stages": rows})
    found = module.tower_context(context, context.config, "image")
    assert found.results.images.num_images == 5 and found.results.get("export") is None
    assert found.bundle.root == context.bundle.root / "image" and found.progress is context.progress


def test_what_a_graph_embeds(context, monkeypatch):
    """All samples; without any the reference's inputs, unless the check in this process has run them."""
    tower, asked = context.scratch["image"], []
    np.save(tower.bundle.images("evaluation"), np.zeros((3, 4, 4, 3), np.uint8))
    np.savez(tower.bundle.reference, x=np.ones((2, 4), np.float32))
    path = tower.bundle.onnx("fp16")
    monkeypatch.setattr(module, "runnable", lambda tower, precision: contextlib.nullcontext(path))
    monkeypatch.setattr(
        "vit_convert.checks.onnx_graph.graph_scores",
        lambda path, samples, prepare, output, **options: (
            asked.append((len(samples), output, options["batch_size"])) or "all"
        ),
    )
    monkeypatch.setattr("vit_convert.core.onnx_file.open_session", lambda path: path.name)
    monkeypatch.setattr("vit_convert.core.onnx_file.run_session",
                        lambda session, feeds, outputs: {outputs[0]: (session, feeds["x"].shape)})  # fmt: skip
    assert module._of_graph(tower, "fp16") == "all" and asked == [(3, "embedding", 32)]
    change(tower, "images", num_images=0)
    assert module._of_graph(tower, "fp16") == (path.name, (2, 4))
    tower.scratch[module.ANSWERS] = {path.name: {"embedding": "known"}}
    assert module._of_graph(tower, "fp16") == "known"
