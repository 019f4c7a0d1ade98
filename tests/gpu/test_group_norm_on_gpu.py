"""GroupNorm's kernels behind plain pointers, without TensorRT, against float64: every shape of R26+ViT-S/32 at 224 and
384 pixels, batches, alignment, poisoned memory.

    python -m vit_convert.kernels --tensorrt_include=FOLDER
    python -m pytest -m gpu tests/gpu/test_group_norm_on_gpu.py

Needs what test_kernels_on_gpu.py does.
"""

import ctypes

import pytest
from kernel_buffers import LIBRARY, placed, pointer, results, torch

pytestmark = pytest.mark.gpu

EPSILON = 1e-6
RESTS = ("none", "added", "normalised")
# channels and side: of the stem, and of each stage's bottlenecks before and behind their stride
AT_224 = [
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
]
AT_384 = [(64, 192), (256, 96), (128, 96), (128, 48), (512, 48), (256, 24), (1024, 24), (512, 12), (2048, 12)]


def normalised(x, gamma, beta):
    """GroupNorm of [images, pixels, channels] over 32 groups, in float64."""
    images, pixels, channels = x.shape
    groups = x.double().view(images, pixels, 32, channels // 32)
    variance, mean = torch.var_mean(groups, (1, 3), correction=0, keepdim=True)
    return ((groups - mean) / torch.sqrt(variance + EPSILON)).view(x.shape) * gamma.double() + beta.double()


def expected_of(x, gamma, beta, residual, affine):
    total = normalised(x, gamma, beta)
    if affine[0] is not None:
        total = total + normalised(residual, *affine)
    elif residual is not None:
        total = total + residual.double()
    return total.relu()


def run(x, gamma, beta, residual=None, affine=(None, None), *, interleaved=True):
    """What the kernels write; x: [images, pixels, channels], or planes [images, channels, pixels]."""
    images, pixels, channels = x.shape if interleaved else (x.shape[0], x.shape[2], x.shape[1])
    given = [None if each is None else placed(each)[1] for each in (x, residual, gamma, beta, *affine)]
    size = LIBRARY.vit_group_norm_workspace(images)
    workspace = torch.full((size + 256,), -86, dtype=torch.int8, device="cuda")

    def write(out):
        return LIBRARY.vit_group_norm(
            *(pointer(each) for each in (given[0], given[1], out, *given[2:])),
            *(int(x.dtype == torch.float16), int(interleaved), images, pixels, channels, ctypes.c_float(EPSILON)),
            pointer(workspace),
        )

    found = results(x.shape, x.dtype, write)
    assert (workspace[size:] == -86).all(), "written behind the workspace"
    return found


def drawn(images, pixels, channels, rest, dtype=torch.float16):
    """Values with a mean and a spread of each channel's own, and the parameters of what is normalised."""
    torch.manual_seed(images + pixels + channels)

    def values():
        mean, spread = torch.randn(channels, device="cuda") * 3, torch.rand(channels, device="cuda") * 2 + 0.2
        return (torch.randn(images, pixels, channels, device="cuda") * spread + mean).to(dtype)

    def parameters():
        return [torch.randn(channels, device="cuda") for _ in range(2)]

    residual = None if rest == "none" else values()
    return values(), *parameters(), residual, parameters() if rest == "normalised" else (None, None)


def check(got, expected, relative=2**-11, absolute=1e-4):
    """One rounding to half, and float32's own of terms that cancel."""
    assert ((got.double() - expected).abs() <= relative * expected.abs() + absolute).all()


@pytest.mark.parametrize(
    "images, channels, side",
    [(images, *shape) for shape in AT_224 for images in (1, 3, 64, 256)]
    + [(images, *shape) for shape in AT_384 for images in (1, 16)],
)
@pytest.mark.parametrize("rest", RESTS)
def test_shapes_of_a_hybrid(images, channels, side, rest):
    given = drawn(images, side * side, channels, rest)
    check(run(*given), expected_of(*given))


# around what a block keeps of 64 channels; odd sizes; images that make the parts' number another
ODD = [(2, pixels, 64) for pixels in (1, 31, 49, 255, 399, 400, 401, 799, 800, 801, 12_507)]
ODD += [(1, 257, channels) for channels in (32, 96 * 8, 1280, 2048)] + [
    (2047, 850, 64),
    (2049, 850, 64),
    (255, 49, 256),
]


@pytest.mark.parametrize("images, pixels, channels", ODD)
@pytest.mark.parametrize("rest", RESTS)
def test_other_shapes(images, pixels, channels, rest):
    given = drawn(images, pixels, channels, rest)
    check(run(*given), expected_of(*given))


@pytest.mark.parametrize("pixels", [196, 3136])
def test_a_large_mean_costs_no_digits(pixels):
    """E[x²] − E[x]² of float32 would be off by more than the variance."""
    torch.manual_seed(0)
    x = (20_000 + 16 * torch.randint(-1, 2, (4, pixels, 128), device="cuda")).half()  # a half's step is 16 there
    x[:, 0] = 20_480  # and the first values are far from the mean
    given = (x, torch.ones(128, device="cuda"), torch.zeros(128, device="cuda"), None, (None, None))
    check(run(*given), expected_of(*given), absolute=2e-3)  # 20 000 / 16 of float32's last digit


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("images, pixels, channels", [(1, 49, 96), (3, 3136, 64), (64, 49, 2048)])
@pytest.mark.parametrize("rest", RESTS)
def test_planes(dtype, images, pixels, channels, rest):
    x, gamma, beta, residual, affine = drawn(images, pixels, channels, rest, dtype)
    planes = [None if each is None else each.transpose(1, 2).contiguous() for each in (x, residual)]
    got = run(planes[0], gamma, beta, planes[1], affine, interleaved=False).transpose(1, 2)
    check(got, expected_of(x, gamma, beta, residual, affine), 2**-11 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("pixels", [49, 3136])
def test_nan_and_infinity_stay_visible_in_their_group(pixels):
    x = torch.full((2, pixels, 64), 3.5, device="cuda").half()
    gamma, beta = torch.ones(64, device="cuda"), torch.arange(64.0, device="cuda")
    x[1, 3, 10], x[1, 4, 20] = float("nan"), float("inf")
    got = run(x, gamma, beta)
    assert torch.isnan(got[1, :, [10, 11, 20, 21]]).all()
    got[1, :, [10, 11, 20, 21]] = torch.tensor([10.0, 11, 20, 21], device="cuda").half()
    assert torch.equal(got, beta.half().expand_as(got))


def test_without_a_kernel_is_refused():
    x, epsilon = torch.zeros(4096, device="cuda").half(), ctypes.c_float(EPSILON)
    for dtype, interleaved, images, channels in [
        (1, 1, 1, 48),
        (1, 1, 1, 96),
        (0, 1, 1, 64),
        (2, 0, 1, 64),
        (1, 1, 70_000, 64),
    ]:
        sizes = (dtype, interleaved, images, 1, channels)
        assert LIBRARY.vit_group_norm(*[pointer(x)] * 7, *sizes, epsilon, pointer(x)) != 0
    torch.cuda.synchronize()
