"""The answers of a running server against what JAX gave."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from vit_convert.core.compare import Tolerance, compare
from vit_convert.core.errors import BenchmarkError
from vit_convert.core.tolerance import tolerance_for
from vit_convert.engine.handoff import read_config
from vit_convert.serve.triton.client import infer
from vit_convert.serve.triton.models.preprocess import PIXELS
from vit_convert.serve.triton.offered import Offered

_MOST_IMAGES = 64


@dataclasses.dataclass(frozen=True)
class Proved:
    """One output of one model.

    Attributes:
        model: its name.
        output: its name.
        max_abs: largest absolute difference to JAX.
        max_rel: max_abs over JAX's largest magnitude.
        cosine: smallest of the batch.
        tolerance: that it is judged by.
    """

    model: str
    output: str
    max_abs: float
    max_rel: float
    cosine: float
    tolerance: Tolerance
    passed: bool

    def words(self) -> str:
        """The figures and what they had to be."""
        found = f"max abs {self.max_abs:.3g} ({self.max_rel:.3g} of scale), cosine {self.cosine:.7f}"
        return f"{found}; needed {self.tolerance}"

    def cells(self) -> list[str]:
        """For a table."""
        verdict = "passed" if self.passed else "FAILED"
        return [self.model, self.output, f"{self.max_abs:.2g}", f"{self.max_rel:.2g}", f"{self.cosine:.7f}", verdict]


def prove(url: str, name: str, offered: Offered) -> Iterator[Proved]:
    """Sends a bundle's reference through its model, and its evaluation images through the ensemble from pixels.

    Args:
        url: of the server.
        name: of the model.
        offered: of the bundle.

    Yields:
        What each output was compared by.

    Raises:
        BenchmarkError: the server refuses.
    """
    precision = offered.plans[0].precision if offered.plans else "fp32"
    tolerance = tolerance_for(read_config(offered.bundle), precision, engine=bool(offered.plans))
    found = _ask(url, name, dict(offered.samples))
    for output, expected in offered.expected.items():
        yield _judge(name, output, expected, found[output], tolerance)
    files, images = offered.facts.files, offered.bundle.images("evaluation")
    classes = offered.signature.classes
    if (
        images in files
        and offered.bundle.predictions in files
        and classes is not None
        and len(offered.signature.inputs) == 1
    ):
        pixels = np.load(images, mmap_mode="r")[: min(_MOST_IMAGES, offered.max_batch)]
        logits = np.load(offered.bundle.predictions, mmap_mode="r")[: len(pixels)]
        top = _ask(url, f"{name}_{PIXELS}", {PIXELS: np.asarray(pixels)})
        expected = -np.sort(-np.asarray(logits, np.float32), axis=-1)[:, : top["scores"].shape[1]]
        yield _judge(f"{name}_{PIXELS}", "scores", expected, top["scores"], tolerance)


def _ask(url: str, model: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    try:
        answered: dict[str, np.ndarray] = infer(url, model, inputs, timeout=120)
    except (ValueError, OSError) as e:
        raise BenchmarkError(
            f"{model}: the server did not answer: {e}", fix="Its log says more: tritonserver --log-verbose=1."
        ) from e
    return answered


def _judge(model: str, output: str, expected: np.ndarray, found: np.ndarray, tolerance: Tolerance) -> Proved:
    measured = compare(expected, found)
    return Proved(
        model, output, measured.max_abs, measured.max_rel, measured.cosine, tolerance, tolerance.met_by(measured)
    )
