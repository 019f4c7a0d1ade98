"""Our kernels behind plain pointers, without TensorRT, against float64: shapes, alignment, batches, poisoned memory, in
FP16 and INT8.

    python -m vit_convert.kernels --tensorrt_include=FOLDER && python -m pytest -m gpu tests/gpu/test_kernels_on_gpu.py

Needs PyTorch with CUDA and the library. Results lie in the middle of a buffer of a known pattern, and are computed over
two patterns: what is not written, or written beside, shows. What lies behind the inputs is NaN, or the largest of INT8.
"""

import ctypes
import itertools

import pytest
from kernel_buffers import LIBRARY, placed, pointer, results, torch

pytestmark = pytest.mark.gpu

BRANCHES = {None: 0, torch.float32: 0, torch.float16: 1, torch.int8: 2}


def attention_of(queries, tokens, scale, added=0.0):
    """float64 [images, tokens, heads, head] of [images · tokens, heads, 3, head]; `added` to the scaled scores."""
    rows, heads, _, head = queries.shape
    q, k, v = queries.double().view(rows // tokens, tokens, heads, 3, head).permute(3, 0, 2, 1, 4)
    return (torch.softmax(scale * q @ k.transpose(-1, -2) + added, -1) @ v).transpose(1, 2)


def run_attention(qkv, images, tokens, out_dtype, scale, score_scale, output_scale, causal=False):
    rows, heads, _, head = qkv.shape
    types = (int(qkv.dtype == torch.int8), int(out_dtype == torch.int8))

    def run(out):
        scales = ctypes.c_float(score_scale), ctypes.c_float(output_scale)
        return LIBRARY.vit_attention(
            pointer(qkv), types[0], pointer(out), types[1], images, tokens, heads, head, int(causal), *scales
        )

    return results((rows, heads, head), out_dtype, run)


SHAPES = [
    *(
        (1, tokens, 3)
        for tokens in (
            1,
            2,
            7,
            8,
            15,
            16,
            17,
            31,
            32,
            33,
            49,
            50,
            64,
            65,
            196,
            197,
            223,
            224,
            225,
            256,
            257,
            288,
            289,
            512,
        )
    ),
    *((images, 50, 12) for images in (1, 2, 3, 64, 255, 256)),
    *((images, 197, 3) for images in (1, 5, 64, 256)),
    (2, 577, 2),
]
# which no block holds whole: tile by tile, the last of one to 64 keys, the last block of one to 128 queries
LONG = [(1, tokens, 2) for tokens in (513, 575, 576, 577, 640, 641, 1370)] + [(64, 577, 3), (3, 729, 16)]


@pytest.mark.parametrize("images, tokens, heads", SHAPES)
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.int8], ids=["to_fp16", "to_int8"])
def test_attention_over_int8(images, tokens, heads, out_dtype):
    torch.manual_seed(tokens)
    _, qkv = placed(torch.randint(-127, 128, (images * tokens, heads, 3, 64), device="cuda", dtype=torch.int8))
    step, out_step = 0.03, 0.03  # scores of some ± 10: a softmax of few large weights
    expected = attention_of(qkv * step, tokens, 0.125).reshape(images * tokens, heads, 64)
    got = run_attention(
        qkv, images, tokens, out_dtype, step, step * step / 8, step / out_step if out_dtype == torch.int8 else step
    )
    check_attention(got, expected, out_dtype, out_step)


@pytest.mark.parametrize("images, tokens, heads", SHAPES)
@pytest.mark.parametrize(
    "head, out_dtype", [(64, torch.float16), (64, torch.int8), (80, torch.float16)], ids=["64", "64_to_int8", "80"]
)
def test_attention_over_fp16(images, tokens, heads, head, out_dtype):
    torch.manual_seed(tokens)
    _, qkv = placed(torch.randn(images * tokens, heads, 3, head, device="cuda").half() * 2)
    out_step = 0.07
    expected = attention_of(qkv, tokens, head**-0.5).reshape(images * tokens, heads, head)
    scale = 1 / out_step if out_dtype == torch.int8 else 1.0
    check_attention(
        run_attention(qkv, images, tokens, out_dtype, 1.0, head**-0.5, scale), expected, out_dtype, out_step
    )


