"""JAX's backend starts, or a message says which was asked for, and what helps."""

import jax
import pytest

from vit_convert.core.errors import UsageError
from vit_convert.families.backend import require_backend


def failing(error):
    def devices():
        raise error

    return devices


def test_it_starts(monkeypatch):
    started = []
    monkeypatch.setattr(jax, "devices", lambda: started.append(1))
    require_backend()
    assert started


@pytest.mark.parametrize(
    ("platforms", "error", "said"),
    [
        ("cuda", AssertionError(), "JAX_PLATFORMS=cuda: this backend does not start on this machine"),
        ("tpu,cpu", RuntimeError("no tpu\nsecond line"), "JAX_PLATFORMS=tpu,cpu: no tpu"),
        ("", RuntimeError("it ends"), "JAX: it ends"),
        (None, RuntimeError(""), "JAX: this backend does not start on this machine"),
    ],
)
def test_it_does_not_start(monkeypatch, platforms, error, said):
    monkeypatch.setattr(jax, "devices", failing(error))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms is not None:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    with pytest.raises(UsageError) as caught:
        require_backend()
    assert str(caught.value) == said and "JAX_PLATFORMS=cpu" in caught.value.fix
