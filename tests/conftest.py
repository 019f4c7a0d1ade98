"""What every test relies on: strict JAX on the CPU, parsed flags, and tiny checkpoints."""

import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from absl import flags
from bucket import Bucket, serving

from vit_convert.report import at_end

# Of tests/engine; sessions and serving use them too. A GPU host may have no ONNX, which they simulate one with.
pytest_plugins = ["engine_fixtures"] if importlib.util.find_spec("onnx") else []

# In the environment, so that tests that need no JAX do not import it and child processes inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")


# torchvision has no build for a CPU-only PyTorch: its compiled operators are missing, and its Python code (which timm
# imports too) needs them to be declared, not to work.
_TORCHVISION_OPERATORS = (
    "nms",
    "qnms",
    *(
        f"{name}{suffix}"
        for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
        for suffix in ("", "_backward")
    ),
)


# Files of many graphs and builds whose numbers are the same on every Python, minutes together: each test is slow.
_ALIKE = {
    "export": ("dynamic", "family_graphs", "plugin", "tower_graphs", "uint8"),
    "quantize": (
        "convolutions",
        "family_precisions",
        "fp16_range",
        "fused_int8",
        "left_out",
        "plan",
        "sensitivity",
        "shift",
        "typed",
    ),
    "parity": ("hybrid_parity", "mixer_parity", "swin_parity"),
}


_BEGINNINGS: dict[int, tuple[np.random.Generator, object]] = {}


@pytest.fixture(autouse=True)
def _the_same_numbers_in_any_order(request: pytest.FixtureRequest) -> None:
    """Lets each test draw what it would alone from the generators of its file: which tests came before depends on
    pytest's workers."""
    for value in vars(request.module).values():
        if isinstance(value, np.random.Generator):
            _, state = _BEGINNINGS.setdefault(id(value), (value, value.bit_generator.state))
            value.bit_generator.state = state


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    alike = {f"{folder}/test_{name}.py" for folder, names in _ALIKE.items() for name in names}
    for item in items:
        if "/".join(item.path.parts[-2:]) in alike and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.alike)  # benchmarks/mutation.py runs them nevertheless


@pytest.fixture(autouse=True, scope="session")
def _parsed_flags() -> None:
    flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True, scope="session")
def _no_pages() -> None:
    """A page takes longer than the conversion of a tiny model: here they are written where a test takes `pages`."""
    at_end._NEEDED = ("no_such_module",)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets commands write report.html at their end."""
    for name in ("matplotlib", "jinja2"):
        pytest.importorskip(name)
    monkeypatch.setattr(at_end, "_NEEDED", ("matplotlib", "jinja2"))


@pytest.fixture
def checkpoint(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """Writes a tiny random checkpoint (mu/16 at 64x64, 10 classes, by default); arguments are
    `write_random_checkpoint`'s."""
    from vit_convert.families.random import write_random_checkpoint

    def write(variant: str = "mu/16", name: str = "tiny.npz", **options: object) -> pathlib.Path:
        path = tmp_path / name
        given = {"image_size": (64, 64), "num_classes": 10, **options}
        write_random_checkpoint(path, variant, **given)  # type: ignore[arg-type]
        return path

    return write


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A local server that stands in for every gs:// bucket, of which a client tries again without a pause."""
    from vit_convert.checkpoint import fetch

    monkeypatch.setattr(fetch, "_PAUSE_S", 0)
    with serving() as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.address)
        yield running


@pytest.fixture(scope="session")
def torchvision_operators() -> Iterator[None]:
    """Lets torchvision be imported; skips where there is no PyTorch."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _TORCHVISION_OPERATORS:
        name = f"_{name}" if name.endswith("_backward") else name
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    yield
    library._destroy()