@pytest.mark.parametrize("images, tokens, heads", [*LONG, (2, 1, 3), (2, 63, 3), (2, 64, 3), (2, 65, 3), (5, 257, 3)])
@pytest.mark.parametrize("head", [64, 72, 80])
def test_attention_tile_by_tile(images, tokens, heads, head):
    torch.manual_seed(tokens)
    _, qkv = placed(torch.randn(images * tokens, heads, 3, head, device="cuda").half() * 2)
    expected = attention_of(qkv, tokens, head**-0.5).reshape(images * tokens, heads, head)
    got = run_attention(qkv, images, tokens, torch.float16, 1.0, head**-0.5, 1.0)
    check_attention(got, expected, torch.float16, 1.0)


@pytest.mark.parametrize("images, tokens, heads", [*SHAPES, (1024, 77, 8), (2, 800, 2)])
def test_causal_attention(images, tokens, heads):
    torch.manual_seed(tokens)
    _, qkv = placed(torch.randn(images * tokens, heads, 3, 64, device="cuda").half() * 2)
    later = torch.triu(torch.full((tokens, tokens), float("-inf"), device="cuda", dtype=torch.float64), 1)
    expected = attention_of(qkv, tokens, 0.125, later).reshape(images * tokens, heads, 64)
    got = run_attention(qkv, images, tokens, torch.float16, 1.0, 0.125, 1.0, causal=True)
    check_attention(got, expected, torch.float16, 1.0)


WINDOWS = [*itertools.product((1, 2, 7, 16, 31, 32, 33, 49, 64, 144), (1, 4), (1, 3), (3,))]


@pytest.mark.parametrize("tokens, own, images, heads", [*WINDOWS, (49, 64, 64, 3), (49, 1, 4096, 12), (49, 1, 256, 24)])
def test_attention_within_windows(tokens, own, images, heads):
    """The bias of a window is added to the products of queries and keys, before these are scaled."""
    torch.manual_seed(tokens)
    windows = images * own
    _, qkv = placed(torch.randn(windows * tokens, heads, 3, 32, device="cuda").half() * 2)
    _, bias = placed(torch.randn(own, heads, tokens, tokens + tokens % 2, device="cuda") * 5)
    bias[..., tokens:] = 1e4  # what makes the number of columns even is no key
    added = bias[..., :tokens].double().repeat(images, 1, 1, 1) * 32**-0.5
    expected = attention_of(qkv, tokens, 32**-0.5, added).reshape(windows * tokens, heads, 32)
    got = results(
        (windows * tokens, heads, 32),
        torch.float16,
        lambda out: LIBRARY.vit_windows(
            pointer(qkv), pointer(bias), pointer(out), windows, own, tokens, heads, 32, ctypes.c_float(32**-0.5)
        ),
    )
    check_attention(got, expected, torch.float16, 1.0)


def check_attention(got, expected, out_dtype, out_step):
    # weights are rounded to halves, 2^-11 of each, so that values up to 127 move by 0.06 at most
    if out_dtype == torch.int8:
        exact = (expected / out_step).clamp(-128, 127)
        assert (got.double() - exact).abs().max() <= 0.5 + 0.07
        return
    # Weights of softmax are rounded to halves, 2^-11 of each, and so is the result.
    assert torch.linalg.norm(got.double() - expected) <= 1e-3 * torch.linalg.norm(expected)
    assert (got.double() - expected).abs().max() <= 3e-3 * expected.abs().max()


@pytest.mark.parametrize("kind", ["int8", "fp16"])
def test_attention_of_scores_that_rise_and_are_large(kind):
    """Each key is larger than the last, so that the maximum is raised again and again; scores reach thousands, where
    one key takes all."""
    tokens, heads = 197, 2
    qkv = torch.zeros(tokens, heads, 3, 64, device="cuda")
    qkv[:, :, 0] = 127.0
    qkv[:, :, 1] = torch.linspace(-100, 127, tokens, device="cuda")[:, None, None].round()
    qkv[:, :, 2] = torch.randint(-127, 128, (tokens, heads, 64), device="cuda").float()
    for step in (1.0, 0.05, 0.003):
        dtype, scale = (torch.int8, step) if kind == "int8" else (torch.float16, 1.0)
        given = qkv.to(dtype) if kind == "int8" else (qkv * step).to(dtype)
        _, placed_ = placed(given)
        exact = given.double() * step if kind == "int8" else given.double()
        got = run_attention(placed_, 1, tokens, torch.float16, step, scale * scale / 8, scale)
        expected = attention_of(exact, tokens, 0.125).reshape(tokens, heads, 64)
        assert torch.isfinite(got).all()
        assert (got.double() - expected).abs().max() <= 3e-3 * expected.abs().max()


