"""Trains `vit_digits.npz`, the small vision transformer that ships with the project, on real handwritten digits.

    python checkpoints/train_digits.py --output=checkpoints

takes some minutes on 2 cores and writes the checkpoint (the on-disk layout of google-research/vision_transformer), its
held-out and calibration images, and `vit_digits.json` with the accuracy of the file, loaded again. Needs `pip install
scikit-learn optax pillow` beside jax and flax. `--validate` scores the settings on a fifth of the training part
instead, and writes nothing: it chose them, so the held-out quarter was looked at once.
"""

import datetime
import functools
import io
import json
import pathlib
import platform
import shlex
import sys
import time
import zipfile
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL
import sklearn
from absl import app, flags
from flax.traverse_util import flatten_dict
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from vit_convert.core.bundle import hash_file
from vit_convert.core.compare import top1_accuracy
from vit_convert.families.load import load_checkpoint
from vit_convert.families.vit.architecture import Architecture
from vit_convert.families.vit.layouts import Layout, stored_name
from vit_convert.families.vit.model import vit_model
from vit_convert.families.vit.module import ViT
from vit_convert.images.preprocess import preprocess_for

SIZE, CLASSES = 32, 10
ARCHITECTURE = Architecture(
    "vit",
    "custom",
    width=96,
    depth=6,
    mlp_dim=384,
    num_heads=3,
    patch_size=8,
    image_size=(SIZE, SIZE),
    num_classes=CLASSES,
    pool="tok",
)
HELD_OUT, CALIBRATION = 450, 256
BATCH, LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING, WARMUP_EPOCHS, EMA_DECAY = 64, 1e-3, 0.05, 0.1, 10, 0.998

PREPROCESS = preprocess_for("vit_jax", (SIZE, SIZE))

_OUTPUT = flags.DEFINE_string(
    "output", str(pathlib.Path(__file__).parent), "Folder for vit_digits.npz, vit_digits.json and digits/."
)
_EPOCHS = flags.DEFINE_integer("epochs", 200, "Passes over the training part.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the splits, the parameters, the order and the augmentation.")
_VALIDATE = flags.DEFINE_bool(
    "validate", False, "Score the settings on a fifth of the training part, held-out images untouched."
)

Params = dict[str, Any]


def forward(params: Params, images: jax.Array) -> jax.Array:
    """[batch, 32, 32, 3] in [-1, 1] -> [batch, 10] logits; the class token has its own row of the position table, as on
    disk."""
    canonical = params["vit"] | {"cls": params["vit"]["cls"] + params["class_row"]}
    return ViT(ARCHITECTURE).apply({"params": canonical}, images)[0]


