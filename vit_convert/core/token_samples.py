"""Texts for a conversion that has none: seeded tokens with start, end and padding where a tokenizer would put them."""

import numpy as np

from vit_convert.core.signature import Tensor


def sample_texts(tensor: Tensor, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draws texts of various lengths.

    Good for comparing two programs on the same input. They are not sentences, so they say nothing about accuracy.

    Args:
        tensor: an input of a signature that takes the tokens of texts, [batch, length].
        count: how many.
        generator: the source of randomness.

    Returns:
        Array of the input's type [count, length]: the start token if there is one, other tokens, the end token, and
        padding.

    Example:
        >>> taken = Tensor("tokens", "int32", ("batch", 6), below=10, start=8, end=9, pad=0)
        >>> sample_texts(taken, 2, np.random.default_rng(1)).tolist()
        [[8, 4, 6, 9, 0, 0], [8, 7, 2, 3, 7, 9]]
    """
    length = int(tensor.shape[1])
    special = sorted({token for token in (tensor.start, tensor.end, tensor.pad) if token >= 0})
    words = generator.integers(0, tensor.below - len(special), (count, length))
    for token in special:  # in ascending order, so that each is skipped
        words += words >= token
    begins, ends = int(tensor.start >= 0), int(tensor.end >= 0)
    if begins:
        words[:, 0] = tensor.start
    stops = begins + generator.integers(1, length - begins - ends + 1, count)
    place = np.arange(length)
    words = np.where(place >= stops[:, None], tensor.pad, words)
    if ends:
        words = np.where(place == stops[:, None], tensor.end, words)
    return words.astype(tensor.dtype)
