"""A finished pair of towers without a conversion: each one product of a mean, computed here in float64."""

import pathlib

import numpy as np
import onnx
from signatures import PREPROCESS

from vit_convert.config import default_config
from vit_convert.core import config as configs
from vit_convert.core.bundle import Bundle, hash_file, write_json
from vit_convert.core.manifest import FileRecord
from vit_convert.core.signature import Output, Signature, Tensor

WIDTH, SIDE, LENGTH, WORDS, CLASSES, TEMPLATES = 6, 4, 5, 20, 3, 2
_NUMBERS = np.random.default_rng(5)
COLOURS = _NUMBERS.standard_normal((3, WIDTH)).astype(np.float32)
TABLE = _NUMBERS.standard_normal((WORDS, WIDTH)).astype(np.float32)
TEXT = {
    **{"tokenizer": "sentencepiece", "length": LENGTH, "vocabulary": WORDS, "start": -1, "end": 1, "pad": 1},
    **{"lower": True, "sticky_end": True},
}
PAIR = {"logit_scale": 20.0, "logit_bias": -3.0, "similarity": "sigmoid", "text": TEXT, "classes": 3, "templates": 2}
IMAGES = _NUMBERS.integers(0, 256, (9, SIDE, SIDE, 3), np.uint8)
TOKENS = _NUMBERS.integers(0, WORDS, (CLASSES * TEMPLATES, LENGTH)).astype(np.int32)
LABELS = np.arange(9) % CLASSES
_INPUTS = {
    "image": (Tensor("images", "float32", ("batch", SIDE, SIDE, 3), "NHWC"), f"float[batch, {SIDE}, {SIDE}, 3] images"),
    "text": (Tensor("tokens", "int32", ("batch", LENGTH), below=WORDS, end=1, pad=1), f"int32[batch, {LENGTH}] tokens"),
}
_NODES = {
    "image": "mean = ReduceMean <axes = [1, 2], keepdims = 0> (images)",
    "text": "rows = Gather <axis = 0> (table, tokens) mean = ReduceMean <axes = [1], keepdims = 0> (rows)",
}


def pixels(images: np.ndarray) -> np.ndarray:
    """Images as the image tower takes them: float32 [images, side, side, 3]."""
    return ((images.astype(np.float64) / 255 - PREPROCESS["mean"]) / PREPROCESS["std"]).astype(np.float32)


def embeddings(tower: str, inputs: np.ndarray) -> np.ndarray:
    """What a tower gives for its inputs, float64 [batch, width]."""
    values = (
        inputs.astype(np.float64).mean((1, 2)) @ COLOURS
        if tower == "image"
        else TABLE.astype(np.float64)[inputs].mean(1)
    )
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def probabilities(images: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-(20 cosine - 3))) of each image with each text, [images, texts]."""
    return 1 / (1 + np.exp(3 - 20 * embeddings("image", pixels(images)) @ embeddings("text", tokens).T))


def write_pair(root: pathlib.Path, *, evaluated: bool = True, **changes: object) -> pathlib.Path:
    """Writes the pair; without evaluation data if asked to. `changes` are of what `pair.json` says."""
    samples = {"image": pixels(IMAGES), "text": TOKENS}
    for tower, given in samples.items():
        _write_tower(Bundle(root / tower), tower, given, evaluated)
    bundle = Bundle(root)
    graphs = {tower: hash_file(root / tower / "model.onnx") for tower in samples}
    write_json(bundle.pair, {**PAIR, "graphs": graphs, **({} if evaluated else {"classes": 0}), **changes})
    write_json(bundle.config, _config("pair"))
    _conclude(bundle, {"pair": ({}, ["pair.json"]), "similarity": ({}, [])})
    return root


def _write_tower(bundle: Bundle, tower: str, inputs: np.ndarray, evaluated: bool) -> None:
    bundle.root.mkdir(parents=True)
    tensor, declared = _INPUTS[tower]
    weights = {"w": COLOURS} if tower == "image" else {"table": TABLE, "w": np.eye(WIDTH, dtype=np.float32)}
    graph = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g ({declared}) => (float[batch, {WIDTH}] embedding) '
        f"{{ {_NODES[tower]} long = MatMul (mean, w) norm = ReduceL2 <axes = [1]> (long) "
        "embedding = Div (long, norm) }"
    )
    graph.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.save(graph, bundle.onnx())
    right = embeddings(tower, inputs).astype(np.float32)
    np.savez(bundle.reference, **{tensor.name: inputs[:4], "embedding": right[:4]})
    signature = Signature((tensor,), (Output("embedding", "float32", ("batch", WIDTH), judge="embedding"),))
    write_json(bundle.signature, signature.to_dict())
    write_json(bundle.config, _config(tower))
    left: dict[str, list[str]] = {
        "export": ["model.onnx", "signature.json"],
        "reference": ["reference.npz"],
        "images": [],
    }
    if evaluated:
        np.save(bundle.embeddings, right)
        np.save(
            bundle.images("evaluation") if tower == "image" else bundle.tokens("evaluation"),
            IMAGES if tower == "image" else TOKENS,
        )
        if tower == "image":
            np.save(bundle.labels("evaluation"), LABELS)
        left["reference"] += ["evaluation_embeddings.npy"]
        left["images"] += (
            ["evaluation_images.npy", "evaluation_labels.npy"] if tower == "image" else ["evaluation_tokens.npy"]
        )
    size = [SIDE, SIDE] if tower == "image" else []
    results = {
        "checkpoint": {
            "output": "embedding",
            "judge": "embedding",
            "image_size": size,
            "preprocess": PREPROCESS,
            "pair": None,
        },
        "images": {"num_images": len(inputs) if evaluated else 0, "labelled": False},
        "export": {"target": "trt8", "lowering": "", "lowerings": {}, "taps": []},
        "reference": {"num_images": 4},
        "check": {"passed": True, "precision": "fp32"},
    }
    _conclude(bundle, {name: (result, left.get(name, [])) for name, result in results.items()})


def _config(name: str) -> dict[str, object]:
    config = default_config()
    config.name, config.checkpoint, config.precision, config.batch.max, config.target = name, "a.npz", "fp32", 4, "trt8"
    config.batch.opt = 4
    return configs.as_plain(config)


def _conclude(bundle: Bundle, results: dict[str, tuple[dict[str, object], list[str]]]) -> None:
    rows = []
    for name, (result, files) in results.items():
        records = [FileRecord.of(bundle.root, bundle.root / file) for file in files]
        rows.append({"name": name, "status": "done", "key": "k", "result": result, "files": records})
    write_json(bundle.manifest, {"stages": rows, "command": "python -m vit_convert --config=x.py"})