def test_attention_without_a_kernel_is_refused():
    qkv = torch.zeros(64, device="cuda", dtype=torch.int8)
    one = ctypes.c_float(1)
    # INT8 has heads of 64 alone
    assert LIBRARY.vit_attention(pointer(qkv), 1, pointer(qkv), 1, 1, 1, 1, 80, 0, one, one) != 0
    assert LIBRARY.vit_attention(pointer(qkv), 0, pointer(qkv), 0, 1, 1, 1, 96, 0, one, one) != 0
    # more than shared memory holds, of INT8 and of causal ones
    assert LIBRARY.vit_attention(pointer(qkv), 1, pointer(qkv), 1, 1, 4096, 1, 64, 0, one, one) != 0
    assert LIBRARY.vit_attention(pointer(qkv), 0, pointer(qkv), 0, 1, 4096, 1, 64, 1, one, one) != 0
    assert LIBRARY.vit_attention(pointer(qkv), 0, pointer(qkv), 0, 1, 1, 1, 80, 1, one, one) != 0
    # other heads than of 32, and windows that are no whole images
    assert LIBRARY.vit_windows(pointer(qkv), pointer(qkv), pointer(qkv), 1, 1, 1, 1, 64, one) != 0
    assert LIBRARY.vit_windows(pointer(qkv), pointer(qkv), pointer(qkv), 3, 2, 1, 1, 32, one) != 0
    torch.cuda.synchronize()


@pytest.mark.parametrize("width", [32, 64, 192, 256, 288, 384, 768, 1024, 1280, 1536, 2048])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 1000])
@pytest.mark.parametrize(
    "branch", [None, torch.float32, torch.float16, torch.int8], ids=["none", "fp32", "fp16", "int8"]
)
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.int8], ids=["to_fp16", "to_int8"])
def test_norm(width, rows, branch, out_dtype):
    torch.manual_seed(width + rows)
    _, residual = placed((torch.randn(rows, width, device="cuda") * 3 + 1).half())
    added, branch_scale = None, 1.0
    if branch is torch.int8:
        branch_scale = 0.02
        _, added = placed(torch.randint(-127, 128, (rows, width), device="cuda", dtype=torch.int8))
    elif branch is not None:
        _, added = placed(torch.randn(rows, width, device="cuda").to(branch))
    gamma, beta = (torch.randn(width, device="cuda") for _ in range(2))
    out_scale, epsilon = (0.04 if out_dtype == torch.int8 else 1.0), 1e-6
    total = residual.double() + (added.double() * branch_scale if added is not None else 0)
    sums = torch.full((rows, width), float("nan"), device="cuda", dtype=torch.float16)

    def run(out):
        return LIBRARY.vit_norm(
            *(
                pointer(added),
                BRANCHES[branch],
                pointer(residual),
                pointer(sums),
                pointer(out),
                int(out_dtype == torch.int8),
            ),
            *(pointer(gamma), pointer(beta), rows, width),
            *(ctypes.c_float(x) for x in (branch_scale, 1 / out_scale, epsilon)),
        )

    got = results((rows, width), out_dtype, run)
    expected = torch.nn.functional.layer_norm(total, (width,), gamma.double(), beta.double(), epsilon)
    if out_dtype == torch.int8:  # float32 inside: a value in a hundred thousand may round to its other neighbour
        assert (got.double() - (expected / out_scale).clamp(-128, 127)).abs().max() <= 0.5 + 1e-3
    else:
        assert (got.double() - expected).abs().max() <= 1e-3 * expected.abs().max()  # one rounding to halves, 2^-11
    if branch is not None:
        torch.testing.assert_close(sums, total.half(), rtol=1e-3, atol=1e-3)  # one rounding, of a sum that float32 held


def test_norm_without_a_kernel_is_refused():
    one = ctypes.c_float(1)
    x = torch.zeros(4096, device="cuda")
    assert (
        LIBRARY.vit_norm(None, 0, pointer(x), None, pointer(x), 0, pointer(x), pointer(x), 1, 2080, one, one, one) != 0
    )