def on_disk(params: Params) -> dict[str, np.ndarray]:
    """The parameters under the names of files written before Flax Linen."""
    leaves = {
        stored_name(name, Layout.VIT_JAX): np.asarray(leaf)
        for name, leaf in flatten_dict(params["vit"], sep="/").items()
    }
    table = stored_name("pos_embedding", Layout.VIT_JAX)
    return leaves | {table: np.concatenate([params["class_row"], leaves[table]], axis=1)}


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 scans, 8x8 with 17 levels, as uint8 [N, 32, 32, 3], and their labels [N]."""
    data = load_digits()
    small = np.rint(data.images * (255 / 16)).astype(np.uint8)
    large = np.stack(
        [np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for image in small]
    )
    return np.repeat(large[..., None], 3, axis=-1), data.target


def augment(rng: jax.Array, images: jax.Array) -> jax.Array:
    """Shifts, turns, shears and scales each image a little about its centre; [batch, 32, 32, 3] uint8 -> float32, still
    0..255."""

    def one(rng: jax.Array, image: jax.Array) -> jax.Array:
        turn, shear, tall, wide, down, right = jax.random.uniform(rng, (6,), minval=-1.0, maxval=1.0)
        angle = turn * np.deg2rad(12)
        rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
        matrix = rotation @ jnp.array([[1 + 0.12 * tall, 0.0], [0.15 * shear, 1 + 0.12 * wide]])
        centred = jnp.stack(jnp.meshgrid(jnp.arange(SIZE), jnp.arange(SIZE), indexing="ij")) - (SIZE - 1) / 2
        source = (
            jnp.einsum("ij,jhw->ihw", matrix, centred) + (SIZE - 1) / 2 + 3.0 * jnp.array([down, right])[:, None, None]
        )
        grey = jax.scipy.ndimage.map_coordinates(image[..., 0].astype(jnp.float32), list(source), order=1)
        return jnp.repeat(grey[..., None], 3, axis=-1)

    return jax.vmap(one)(jax.random.split(rng, len(images)), images)


def train(images: np.ndarray, labels: np.ndarray, epochs: int, seed: int) -> Params:
    """Trains on all the images given, a fixed number of epochs, and returns the moving average of the parameters."""
    steps, rng = len(images) // BATCH, jax.random.key(seed)
    params = {
        "vit": ViT(ARCHITECTURE).init(rng, jnp.zeros((1, SIZE, SIZE, 3)))["params"],
        "class_row": jax.random.normal(jax.random.fold_in(rng, 1), (1, 1, ARCHITECTURE.width))
        * ARCHITECTURE.width**-0.5,
    }
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, WARMUP_EPOCHS * steps, epochs * steps)
    kernels = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=WEIGHT_DECAY, mask=kernels)
    )

    def loss(params: Params, rng: jax.Array, batch: jax.Array, target: jax.Array) -> jax.Array:
        logits = forward(params, augment(rng, batch) * PREPROCESS.scale + PREPROCESS.offset)
        return optax.softmax_cross_entropy(
            logits, optax.smooth_labels(jax.nn.one_hot(target, CLASSES), LABEL_SMOOTHING)
        ).mean()

    @jax.jit
    def epoch(state: Any, rng: jax.Array) -> tuple[Any, jax.Array]:
        order = jax.random.permutation(rng, len(images))[: steps * BATCH].reshape(steps, BATCH)

        def step(state: Any, chosen: jax.Array) -> tuple[Any, jax.Array]:
            params, average, moments, count = state
            value, gradient = jax.value_and_grad(loss)(
                params, jax.random.fold_in(rng, count), jnp.asarray(images)[chosen], jnp.asarray(labels)[chosen]
            )
            updates, moments = optimizer.update(gradient, moments, params)
            params = optax.apply_updates(params, updates)
            return (params, optax.incremental_update(params, average, 1 - EMA_DECAY), moments, count + 1), value

        state, losses = jax.lax.scan(step, state, order)
        return state, losses.mean()

    state = (params, params, optimizer.init(params), 0)
    for i in range(epochs):
        state, value = epoch(state, jax.random.fold_in(rng, i))
        if (i + 1) % 20 == 0:
            print(f"epoch {i + 1}/{epochs}: training loss {float(value):.4f}", flush=True)
    return state[1]


def write_images(path: pathlib.Path, images: np.ndarray, labels: np.ndarray, ids: np.ndarray) -> None:
    """Writes PNGs as `<label>/<row of the data set>.png` into one archive, the same bytes each time."""
    with zipfile.ZipFile(path, "w") as archive:
        for image, label, row in sorted(zip(images, labels, ids), key=lambda item: (item[1], item[2])):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG", optimize=True)
            archive.writestr(zipfile.ZipInfo(f"{label}/{row:04d}.png"), png.getvalue())


def main(argv: list[str]) -> None:
    """Splits, trains, saves, and scores what it saved."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    start, seed = time.perf_counter(), _SEED.value
    images, labels = digits()
    rest, held_out = train_test_split(np.arange(len(images)), test_size=HELD_OUT, stratify=labels, random_state=seed)
    if _VALIDATE.value:
        rest, held_out = train_test_split(rest, test_size=0.2, stratify=labels[rest], random_state=seed)
    params = train(images[rest], labels[rest], _EPOCHS.value, seed)
    seconds = time.perf_counter() - start
    if _VALIDATE.value:
        logits = np.asarray(forward(params, jnp.asarray(PREPROCESS.normalize(images[held_out]))))
        print(
            f"validation top-1 {top1_accuracy(logits, labels[held_out]):.2f} % of {len(held_out)}, after "
            f"{seconds:.0f} s"
        )
        return

    folder = pathlib.Path(_OUTPUT.value)
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "vit_digits.npz"
    np.savez(checkpoint, allow_pickle=False, **on_disk(params))
    _, calibration = train_test_split(rest, test_size=CALIBRATION, stratify=labels[rest], random_state=seed)
    archives = {"heldout": held_out, "calibration": calibration}
    for name, chosen in archives.items():
        write_images(folder / "digits" / f"{name}.zip", images[chosen], labels[chosen], chosen)

    saved = load_checkpoint(checkpoint)
    model = vit_model(saved.architecture, saved.params)
    correct = {
        name: top1_accuracy(model.run(PREPROCESS.normalize(images[chosen]))["logits"], labels[chosen])
        for name, chosen in {"held_out": held_out, "training": rest}.items()
    }
    record = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "checkpoints/train_digits.py", *sys.argv[1:]]),
        "seed": seed,
        "epochs": _EPOCHS.value,
        "training_seconds": round(seconds),
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (jax, flax, optax, np, sklearn, PIL)},
        "num_params": saved.num_params,
        "images": {"training": len(rest), "held_out": len(held_out), "calibration": len(calibration)},
        "top1_percent": {name: round(value, 2) for name, value in correct.items()},
        "preprocess": PREPROCESS.to_dict(),
        "sha256": {checkpoint.name: hash_file(checkpoint)}
        | {f"digits/{name}.zip": hash_file(folder / "digits" / f"{name}.zip") for name in archives},
    }
    (folder / "vit_digits.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{checkpoint}: top-1 {correct['held_out']:.2f} % of {len(held_out)} held-out images, after {seconds:.0f} s")


if __name__ == "__main__":
    app.run(main)
