"""The rules that a config must meet, and what it means to the stages."""

import os
import re
from typing import Any

import ml_collections

from vit_convert.core.config_ranges import check_ranges
from vit_convert.core.defaults import default_config
from vit_convert.core.dialect import DIALECTS, Dialect
from vit_convert.core.errors import UsageError, nearest
from vit_convert.core.image_size import is_range, parse_range, parse_size
from vit_convert.core.pair import TOWERS
from vit_convert.core.presets import apply_preset
from vit_convert.core.renamed import current
from vit_convert.core.text_length import parse_text_length
from vit_convert.core.tower_config import given_keys, tower_config

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8")
AUTO = "auto"  # as a precision: as the plan says; as a lowering: as the export advises
BACKENDS = ("auto", "tensorrt", "rtx", "none")
METHODS = ("entropy", "entropy_plain", "minmax", "percentile", "mse")
DEVICES = (AUTO, "cpu", "cuda")  # devices that can run the graph during calibration
LAYOUTS = ("NHWC", "NCHW")
INPUTS = ("float32", "uint8")
# of a checkpoint's model, in this order, in whatever order they are asked for
OUTPUTS = ("logits", "embedding", "features", "tokens", "grid", "class_tokens")
QUANTIZED = ("int8", "fp8")
_CHOICES = {
    "target": (AUTO, *DIALECTS),
    "engine.backend": BACKENDS,
    "calibration.method": METHODS,
    "calibration.device": DEVICES,
    "layout": LAYOUTS,
    "input": INPUTS,
    "plan.type": QUANTIZED,
    "engine.int8_lowering": (AUTO, "", *(name for dialect in DIALECTS.values() for name in dialect.int8_lowerings)),
}


