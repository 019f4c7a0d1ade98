"""Compares the answers of a running server with JAX's."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from vit_convert.core.bundle import Bundle
from vit_convert.core.compare import Tolerance, compare
from vit_convert.core.config import PRECISIONS
from vit_convert.core.errors import BenchmarkError
from vit_convert.core.similarity import logits_of, probabilities_of
from vit_convert.core.tolerance import allowed_similarity_error, tolerance_for
from vit_convert.engine.handoff import read_config
from vit_convert.engine.pair_bundle import jax_embeddings
from vit_convert.images.patches import pixels_of
from vit_convert.serve.triton.client import infer
from vit_convert.serve.triton.ensembles import takes_patches
from vit_convert.serve.triton.models.preprocess import PIXELS
from vit_convert.serve.triton.models.similarity import LOGITS, SIMILARITY
from vit_convert.serve.triton.offered import Offered
from vit_convert.serve.triton.pairs import OfferedPair

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
        tolerance: for this output.
    """

    model: str
    output: str
    max_abs: float
    max_rel: float
    cosine: float
    tolerance: Tolerance
    passed: bool

    def words(self) -> str:
        """The figures and their tolerance."""
        found = f"max abs {self.max_abs:.3g} ({self.max_rel:.3g} of scale), cosine {self.cosine:.7f}"
        return f"{found}; needed {self.tolerance}"

    def cells(self) -> list[str]:
        """For a table."""
        verdict = "passed" if self.passed else "FAILED"
        return [self.model, self.output, f"{self.max_abs:.2g}", f"{self.max_rel:.2g}", f"{self.cosine:.7f}", verdict]


def prove(url: str, name: str, offered: Offered) -> Iterator[Proved]:
    """Sends a bundle's reference through its model, and its evaluation images through the pixel ensemble.

    Args:
        url: of the server.
        name: of the model.
        offered: of the bundle.

    Yields:
        The comparison for each output.

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


def prove_pair(url: str, name: str, pair: OfferedPair) -> Iterator[Proved]:
    """Sends the references of both towers through their models, and the evaluation images and texts of a pair through
    its similarity model, twice, because the second time the texts are cached.

    Args:
        url: of the server.
        name: of the pair.
        pair: what is known of it.

    Yields:
        The comparison for each output.

    Raises:
        BenchmarkError: the server refuses, or a file of the pair is damaged.
    """
    yield from prove(url, f"{name}_image_tower", pair.image)
    yield from prove(url, f"{name}_text", pair.text)
    if pair.image.bundle.embeddings not in pair.image.facts.files:
        return  # no pixels are kept
    pixels = np.load(pair.image.bundle.images("evaluation"), mmap_mode="r")[:_MOST_IMAGES]
    tokens = _tokens(pair)[:_MOST_IMAGES]
    towers, model = (pair.image, pair.text), f"{name}_similarity"
    image, text = (jax_embeddings(tower.bundle, tower.facts)[:_MOST_IMAGES] for tower in towers)
    logits = logits_of(image, text, pair.facts)
    expected = {SIMILARITY: probabilities_of(logits, pair.facts), LOGITS: logits}
    precision = max((tower.plans[0].precision if tower.plans else "fp32" for tower in towers), key=PRECISIONS.index)
    for _ in range(2):
        answers = [_ask(url, model, {PIXELS: part, pair.tokens.name: tokens}) for part in _requests(pair, pixels)]
        for output, right in expected.items():
            tolerance = _of_similarity(pair, precision, output)
            yield _judge(model, output, right, np.concatenate([row[output] for row in answers]), tolerance)


def _tokens(pair: OfferedPair) -> np.ndarray:
    """The evaluation texts, or without any those of the reference, as `jax_embeddings` has them."""
    bundle = pair.text.bundle
    if bundle.embeddings not in pair.text.facts.files:
        return np.asarray(pair.text.samples[pair.tokens.name])
    return np.asarray(np.load(bundle.tokens("evaluation"), mmap_mode="r")[:_MOST_IMAGES])


def _requests(pair: OfferedPair, kept: np.ndarray) -> Iterator[np.ndarray]:
    """The pixels of the evaluation images: all at once, or of images of any aspect one after the other."""
    if not takes_patches(pair.image):
        yield np.asarray(kept)
        return
    for packed in kept:
        yield pixels_of(packed, pair.image.facts.patches[1])[None]


def _of_similarity(pair: OfferedPair, precision: str, output: str) -> Tolerance:
    """How far a logit or a probability may be off when the cosine is off as far as allowed."""
    config = read_config(Bundle(pair.image.bundle.root.parent))
    engine = bool(pair.image.plans or pair.text.plans)
    cosine = allowed_similarity_error(config, precision, engine=engine)
    # A probability moves at most by half as much as its logits: the case of two equal ones that move apart.
    atol = pair.facts.logit_scale * cosine * (1.0 if output == LOGITS else 0.5)
    return Tolerance(atol, 0.0, -1.0)


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
