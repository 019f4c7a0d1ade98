"""Our kernels behind plain pointers, without TensorRT, against float64: shapes, alignment, batches, poisoned memory, in
FP16 and INT8.

    python -m vit_convert.kernels --tensorrt_include=FOLDER && python -m pytest -m gpu tests/gpu/test_kernels_on_gpu.py

Needs PyTorch with CUDA and the library. Results lie in the middle of a buffer of a known pattern, and are computed over
two patterns: what is not written, or written beside, shows. What lies behind the inputs is NaN, or the largest of INT8.
"""

import ctypes

import pytest

from vit_convert import kernels

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU in this PyTorch", allow_module_level=True)
if not kernels.library().is_file():
    pytest.skip(f"no {kernels.library()}", allow_module_level=True)

pytestmark = pytest.mark.gpu

LIBRARY = ctypes.CDLL(str(kernels.library()))
MARGIN = 64  # elements on each side of a result; a multiple of 16 bytes, and no more: results are not aligned to 256
POISON = {torch.float16: float("nan"), torch.float32: float("nan"), torch.int8: 127}
BRANCHES = {None: 0, torch.float32: 0, torch.float16: 1, torch.int8: 2}


def placed(values):
    """A copy of values with MARGIN poisoned elements before and behind, and the view of the middle."""
    flat = torch.full((values.numel() + 2 * MARGIN,), POISON[values.dtype], dtype=values.dtype, device="cuda")
    middle = flat[MARGIN : MARGIN + values.numel()].view(values.shape)
    middle.copy_(values)
    return flat, middle


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def results(shape, dtype, run):
    """What `run` writes into a result; over two patterns, with the margins as they were."""
    found = []
    for pattern in (85, -86):  # 0x55 and 0xaa
        bytes_ = torch.full((torch.Size(shape).numel() + 2 * MARGIN,), pattern, dtype=torch.int8, device="cuda")
        bytes_ = bytes_.repeat_interleave(torch.tensor([], dtype=dtype).element_size())
        flat = bytes_.view(dtype)
        middle = flat[MARGIN:-MARGIN]
        assert run(middle) == 0
        torch.cuda.synchronize()
        edge = MARGIN * middle.element_size()
        assert (bytes_[:edge] == pattern).all() and (bytes_[-edge:] == pattern).all(), "written beside the result"
        found.append(middle.clone().view(shape))
    assert torch.equal(found[0], found[1]), "not all of the result is written"
    return found[0]


def attention_of(queries, tokens, scale):
    """float64 [images, tokens, heads, head] of [images · tokens, heads, 3, head]."""
    rows, heads, _, head = queries.shape
    q, k, v = queries.double().view(rows // tokens, tokens, heads, 3, head).permute(3, 0, 2, 1, 4)
    return (torch.softmax(scale * q @ k.transpose(-1, -2), -1) @ v).transpose(1, 2)


def run_attention(qkv, images, tokens, out_dtype, scale, score_scale, output_scale):
    rows, heads, _, head = qkv.shape
    types = (int(qkv.dtype == torch.int8), int(out_dtype == torch.int8))

    def run(out):
        scales = ctypes.c_float(score_scale), ctypes.c_float(output_scale)
        return LIBRARY.vit_attention(
            pointer(qkv), types[0], pointer(out), types[1], images, tokens, heads, head, *scales
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
    assert LIBRARY.vit_attention(pointer(qkv), 1, pointer(qkv), 1, 1, 1, 1, 80, one, one) != 0
    assert LIBRARY.vit_attention(pointer(qkv), 0, pointer(qkv), 0, 1, 1, 1, 96, one, one) != 0
    # more than shared memory holds
    assert LIBRARY.vit_attention(pointer(qkv), 0, pointer(qkv), 0, 1, 4096, 1, 64, one, one) != 0
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
