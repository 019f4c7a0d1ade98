"""ViTs with random weights, written for a target and held against JAX."""

import functools
import pathlib

import numpy as np
from export_graphs import random_images, random_params

from vit_convert.core.compare import compare
from vit_convert.core.model import Model
from vit_convert.core.onnx_file import open_session, run_session
from vit_convert.export.exporter import ExportReport, export_model
from vit_convert.export.targets import lowering_named, target_named
from vit_convert.families.vit.architecture import Architecture
from vit_convert.families.vit.model import vit_model


@functools.cache
def tiny(arch: Architecture) -> Model:
    """A ViT with random weights: compiled once for all targets."""
    return vit_model(arch, random_params(arch))


@functools.cache
def reference(arch: Architecture) -> dict[str, np.ndarray]:
    """What JAX makes of the random images."""
    return tiny(arch).run(random_images(arch))


def written(
    arch: Architecture,
    path: pathlib.Path,
    *,
    target: str = "rtx",
    lowering: str = "",
    layout: str = "NHWC",
    taps: bool = False,
    model: Model | None = None,
) -> ExportReport:
    """Exports a ViT, in the target's own lowering unless another is named, and returns the report."""
    wanted = lowering_named(target, lowering) if lowering else target_named(target)
    return export_model(model or tiny(arch), path, target=wanted, layout=layout, taps=taps)


def as_jax_has_it(value: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Turns [batch · tokens, width, 1, 1] into [batch, tokens, width]; what has another shape than JAX's otherwise is
    an error."""
    if value.ndim == 4:
        batch, tokens, width = expected.shape
        assert value.shape == (batch * tokens, width, 1, 1)
        return value.reshape(expected.shape)
    assert value.shape == expected.shape
    return value


def assert_agrees(arch: Architecture, path: pathlib.Path, *, layout: str = "NHWC", with_taps: bool = True) -> None:
    """Holds outputs and taps against JAX at 1e-4 of their scale, which is what a conversion promises; three blocks
    measure about 1e-6."""
    images, model = random_images(arch), tiny(arch)
    names = [model.output, *(model.taps if with_taps else [])]
    session = open_session(path, names[1:])
    for batch in (1, 3, 5):
        fed = images[:batch] if layout == "NHWC" else images[:batch].transpose(0, 3, 1, 2)
        got = run_session(session, np.ascontiguousarray(fed), names)
        for name in names:
            expected = reference(arch)[name][:batch]
            if arch.pool == "tok" and name in model.taps[-2:]:
                expected = expected[:, :1]  # the last block computes the pooled token alone
            assert compare(expected, as_jax_has_it(got[name], expected)).max_rel < 1e-4, name
