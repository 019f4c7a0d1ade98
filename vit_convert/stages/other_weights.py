"""Graphs with other weights that compute the same function, and are easier to quantize: what the calibrate stage
measures and the later ones start from."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_convert.core import chosen_lowering
from vit_convert.core.errors import UsageError
from vit_convert.core.pipeline import Context
from vit_convert.core.stage_results import Rotated, Smoothed
from vit_convert.stages.common import dialect_for, prepare

if TYPE_CHECKING:
    import onnx_ir as ir

    from vit_convert.quantize.placement import Site

SMOOTHED = "smooth"  # the fp32 graph after a rotation and SmoothQuant, `model.smooth.onnx`
_STRENGTH = 0.5  # of SmoothQuant in a lowering whose ranges are measured here: it changes weights and costs no time


@dataclasses.dataclass(frozen=True)
class Changed:
    """What was done to the weights of model.onnx.

    Attributes:
        rotated: None where they were not.
        smoothed: None where they were not.
    """

    rotated: Rotated | None = None
    smoothed: Smoothed | None = None

    def summary_of(self, rotated: Rotated | None) -> str:
        """For people, with what was rotated in model.onnx or in a lowering; "" where nothing was done."""
        parts = []
        if rotated:
            widths = " and ".join(str(width) for width in rotated.widths)
            parts.append(f", residual stream of {widths} channels rotated, {rotated.num_norms} LayerNorms")
        if self.smoothed:
            parts.append(f", {self.smoothed.num_norms} LayerNorms smoothed")
        return "".join(parts)


def unquantized(context: Context) -> str:
    """The lowering without Q/DQ that int8 engines are built from; "" if they are built from the Q/DQ graph."""
    export = context.results.get("export")
    advised = export.int8_lowering if export is not None else ""
    return chosen_lowering.int8_lowering(context.config, dialect_for(context), advised)


def changes_weights(context: Context) -> bool:
    """Whether quantization starts from other weights than model.onnx has. A lowering without Q/DQ has its own."""
    calibration = context.config.calibration
    return bool(calibration.smooth) or (bool(calibration.rotate) and not unquantized(context))


def source_graph(context: Context) -> pathlib.Path:
    """The fp32 graph that is quantized."""
    return context.bundle.onnx(SMOOTHED if changes_weights(context) else "fp32")


def change_weights(context: Context, model: "ir.Model", sites: Sequence["Site"], images: np.ndarray) -> Changed:
    """Writes `model.smooth.onnx` if the config asks for other weights; the quantize stage checks it against JAX like
    the fp32 graph.

    Args:
        context: of the conversion.
        model: model.onnx.
        sites: what may be quantized.
        images: for calibration.
    """
    if not changes_weights(context):
        return Changed()
    source, rotated = context.bundle.onnx(), None
    if context.config.calibration.rotate:
        source = context.bundle.onnx(SMOOTHED)
        model, rotated = _rotate(model, source)
    smoothed = _smooth(context, model, source, sites, images) if context.config.calibration.smooth else None
    return Changed(rotated, smoothed)


def even_out(
    context: Context, source: pathlib.Path, path: pathlib.Path, linears: Sequence["Site"], images: np.ndarray
) -> Rotated | None:
    """Writes a lowering with other weights: the channels of what LayerNorms and attention write in INT8 then reach
    about equally far.

    Args:
        context: of the conversion.
        source: the lowering.
        path: what is written.
        linears: whose inputs are quantized.
        images: for calibration.

    Returns:
        What was rotated; None if that was not asked for.
    """
    import onnx_ir as ir

    from vit_convert.core.onnx_file import save_onnx
    from vit_convert.quantize.activation_max import extremes, magnitudes
    from vit_convert.quantize.equalize import attention_inputs, equalize
    from vit_convert.quantize.smooth import find_norms, smooth

    model, rotated = ir.load(source), None
    if context.config.calibration.rotate:
        source = path
        model, rotated = _rotate(model, path)
    norms = [norm.tensor for norm in find_norms(model, linears)[0]]
    found = extremes(source, [*norms, *attention_inputs(model)], _batches(context, images), per_channel=True)
    amax = magnitudes({name: found[name] for name in norms})
    model = smooth(model, linears, amax, strength=_STRENGTH).model
    equalize(model, found)
    save_onnx(model, path)
    return rotated


def _rotate(model: "ir.Model", path: pathlib.Path) -> tuple["ir.Model", Rotated]:
    """Writes a model with its stream rotated, and reads it again."""
    import onnx_ir as ir

    from vit_convert.core.onnx_file import save_onnx
    from vit_convert.quantize.rotate import rotate_streams

    result = rotate_streams(model)
    if not result.widths:
        why = "; ".join(dict.fromkeys(result.declined.values())) or "it has no LayerNorm"
        raise UsageError(
            f"config.calibration.rotate: the model has no residual stream that can be rotated: {why}",
            fix="Leave it out. It is for transformers whose blocks normalize what they read: ViT, DINOv2, SigLIP.",
        )
    rotated = Rotated(
        widths=result.widths, num_norms=len(result.norms), products=result.products, declined=result.declined
    )
    save_onnx(result.model, path)
    return ir.load(path), rotated


def _smooth(
    context: Context, model: "ir.Model", source: pathlib.Path, sites: Sequence["Site"], images: np.ndarray
) -> Smoothed:
    """Smooths a model, whose file is `source`, into `model.smooth.onnx`."""
    from vit_convert.core.onnx_file import save_onnx
    from vit_convert.quantize.activation_max import largest
    from vit_convert.quantize.smooth import find_norms, smooth

    strength = context.config.calibration.smooth
    norms, _ = find_norms(model, sites)
    amax = largest(source, [norm.tensor for norm in norms], _batches(context, images), per_channel=True)
    result = smooth(model, sites, amax, strength=strength)
    for tensor, reason in result.declined.items():
        context.progress.warn(f"{tensor}: not smoothed: {reason}")
    save_onnx(result.model, context.bundle.onnx(SMOOTHED))
    return Smoothed(
        strength=strength,
        num_norms=len(norms),
        factors_min_max={name: (float(s.min()), float(s.max())) for name, s in result.factors.items()},
        declined=result.declined,
    )


def _batches(context: Context, images: np.ndarray) -> Iterator[Any]:
    size, normalize = context.config.calibration.batch_size, prepare(context)
    return (normalize(np.asarray(images[start : start + size])) for start in range(0, len(images), size))