def complete(given: Any, name: str, *, check: bool = True) -> ml_collections.ConfigDict:
    """Lays a user's config over the defaults and checks every value.

    Args:
        given: what the config file's get_config() returned; may lack keys.
        name: used for an empty `name`.
        check: also refuse values out of range; False if overrides are still to come.

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
    for given_key in given:
        key = current(given_key)
        if key not in config:
            raise UsageError(
                f"config.{path}{key}: unknown key.{nearest(key, config.keys())}", fix="See --help for the keys."
            )
        value = given[given_key]
        if isinstance(config[key], ml_collections.ConfigDict):
            if not isinstance(value, ml_collections.ConfigDict):
                raise UsageError(f"config.{path}{key}: {value!r} is not a group of keys")
            _overlay(config[key], value, f"{path}{key}.")
            continue
        if value is None and isinstance(config[key], str):
            value = ""  # no name, no data
        # ml_collections lets any key be set to None, but refuses to read it afterwards
        if value is None and config[key] is not None:
            raise UsageError(f"config.{path}{key}: None, expected {type(config[key]).__name__}")
        try:
            if isinstance(config[key], float) and isinstance(value, int):
                value = float(value)
            if isinstance(config[key], tuple) and isinstance(value, list | tuple):
                value = tuple(value)
            config[key] = value
        except OverflowError as e:
            raise UsageError(f"config.{path}{key}: a whole number that is too large for a float") from e
        except TypeError as e:
            raise UsageError(
                f"config.{path}{key}: {value!r} is a {type(value).__name__}, expected {config.get_type(key).__name__}"
            ) from e


def check_values(config: ml_collections.ConfigDict) -> None:
    """Applies the preset, and refuses values out of range, naming key and value.

    Raises:
        UsageError: see above.
    """
    apply_preset(config)
    for key, valid in _CHOICES.items():
        value = config
        for part in key.split("."):
            value = value[part]
        if value not in valid:
            listed = ", ".join(choice or "'' (empty)" for choice in valid)
            raise UsageError(f"config.{key}={value!r}: not one of {listed}.{nearest(str(value), valid)}")
    if config.model is None or not config.outputs:  # a user's own model names its own outputs
        read_outputs(config.outputs)
    check_ranges(config)
    _check_model(config)
    require_dialect(config, DIALECTS.get(config.target))
    image_size(config)
    if parse_text_length(config.text_length) is not None and config.model is not None:
        raise UsageError(f"config.text_length={config.text_length!r} beside config.model", fix="Leave it out.")
    require_resizable(config, "a model given as config.model is traced at one size" if config.model is not None else "")
    if config.engine.calibrator and (config.input == "uint8" or is_dynamic(config)):
        raise UsageError(
            f"config.engine.calibrator with input={config.input} and image_size={config.image_size}: "
            "TensorRT's own calibrator takes float32 images of one size",
            fix="Leave engine.calibrator off: INT8 is then written into the graph.",
        )
    if config.engine.calibrator and config.calibration.method in ("percentile", "mse"):
        raise UsageError(
            f"config.engine.calibrator with calibration.method={config.calibration.method}: TensorRT calibrates by "
            "entropy or minmax",
            fix="Use entropy (our guarded thresholds), entropy_plain or minmax (its own), or leave engine.calibrator "
            "off.",
        )
    changed = [f"calibration.{key}" for key in ("smooth", "rotate") if config.calibration[key]]
    if config.engine.calibrator and changed:
        raise UsageError(
            f"config.engine.calibrator with {' and '.join(changed)}: TensorRT's own calibrator builds from model.onnx, "
            "whose weights are the checkpoint's",
            fix=f"Leave {' and '.join(changed)} out, or engine.calibrator.",
        )
    if config.engine.int8_lowering not in (AUTO, "") and not may_be_lowered(config):
        raise UsageError(
            f"config.engine.int8_lowering={config.engine.int8_lowering!r}: its ranges come from one calibration of "
            "the whole encoder",
            fix="Leave engine.calibrator, calibration.smooth and plan.file out, or engine.int8_lowering empty; "
            "keep_fp16 names layers that stay out of int8.",
        )
    batch = config.batch
    if not 1 <= batch.min <= batch.opt <= batch.max:
        raise UsageError(f"config.batch: min {batch.min}, opt {batch.opt}, max {batch.max} must rise from 1")
    _check_tuples(config)
    _check_towers(config)
    if not config.checkpoint and config.model is None:
        raise UsageError(
            "config.checkpoint is empty", fix="Give a file, an https:// or gs:// address, or config.model."
        )
    # No "..", hidden folder or flag; and the name with its suffixes must fit into a file system's 255 bytes.
    if not re.fullmatch(r"\w[\w.+-]*", config.name) or len(os.fsencode(config.name)) > 200:
        raise UsageError(
            f"config.name={config.name!r}: at most 200 letters, digits, '.', '_', '+' and '-', of which the first is "
            "a letter or digit",
            fix="It names a folder in --workdir.",
        )
    if config.plan.file and not os.path.isfile(config.plan.file):
        raise UsageError(
            f"config.plan.file={config.plan.file!r}: no such file", fix="config.precision=auto writes one."
        )


def of_tower(config: ml_collections.ConfigDict, tower: str) -> ml_collections.ConfigDict:
    """The config by which one tower of a pair is converted, checked.

    Args:
        config: the full config of the pair.
        tower: "image" or "text".

    Raises:
        UsageError: a value out of range; the message names its key in `config.image` or `config.text`.
    """
    try:
        found = tower_config(config, tower, default_config())
        check_values(found)
    except UsageError as e:
        raise UsageError(f"config.{tower}: {e}", fix=e.fix) from e
    return found


def read_outputs(asked: str) -> tuple[str, ...]:
    """The outputs named in `config.outputs`, in the order of `OUTPUTS`; () for "auto".

    Args:
        asked: one name, or several separated by commas.

    Raises:
        UsageError: a name is unknown.

    Example:
        >>> read_outputs("tokens, logits")
        ('logits', 'tokens')
    """
    names = [name.strip() for name in asked.split(",")]
    if names == [AUTO]:
        return ()
    for name in names:
        if name not in OUTPUTS:
            valid = (AUTO, *OUTPUTS)
            raise UsageError(
                f"config.outputs={asked!r}: {name!r} is not one of {', '.join(valid)}.{nearest(name, valid)}",
                fix="Use auto, or known names separated by commas.",
            )
    return tuple(name for name in OUTPUTS if name in names)


def _check_towers(config: ml_collections.ConfigDict) -> None:
    given = {tower: given_keys(config, tower) for tower in TOWERS}
    if config.model is not None and any(given.values()):
        raise UsageError(
            "config.model is not a pair, and config.image or config.text has keys", fix="Set the common keys."
        )
    for tower, keys in given.items():
        if keys:
            of_tower(config, tower)


def _check_model(config: ml_collections.ConfigDict) -> None:
    """Refuses checkpoint keys together with `config.model`, which has no checkpoint: no value that a user gives is
    ignored."""
    if config.model is None:
        return
    defaults = default_config()
    for key in ("checkpoint", "family", "families", "variant", "posemb_grid"):
        if config[key] != defaults[key]:
            raise UsageError(
                f"config.model and config.{key}={config[key]!r}: an own model comes with its parameters, and no "
                "checkpoint is read",
                fix=f"Leave one of them out; let the function in config.model read {config.checkpoint}."
                if key == "checkpoint"
                else f"Leave config.{key} out.",
            )


def _check_tuples(config: ml_collections.ConfigDict) -> None:
    """Refuses mistyped tuples, which the command line turns from a,b into ('a,b',)."""
    for key in ("batches", "streams"):
        if not config.benchmark[key]:
            raise UsageError(
                f"config.benchmark.{key}=(): holds no number", fix=f'For example --config.benchmark.{key}="(1,8)".'
            )
    grid: Any = config.posemb_grid
    if grid is not None and len(grid) != 2:
        raise UsageError(
            f"config.posemb_grid={grid!r}: expected (rows, columns)", fix='For example --config.posemb_grid="(7,9)".'
        )
    examples = dict.fromkeys(("keep_fp32", "keep_fp16", "quantize_only"), "('block_11','head*')")
    examples |= {"lowerings": "('matmul','primitives')", "families": "('my_module:FAMILY','mine.py:FAMILY')"}
    for key, example in examples.items():
        names: Any = config[key]
        if not all(isinstance(name, str) and re.fullmatch(r"[^\s,()'\"]+", name) for name in names):
            raise UsageError(
                f"config.{key}={names!r}: names and patterns only", fix=f'For example --config.{key}="{example}".'
            )


def as_plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as `config.json` holds it: all values, and for `config.model` the function's name, file and hash."""
    from vit_convert.core.user_code import describe_function

    return {
        **config.to_dict(),
        "model": describe_function(config.model) if callable(config.model) else config.to_dict()["model"],
    }


