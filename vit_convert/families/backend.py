"""Starts JAX's backend in one place, so that a failure to start is a message and not a traceback."""

import os

from vit_convert.core.errors import UsageError


def require_backend() -> None:
    """Starts the backend that JAX_PLATFORMS asks for, or the one that JAX finds.

    Raises:
        UsageError: it does not start on this machine.
    """
    import jax

    try:
        jax.devices()
    except Exception as e:
        # RuntimeError for a name that JAX does not know, a bare AssertionError for `cuda` without a GPU
        asked = f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}" if os.environ.get("JAX_PLATFORMS") else "JAX"
        said = str(e).partition("\n")[0] or "this backend does not start on this machine"
        raise UsageError(f"{asked}: {said}", fix="A conversion needs no GPU: JAX_PLATFORMS=cpu does.") from e
