"""What tests of kernels behind plain pointers share: the library, inputs amid poison, and results that must be written
whole and in their place."""

import ctypes

import pytest

from vit_convert import kernels

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU in this PyTorch", allow_module_level=True)
if not kernels.library().is_file():
    pytest.skip(f"no {kernels.library()}", allow_module_level=True)

LIBRARY = ctypes.CDLL(str(kernels.library()))
MARGIN = 64  # elements on each side of a result; a multiple of 16 bytes, and no more: results are not aligned to 256
POISON = {torch.float16: float("nan"), torch.float32: float("nan"), torch.int8: 127}


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
    # by their bytes: NaN is not equal to itself
    assert torch.equal(*(each.flatten().view(torch.int8) for each in found)), "not all of the result is written"
    return found[0]
