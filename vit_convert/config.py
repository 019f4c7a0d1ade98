"""What is asked for: the defaults, the rules a config must meet, and where config files are found."""

import os
import pathlib
import re
from typing import Any

import ml_collections
from ml_collections import config_dict

from vit_convert.errors import UsageError, nearest

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8")
TARGETS = ("auto", "trt8", "trt10", "trt11", "rtx")
BACKENDS = ("auto", "tensorrt", "rtx", "none")
METHODS = ("entropy", "minmax", "percentile")
LAYOUTS = ("NHWC", "NCHW")
OUTPUTS = ("logits", "features")
_CHOICES = {
    "target": TARGETS,
    "engine.backend": BACKENDS,
    "calibration.method": METHODS,
    "layout": LAYOUTS,
    "outputs": OUTPUTS,
}


def default_config() -> ml_collections.ConfigDict:
    """Every key with its default; a config file changes what it needs.

    Returns:
        A locked ConfigDict. Setting an unknown key is an error that names the nearest valid ones.
    """
    config = ml_collections.ConfigDict()
    config.name = ""  # name of the bundle folder; empty: the config file's
    config.checkpoint = ""  # .npz or .safetensors, a path or an https:// or gs:// address
    config.family = "auto"  # read from the file; a given one is checked against it
    config.variant = "auto"  # "B/32", "ViT-B_32", …; read from the file; a given one is checked against it
    config.model = config_dict.placeholder(object)  # a user's own model: a function returning (module, variables)
    config.image_size = config_dict.placeholder(object)  # 224, (height, width) or "224x384"; empty: the checkpoint's
    config.posemb_grid = config_dict.placeholder(tuple)  # (rows, columns) of a stored position table that is not square
    config.preprocess = "auto"  # vit_jax, big_vision, imagenet, …: how images become inputs; auto: the checkpoint family's
    config.layout = "NHWC"  # order of the `images` input's axes
    config.outputs = "logits"  # "features" drops the head
    config.taps = False  # keep block_00 … encoder_norm as outputs of model.onnx
    config.num_classes = 0  # checked against the checkpoint's head; 0: whatever it has
    config.quantize_only = ()  # block names and patterns that int8 is limited to; empty: all encoder linears
    config.keep_fp16 = ()  # block names and patterns that int8 leaves in fp16
    config.precision = "fp16"  # comma-separated; int8 and fp8 always build fp16 beside them
    config.target = "auto"  # the TensorRT generation the graph is written for; auto: the backend's
    config.keep_fp32 = ()  # block names and patterns that stay in fp32: ("block_11", "head*")

    config.batch = ml_collections.ConfigDict()
    config.batch.min = 1
    config.batch.opt = 8
    config.batch.max = 64

    config.calibration = ml_collections.ConfigDict()
    config.calibration.data = ""  # folder, .zip, .npz or list file; empty: seeded noise, good for speed alone
    config.calibration.method = "entropy"
    config.calibration.num_images = 512
    config.calibration.batch_size = 8
    config.calibration.attention = False  # quantize the attention products too

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.data = ""  # labelled images; empty: no accuracy is measured
    config.evaluation.num_images = 0  # 0: all

    config.check = ml_collections.ConfigDict()
    config.check.num_images = 4  # images in reference.npz; the largest batch onnxruntime is checked with
    config.check.atol = 1e-6  # fp32: max_abs <= atol + rtol * scale of the output, for the output and for every block
    config.check.rtol = 1e-4
    config.check.cosine = 0.99999
    config.check.fp16_cosine = 0.999  # against JAX fp32, for the output
    config.check.int8_cosine = 0.98
    config.check.max_top1_drop = 1.0  # points of top-1 that a lower precision may lose, where labels are given

    config.engine = ml_collections.ConfigDict()
    config.engine.backend = "auto"  # tensorrt with a GPU, else rtx; none stops after ONNX
    config.engine.workspace_gib = 4.0
    config.engine.timing_cache = ""  # a file kept between builds; empty: one in the workdir
    config.engine.opt_level = 3
    config.engine.tf32 = False
    config.engine.calibrator = False  # INT8 by TensorRT's own calibrator (TensorRT 10 and earlier) instead of Q/DQ

    config.benchmark = ml_collections.ConfigDict()
    config.benchmark.batches = (1, 8, 64)
    config.benchmark.streams = (1, 2)
    config.benchmark.seconds = 3.0
    return config.lock()


def complete(given: Any, name: str, *, check: bool = True) -> ml_collections.ConfigDict:
    """Lays a user's config over the defaults and checks every value.

    Args:
        given: what the config file's get_config() returned; may hold a part of the keys.
        name: used for an empty `name`.
        check: refuse values out of range too; False where overrides are still to come.

    Returns:
        The full, locked config.

    Raises:
        UsageError: an unknown key, a wrong type, or a value out of range.
    """
    if not isinstance(given, ml_collections.ConfigDict):
        raise UsageError(f"get_config() returned {type(given).__name__}, it must return a ConfigDict")
    config = default_config()
    _overlay(config, given, "")
    config.name = config.name or name
    if check:
        check_values(config)
    return config


