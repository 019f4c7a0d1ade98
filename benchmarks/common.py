"""What the peers share: the two images of the check, and how a script reports the time of each step."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

IMAGE_SIZE = 224
_STARTED = time.perf_counter()


def two_images() -> np.ndarray:
    """Seeded images: float32 [2, 224, 224, 3] in [-1, 1]."""
    return np.random.default_rng(0).uniform(-1, 1, (2, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)


class Steps:
    """Times of consecutive steps, in seconds; the first includes the imports since the script began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = _STARTED

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times a block."""
        yield
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now

    def finish(self, **found: float) -> None:
        """Prints one line of JSON: the steps and what else was found."""
        print(json.dumps({"steps": self.seconds, **found}))