def precisions(config: ml_collections.ConfigDict) -> list[str]:
    """The precisions to build, in order; INT8 and FP8 also build FP16, for comparison.

    Raises:
        UsageError: an unknown precision.
    """
    asked = [word.strip() for word in config.precision.split(",") if word.strip()]
    known = (*PRECISIONS, AUTO)
    for word in asked or [""]:
        if word not in known:
            raise UsageError(
                f"config.precision={config.precision!r}: {word!r} is not one of "
                f"{', '.join(known)}.{nearest(word, known)}"
            )
    if AUTO in asked:
        asked.append(config.plan.type)
    if set(QUANTIZED) & set(asked):
        asked.append("fp16")
    return [word for word in PRECISIONS if word in asked]


def quantized(config: ml_collections.ConfigDict) -> list[str]:
    """The precisions that need calibration."""
    return [precision for precision in precisions(config) if precision in QUANTIZED]


def may_be_lowered(config: ml_collections.ConfigDict) -> bool:
    """Whether int8 engines can be built from a lowering, whose ranges come from one calibration of the encoder."""
    return not (config.engine.calibrator or config.calibration.smooth or config.plan.file)


def is_planned(config: ml_collections.ConfigDict) -> bool:
    """Whether measurements choose the layers to quantize."""
    return AUTO in (word.strip() for word in config.precision.split(","))


def require_dialect(config: ml_collections.ConfigDict, dialect: Dialect | None) -> None:
    """Refuses precisions that a TensorRT does not have.

    Args:
        config: the full config.
        dialect: of that TensorRT; None if it is not known yet.

    Raises:
        UsageError: see above, or an unknown precision.
    """
    asked = precisions(config)
    missing = set(asked).difference(dialect.precisions) if dialect is not None else set()
    if dialect is not None and missing:
        raise UsageError(
            f"config.precision={config.precision}: target {dialect.name} has no {', '.join(sorted(missing))}",
            fix="Use int8 or fp16, or TensorRT 10 or later (config.target=trt10).",
        )
    if is_planned(config) and config.engine.calibrator:
        raise UsageError(
            "config.precision=auto: TensorRT's own calibrator quantizes what it likes",
            fix="Set config.engine.calibrator=False.",
        )


def is_dynamic(config: ml_collections.ConfigDict) -> bool:
    """Whether height and width vary at run time."""
    return is_range(config.image_size)


def require_resizable(config: ml_collections.ConfigDict, one_size: str) -> None:
    """Refuses a range of image sizes for a model that takes one size only.

    Args:
        config: the full config.
        one_size: why it takes one size, such as "family mixer has one size"; "" if it takes a range.

    Raises:
        UsageError: see above.
    """
    if is_dynamic(config) and one_size:
        raise UsageError(
            f"config.image_size={config.image_size!r}: {one_size}; only ViTs take a range, by resampling their "
            "position table. Mixer and Swin cannot: their weights fix the number of tokens.",
            fix="Give one size, such as 224x384.",
        )


def image_size(config: ml_collections.ConfigDict) -> tuple[int, int] | None:
    """The one (height, width) that the config gives; None if it gives none, or a range.

    Raises:
        UsageError: it cannot be read as one or two positive numbers, or as a range.
    """
    if is_dynamic(config):
        parse_range(config.image_size)
        return None
    return parse_size(config.image_size)
