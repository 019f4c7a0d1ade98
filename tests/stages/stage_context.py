"""A context in which one stage runs by itself: a bundle of a model that is the mean of each colour and one product, in
float64 here."""

import pathlib

import numpy as np
import onnx
from signatures import PREPROCESS

from vit_convert.config import default_config
from vit_convert.core.bundle import Bundle
from vit_convert.core.pipeline import Context
from vit_convert.core.progress import Progress
from vit_convert.core.results import Results

CLASSES, SIDE = 5, 4
WEIGHT = np.random.default_rng(7).standard_normal((3, CLASSES)).astype(np.float32)
GRAPH = f"""<ir_version: 10, opset_import: ["" : 20]>
g (float[N, H, W, 3] images) => (float[N, {CLASSES}] logits) <float[3, {CLASSES}] w, int64[2] axes = {{1, 2}}> {{
    block_00 = ReduceMean <keepdims = 0> (images, axes)
    logits = MatMul (block_00, w)
}}"""


_RESULTS: dict[str, dict] = {
    "checkpoint": {
        "output": "logits",
        "image_size": [SIDE, SIDE],
        "num_classes": CLASSES,
        "preprocess": PREPROCESS,
    },
    "images": {"num_images": 0, "labelled": False},
    "export": {"taps": ["block_00"]},
}


def change(context: Context, stage: str, **values) -> None:
    """Changes what a stage has returned; what it had not returned yet is empty."""
    before = context.results.get(stage)
    kept = {} if before is None else before.to_dict()
    context.results.put(stage, getattr(Results, stage).kind.from_dict({**kept, **values}))


def make_context(root: pathlib.Path, **results) -> Context:
    """A finished checkpoint of one size, no images, and an export with one tap; `results` change or add stages'
    results."""
    bundle = Bundle(root)
    bundle.require_writable()
    context = Context(default_config(), bundle, Progress(bundle.events, quiet=True))
    for name, result in {**_RESULTS, **results}.items():
        change(context, name, **result)
    return context


def write_graph(path: pathlib.Path, weight: np.ndarray = WEIGHT) -> None:
    """The model's graph."""
    model = onnx.parser.parse_model(GRAPH)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), "w"))
    path.parent.mkdir(exist_ok=True)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)


def forward(values: np.ndarray) -> dict[str, np.ndarray]:
    """What the model gives for [images, height, width, 3]."""
    mean = values.astype(np.float64).mean((1, 2))
    return {"block_00": mean.astype(np.float32), "logits": (mean @ WEIGHT).astype(np.float32)}


def pixels(count: int, height: int = SIDE, width: int = SIDE, seed: int = 0) -> np.ndarray:
    """Seeded images, uint8."""
    return np.random.default_rng([seed, height, width]).integers(0, 256, (count, height, width, 3), np.uint8)


def normalized(images: np.ndarray) -> np.ndarray:
    """As PREPROCESS says, in float64."""
    return (images.astype(np.float64) / 255 - PREPROCESS["mean"]) / PREPROCESS["std"]
