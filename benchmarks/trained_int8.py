"""INT8 of a trained ViT-S/14 by each calibration method, under onnxruntime on the CPU: cosine on photographs, top-1 of
a linear probe.

The folder is what checkpoints/make_dinov2.py made. Ranges come from its 48 calibration crops, or from 48 digits that
the probe was trained on; the cosine is that of the features behind the last LayerNorm to those of the FP32 graph, on
crops of other photographs; the probe sees digits that it was not trained on.

    python benchmarks/trained_int8.py --folder=FOLDER --workdir=/tmp/bench
"""

import functools
import pathlib
import time
import zipfile
from typing import Any

import numpy as np
from absl import app, flags
from graphs import exported
from results import RESULTS, Results, first_paragraph, today

_FOLDER = flags.DEFINE_string("folder", None, "What checkpoints/make_dinov2.py made.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Scratch folder, half a GiB.", required=True)
_HELD_OUT = flags.DEFINE_integer("held_out", 500, "Held-out digits for top-1.")
_CASES = flags.DEFINE_list("cases", [], "Names of the cases to measure; by default all.")
_OUTPUT = flags.DEFINE_string(
    "output", "", "Result file; by default benchmarks/results/int8-trained-<date>.json, which is continued."
)

_BATCH = 20
FEATURES = "features"
# What is set beside precision=int8; the first is the default.
CASES: dict[str, dict[str, Any]] = {
    "entropy": {},
    "entropy, ranges from digits": {"images": "digits_calibration.zip"},
    "entropy, shift=False, max_error=0.002": {"shift": False, "max_error": 0.002},
    "entropy_plain": {"method": "entropy_plain"},
    "minmax": {"method": "minmax"},
    "percentile": {"method": "percentile"},
    "mse": {"method": "mse"},
    "entropy, shift=False, max_error=0.002, smooth=0.5": {"shift": False, "max_error": 0.002, "smooth": 0.5},
    "entropy, smooth=0.75": {"smooth": 0.75},
    "entropy, rotate=True": {"rotate": True},
    "entropy, attention=True": {"attention": True},
    "fp8": {"precision": "fp8"},
}

Images = np.ndarray