def _overlay(config: ml_collections.ConfigDict, given: ml_collections.ConfigDict, path: str) -> None:
    for key in given:
        if key not in config:
            raise UsageError(f"config.{path}{key}: unknown key.{nearest(key, config.keys())}", fix="See --help for the keys.")
        value = given[key]
        if isinstance(config[key], ml_collections.ConfigDict):
            if not isinstance(value, ml_collections.ConfigDict):
                raise UsageError(f"config.{path}{key}: {value!r} is not a group of keys")
            _overlay(config[key], value, f"{path}{key}.")
            continue
        try:
            if isinstance(config[key], float) and isinstance(value, int):
                value = float(value)
            if isinstance(config[key], tuple) and isinstance(value, list | tuple):
                value = tuple(value)
            config[key] = value
        except (TypeError, ValueError) as e:
            raise UsageError(f"config.{path}{key}: {value!r} is a {type(value).__name__}, expected {type(config[key]).__name__}") from e


def check_values(config: ml_collections.ConfigDict) -> None:
    """Refuses values out of range, naming key and value.

    Raises:
        UsageError: see above.
    """
    for key, valid in _CHOICES.items():
        value = config
        for part in key.split("."):
            value = value[part]
        if value not in valid:
            raise UsageError(f"config.{key}={value!r}: not one of {', '.join(valid)}.{nearest(str(value), valid)}")
    precisions(config)
    image_size(config)
    batch = config.batch
    if not 1 <= batch.min <= batch.opt <= batch.max:
        raise UsageError(f"config.batch: min {batch.min}, opt {batch.opt}, max {batch.max} must rise from 1")
    if not config.checkpoint and config.model is None:
        raise UsageError("config.checkpoint is empty", fix="Give a file, an https:// or gs:// address, or config.model.")
    if not re.fullmatch(r"[\w.+-]+", config.name):
        raise UsageError(f"config.name={config.name!r}: letters, digits, '.', '_', '+' and '-' only, it names a folder")
    for key in ("check.num_images", "calibration.num_images", "calibration.batch_size"):
        group, field = key.split(".")
        if config[group][field] < 1:
            raise UsageError(f"config.{key}={config[group][field]}: must be at least 1")


def precisions(config: ml_collections.ConfigDict) -> list[str]:
    """The precisions to build, in order; INT8 and FP8 bring FP16 along to be compared with.

    Raises:
        UsageError: an unknown precision.
    """
    asked = [word.strip() for word in config.precision.split(",") if word.strip()]
    for word in asked or [""]:
        if word not in PRECISIONS:
            raise UsageError(f"config.precision={config.precision!r}: {word!r} is not one of {', '.join(PRECISIONS)}.{nearest(word, PRECISIONS)}")
    if {"int8", "fp8"} & set(asked):
        asked.append("fp16")
    return [word for word in PRECISIONS if word in asked]


def image_size(config: ml_collections.ConfigDict) -> tuple[int, int] | None:
    """The (height, width) asked for, None for the checkpoint's own.

    Raises:
        UsageError: it cannot be read as one or two positive numbers.
    """
    value = config.image_size
    if value is None or value == "":
        return None
    numbers = re.findall(r"\d+", value) if isinstance(value, str) and re.fullmatch(r"\s*\d+(\s*[x,]\s*\d+)?\s*", value) else value
    numbers = [numbers] if isinstance(numbers, int) and not isinstance(numbers, bool) else numbers
    try:
        sizes = [int(n) for n in numbers]
    except (TypeError, ValueError):
        sizes = []
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise UsageError(f"config.image_size={value!r}: expected 224, (224, 384) or '224x384'")
    return (sizes[0], sizes[-1])


def find_config(given: str) -> str:
    """Finds a config file: as given, then in `configs/` here, then among those that come with the project.

    Args:
        given: a path or a bare name such as "vit_b32.py" or "vit_b32".

    Returns:
        The path of an existing file.

    Raises:
        UsageError: there is none; the message names the nearest ones.
    """
    package = pathlib.Path(__file__).parent
    folders = [pathlib.Path(), pathlib.Path("configs"), package.parent / "configs", package / "configs"]
    for folder in folders:
        for name in (given, f"{given}.py"):
            if (folder / name).is_file():
                return os.fspath(folder / name)
    names = sorted({path.name for folder in folders[1:] if folder.is_dir() for path in folder.glob("*.py")})
    raise UsageError(f"--config={given}: no such file here or in configs/.{nearest(given, names)}", fix=f"Configs at hand: {', '.join(names)}")
