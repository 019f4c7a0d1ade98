"""A few rows that represent an activation: those with the largest values, and a fair sample of the others."""

from collections.abc import Sequence

import numpy as np

TOP, REST = 32, 128  # rows kept of each kind; some hundred KiB per tensor


class RowSample:
    """Keeps the TOP rows with the largest |x| and, among the others, the REST with the smallest priorities.

    Priorities are random numbers tied to the image and the row, so that neither the order of the images nor the batch
    size changes what is kept, and all rows outside the top are equally likely.

    Attributes:
        count: rows seen.
    """

    def __init__(self, top: int = TOP, rest: int = REST):
        self.count = 0
        self._top, self._rest = top, rest
        self._rows: np.ndarray | None = None  # the rows kept, with the top ones first
        self._magnitude, self._priority = np.zeros(0, np.float32), np.zeros(0)

    def add(self, rows: np.ndarray, priority: np.ndarray) -> None:
        """Offers rows.

        Args:
            rows: float32 [n, channels], finite.
            priority: [n] random numbers.
        """
        self.count += len(rows)
        magnitude = np.maximum(rows.max(axis=1), -rows.min(axis=1))
        near = self._choose(magnitude, priority)  # rows that cannot be kept in any case are not copied
        rows, magnitude, priority = rows[near], magnitude[near], priority[near]
        if self._rows is not None:
            rows = np.concatenate([self._rows, rows])
        magnitude, priority = np.concatenate([self._magnitude, magnitude]), np.concatenate([self._priority, priority])
        kept = self._choose(magnitude, priority)
        self._rows, self._magnitude, self._priority = rows[kept], magnitude[kept], priority[kept]

    def _choose(self, magnitude: np.ndarray, priority: np.ndarray) -> np.ndarray:
        order = np.lexsort((priority, -magnitude))
        others = order[self._top :]
        return np.concatenate([order[: self._top], others[np.argsort(priority[others], kind="stable")[: self._rest]]])

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows kept, float32 [kept, channels], and how many rows each represents, float64 [kept]."""
        rows = self._rows if self._rows is not None else np.zeros((0, 1), np.float32)
        weights = np.ones(len(rows))
        if len(rows) > self._top:
            weights[self._top :] = (self.count - self._top) / (len(rows) - self._top)
        return rows, weights


def priorities(image_keys: Sequence[int], num_rows: int) -> np.ndarray:
    """The priorities of a batch's rows: float64 [rows], image after image.

    Args:
        image_keys: for each image a number derived from its pixels.
        num_rows: of the batch, as many for each image.
    """
    each = num_rows // len(image_keys)
    return np.concatenate([np.random.default_rng(key).random(each) for key in image_keys])