def read_images(path: pathlib.Path, limit: int = 0) -> tuple[Images, list[str]]:
    """The images of an archive as the model takes them, float32 [N, 224, 224, 3], and their names; evenly chosen where
    there are more."""
    import io

    from PIL import Image

    from vit_convert.images.preprocess import preprocess_for

    preprocess = preprocess_for("vit_jax", (224, 224))
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        names = names[:: max(1, len(names) // limit)][:limit] if limit else names
        pictures = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
    return np.stack([preprocess.fit(picture, 224, 224) for picture in pictures]), names


def normalize(images: Images) -> Images:
    """uint8 → [-1, 1]."""
    from vit_convert.images.preprocess import preprocess_for

    return preprocess_for("vit_jax", (224, 224)).normalize(images)


def quantized(
    graph: pathlib.Path,
    images: Images,
    output: pathlib.Path,
    *,
    method="entropy",
    shift=True,
    smooth=0.0,
    rotate=False,
    attention=False,
    precision="int8",
    max_error=0.0,
):
    """Calibrates and writes a Q/DQ graph; returns the Calibration and the seconds of CPU that it took."""
    import onnx_ir as ir

    from vit_convert.core.config import default_config
    from vit_convert.core.onnx_file import save_onnx
    from vit_convert.quantize.activation_max import largest
    from vit_convert.quantize.calibrate import calibrate
    from vit_convert.quantize.placement import place
    from vit_convert.quantize.qdq import quantize
    from vit_convert.quantize.rotate import rotate_streams
    from vit_convert.quantize.shift import shiftable
    from vit_convert.quantize.smooth import find_norms
    from vit_convert.quantize.smooth import smooth as smoothed

    model = ir.load(graph)
    placement = place(model, attention=attention)
    if rotate:
        graph = output.with_name("rotated.onnx")
        save_onnx(rotate_streams(model).model, graph)
        model = ir.load(graph)
    if smooth:
        norms, _ = find_norms(model, placement.sites)
        amax = largest(graph, [norm.tensor for norm in norms], [normalize(images)], per_channel=True)
        graph = output.with_name("smooth.onnx")
        save_onnx(smoothed(model, placement.sites, amax, strength=smooth).model, graph)
        model = ir.load(graph)
    started = time.process_time()
    calibration = calibrate(graph, images, normalize, placement.tensors(), method=method)
    seconds = time.process_time() - started
    if precision == "int8":
        sites = place(model).sites
        calibration = calibration.shift(*shiftable(model, sites)) if shift else calibration
        calibration = calibration.leave_out(
            [site.tensor for site in sites], max_error or default_config().calibration.max_error
        )
        placement = place(model, attention=attention, leave_out=calibration.left_out)
    save_onnx(quantize(model, calibration, placement.sites, target="trt10", precision=precision), output)
    return calibration, seconds


def run(graph: pathlib.Path, images: Images, features: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits of images, batch by batch."""
    from vit_convert.core.onnx_file import open_session

    session = open_session(graph, [features])
    found = [
        session.run([features, "logits"], {"images": normalize(images[i : i + _BATCH])})
        for i in range(0, len(images), _BATCH)
    ]
    return np.concatenate([f.reshape(len(f), -1) for f, _ in found]), np.concatenate([logits for _, logits in found])


def export(folder: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """The FP32 graph of the checkpoint with its head, which gives what the head reads, too."""
    checkpoint = folder / "dinov2_s14_digits.npz"
    outputs = f"--config.outputs=logits,{FEATURES}"
    return exported(workdir, "trained", "--config.target=trt10", f"--config.checkpoint={checkpoint}", outputs)


def main(argv: list[str]) -> None:
    """Measures every case."""
    from vit_convert.core.compare import top1_accuracy

    folder, workdir = pathlib.Path(_FOLDER.value), pathlib.Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    graph, features = export(folder, workdir), FEATURES
    judged, _ = read_images(folder / "judge.zip")
    digits, names = read_images(folder / "heldout.zip", _HELD_OUT.value)
    labels = np.array([int(name.partition("/")[0]) for name in names])
    results = Results(_OUTPUT.value or RESULTS / f"int8-trained-{today()}.json", first_paragraph(__doc__))
    exact = functools.cache(lambda: run(graph, judged, features)[0])
    score = functools.partial(top1_accuracy, labels=labels)
    if not results.has(case="fp32"):
        results.add(
            case="fp32",
            cosine_min=1.0,
            cosine_mean=1.0,
            top1=score(run(graph, digits, features)[1]),
            images=len(digits),
        )
    for case, options in CASES.items():
        if results.has(case=case) or (_CASES.value and case not in _CASES.value):
            continue
        output = workdir / "quantized.onnx"
        chosen = {**options}
        calibration_images, _ = read_images(folder / chosen.pop("images", "calibration.zip"))
        calibration, seconds = quantized(graph, calibration_images, output, **chosen)
        got = run(output, judged, features)[0]
        cosines = (got * exact()).sum(1) / (np.linalg.norm(got, axis=1) * np.linalg.norm(exact(), axis=1))
        results.add(
            case=case,
            cosine_min=float(cosines.min()),
            cosine_mean=float(cosines.mean()),
            top1=score(run(output, digits, features)[1]),
            images=len(digits),
            tensors=len(calibration.thresholds),
            widened=len(calibration.widened()),
            left_out=len(calibration.left_out),
            shifted=len(calibration.shifts),
            calibration_cpu_seconds=round(seconds, 1),
        )
        print(results.record["runs"][-1], flush=True)


if __name__ == "__main__":
    app.run(main)
