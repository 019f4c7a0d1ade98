"""People's own models run under JAX's own rules of promotion, not under the strict ones that ours are held to."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _standard_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    if "own" not in request.module.__name__:
        yield
        return
    import jax

    with jax.numpy_dtype_promotion("standard"):
        yield
