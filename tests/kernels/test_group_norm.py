"""GroupNorm's kernels against float64, on the processor: which pixel and channel each thread reads and writes, how
parts are merged, what is kept and what is read twice. What a GPU makes of them is tests/gpu/test_group_norm_on_gpu.py's
part."""

import ctypes
import shutil

import numpy as np
import pytest
from emulated import compiled
from group_norm_cases import expected_of, worst

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]
MARGIN = 64  # values on each side of a result
LEAST = 2048  # bytes of shared memory: nothing is kept


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(["group_norm.cu", "planes.cu"], tmp_path_factory.mktemp("emulated"))


def placed(values):
    """A copy of values amid NaN."""
    flat = np.full(values.size + 2 * MARGIN, np.nan, values.dtype)
    flat[MARGIN:-MARGIN] = values.reshape(-1)
    return flat, flat[MARGIN:-MARGIN].reshape(values.shape)


def pointer(array):
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def run(library, x, gamma, beta, residual=None, affine=(None, None), *, interleaved=True, epsilon=1e-6):
    """What the kernels write, and how many were launched; x: [images, pixels, channels], or planes [images, channels,
    pixels]."""
    images, pixels, channels = x.shape if interleaved else (x.shape[0], x.shape[2], x.shape[1])
    given = [None if each is None else placed(each) for each in (x, residual, gamma, beta, *affine)]
    x_, residual_, gamma_, beta_, *affine_ = (each and each[1] for each in given)
    out, before = placed(np.full_like(x, np.nan))[0], library.on_cpu_launches()
    size = library.vit_group_norm_workspace(images)
    workspace = np.full(size + 256, 0xAA, np.uint8)
    status = library.vit_group_norm(
        *(pointer(each) for each in (x_, residual_)),
        ctypes.c_void_p(out.ctypes.data + MARGIN * out.itemsize),
        *(pointer(each) for each in (gamma_, beta_, *affine_)),
        *(int(x.dtype == np.float16), int(interleaved), images, pixels, channels, ctypes.c_float(epsilon)),
        pointer(workspace),
    )
    assert status == 0
    assert np.isnan(out[:MARGIN]).all() and np.isnan(out[-MARGIN:]).all(), "written beside the result"
    assert (workspace[size:] == 0xAA).all(), "written behind the workspace"
    return out[MARGIN:-MARGIN].reshape(x.shape), library.on_cpu_launches() - before


def drawn(images, pixels, channels, rest, *, dtype=np.float16, seed=0):
    """Values of large means and a spread of each channel's own, and the parameters of what is normalised."""
    rng = np.random.default_rng([seed, images, pixels, channels])

    def values():
        mean, spread = rng.normal(0, 3, channels), rng.uniform(0.2, 2, channels)
        return (mean + spread * rng.standard_normal((images, pixels, channels))).astype(dtype)

    def parameters():
        return [rng.standard_normal(channels).astype(np.float32) for _ in range(2)]

    residual = None if rest == "none" else values()
    return values(), *parameters(), residual, parameters() if rest == "normalised" else (None, None)


# groups of one channel to 64; one pixel, fewer than a block has rows, and several rounds of them; and of 96 vectors a
# pixel, which leave some of a block's threads without a place
SHAPES = [(1, 1, 64), (2, 7, 32), (2, 49, 128), (1, 33, 768), (3, 31, 64), (1, 49, 512)]
LARGE = [(1, 200, 256), (1, 20, 2048), (1, 20, 1280)]


@pytest.mark.parametrize(
    "images, pixels, channels, rest",
    [(*shape, rest) for shape in SHAPES for rest in ("none", "added", "normalised")]
    + [(*shape, "normalised") for shape in LARGE],
)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "shared"])
def test_every_value_is_right(library, images, pixels, channels, rest, kept):
    library.on_cpu_shared_bytes(227 * 1024 if kept else LEAST)
    x, gamma, beta, residual, affine = drawn(images, pixels, channels, rest)
    got, launches = run(library, x, gamma, beta, residual, affine)
    assert launches == (1 if kept else 2)
    assert worst(got, expected_of(x, gamma, beta, residual, affine)) <= 1


def test_an_image_that_no_block_keeps(library):
    """So many parts that a warp merges them in two steps, the last shorter than the others."""
    library.on_cpu_shared_bytes(227 * 1024)
    x, gamma, beta, residual, affine = drawn(1, 4500 - 37, 64, "added")
    got, launches = run(library, x, gamma, beta, residual, affine)
    assert launches == 2
    assert worst(got, expected_of(x, gamma, beta, residual, affine)) <= 1


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "shared"])
def test_a_large_mean_costs_no_digits(library, kept):
    """E[x²] − E[x]² of float32 would be off by more than the variance."""
    library.on_cpu_shared_bytes(227 * 1024 if kept else LEAST)
    rng = np.random.default_rng(1)
    x = (20_000 + 16 * rng.integers(-1, 2, (1, 196, 128))).astype(np.float16)  # a half's step is 16 there
    x[0, 0] = 20_480  # and the first values are far from the mean
    gamma, beta = np.ones(128, np.float32), np.zeros(128, np.float32)
    got, _ = run(library, x, gamma, beta)
    assert worst(got, expected_of(x, gamma, beta), absolute=2e-3) <= 1  # 20 000 / 30 of a float32 is 4e-5, of each term


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("rest", ["none", "added", "normalised"])
def test_planes(library, dtype, rest):
    x, gamma, beta, residual, affine = drawn(2, 49, 96, rest, dtype=dtype)
    planes = [None if each is None else np.ascontiguousarray(each.swapaxes(1, 2)) for each in (x, residual)]
    got, _ = run(library, planes[0], gamma, beta, planes[1], affine, interleaved=False)
    expected = expected_of(x, gamma, beta, residual, affine)
    assert worst(got.swapaxes(1, 2), expected, relative=2**-11 if dtype == np.float16 else 1e-5) <= 1


def test_equal_values_and_no_number(library):
    """A group without any spread gives its bias, as its ε says; NaN and infinity stay visible, in their group alone."""
    library.on_cpu_shared_bytes(227 * 1024)
    x = np.full((1, 20, 64), 3.5, np.float16)
    gamma, beta = np.ones(64, np.float32), np.arange(64, dtype=np.float32)
    np.testing.assert_array_equal(run(library, x, gamma, beta)[0], np.broadcast_to(beta, x.shape))
    x[0, 3, 10], x[0, 4, 20] = np.nan, np.inf
    got = run(library, x, gamma, beta)[0]
    assert np.isnan(got[..., [10, 11, 20, 21]]).all()
    rest = np.delete(np.arange(64), [10, 11, 20, 21])
    np.testing.assert_array_equal(got[..., rest], np.broadcast_to(beta[rest], (1, 20, 60)))


@pytest.mark.parametrize(
    "what", [{"channels": 48}, {"channels": 4096}, {"channels": 96}, {"dtype": 2}, {"dtype": 0}, {"images": 70_000}]
)
def test_what_there_is_no_kernel_for_is_refused(library, what):
    given = {"dtype": 1, "interleaved": 1, "images": 1, "pixels": 1, "channels": 64, **what}
    nothing = [ctypes.c_void_p(None)] * 7
    assert library.vit_group_norm(*nothing, *given.values(), ctypes.c_float(1e-6), None) != 0
