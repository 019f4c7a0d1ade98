"""A session of two towers: embeddings of images and texts, and how similar they are."""

import contextlib
import os
from typing import Any

import numpy as np

from vit_convert.core.errors import BenchmarkError
from vit_convert.core.pair import wrong_ids
from vit_convert.core.similarity import logits_of, probabilities_of
from vit_convert.engine.pair_bundle import open_pair
from vit_convert.serve.session import FallbackSession


class PairSession:
    """Runs a converted pair of towers on whatever works here; several threads may share it.

    Args:
        folder: written by the conversion, `<workdir>/<name>`.
        backend: "tensorrt", "rtx" or "auto".

    Attributes:
        pair: how embeddings are compared: logit_scale, logit_bias, similarity, and how prompts become tokens (`text`).
        runs_on: by tower, "tensorrt", "rtx" or "onnxruntime".
        reason: by tower, why its engine is not used; otherwise "".

    Raises:
        UsageError: the conversion is not finished, or the towers are from other conversions.
        BenchmarkError: neither an engine nor the graph of a tower can be run.

    Example, on a host without a GPU:
        >>> with vit_convert.Session("out/pair") as session:
        ...     texts = session.text(tokens)  # kept, and used for all images
        ...     session.similarity(pixels, texts).shape
        (4, 3)
    """

    def __init__(self, folder: str | os.PathLike[str], *, backend: str = "auto"):
        self.pair, bundles = open_pair(folder)
        with contextlib.ExitStack() as held:
            self._towers = {}
            for tower, bundle in bundles.items():
                self._towers[tower] = FallbackSession(bundle, backend=backend)
                held.callback(self._towers[tower].close)
            self._held = held.pop_all()

    @property
    def runs_on(self) -> dict[str, str]:
        """See above."""
        return {name: tower.runs_on for name, tower in self._towers.items()}

    @property
    def reason(self) -> dict[str, str]:
        """See above."""
        return {name: tower.reason for name, tower in self._towers.items()}

    def image(self, images: Any) -> np.ndarray:
        """Embeds images.

        Args:
            images: as the image tower's graph takes them, [batch, ...]; {input: array} if it has several inputs.

        Returns:
            float32 [batch, width].

        Raises:
            BenchmarkError: they do not fit the tower, it fails, or the session is closed.
        """
        return self._embed("image", images)

    def text(self, tokens: Any) -> np.ndarray:
        """Embeds texts.

        Args:
            tokens: whole numbers [batch, length].

        Returns:
            float32 [batch, width].

        Raises:
            BenchmarkError: see `image`.
        """
        if isinstance(tokens, np.ndarray) and np.issubdtype(tokens.dtype, np.integer):
            if wrong := wrong_ids(tokens, self.pair.text):
                raise BenchmarkError(f"tokens: {wrong}", fix="Make them with the tokenizer of the checkpoint.")
            tokens = tokens.astype(np.int32)
        return self._embed("text", tokens)

    def similarity(self, images: Any, texts: Any, *, logits: bool = False) -> np.ndarray:
        """Compares each image with each text, as the pair was trained: a softmax over the texts of an image, or a
        sigmoid of each.

        Args:
            images: as for `image`, or embeddings from it, float [images, width].
            texts: as for `text`, or embeddings from it, float [texts, width].
            logits: return the logits instead of their softmax or sigmoid.

        Returns:
            float32 [images, texts].

        Raises:
            BenchmarkError: see `image`; or the embeddings differ in width.
        """
        left = images if _is_embedding(images) else self.image(images)
        right = texts if _is_embedding(texts) else self.text(texts)
        if left.shape[-1] != right.shape[-1]:
            raise BenchmarkError(
                f"embeddings of images {list(left.shape)} and of texts {list(right.shape)} differ in width",
                fix="Give what `image` and `text` of this session return.",
            )
        found = logits_of(left, right, self.pair)
        return (found if logits else probabilities_of(found, self.pair)).astype(np.float32)

    def close(self) -> None:
        """Releases all memory, including the engines'; the session cannot be used any more."""
        self._held.close()

    def __enter__(self) -> "PairSession":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _embed(self, tower: str, inputs: Any) -> np.ndarray:
        found = self._towers[tower].run(inputs)
        return next(iter(found.values()))


def _is_embedding(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.ndim == 2 and np.issubdtype(values.dtype, np.floating)
