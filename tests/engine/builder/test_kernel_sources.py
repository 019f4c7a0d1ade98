"""The kernels compile: nvcc comes from a CUDA toolkit or from packages of the index, and needs no GPU."""

import importlib.util
import pathlib
import re
import shutil
import subprocess

import pytest

from vit_convert.kernels import SOURCES

KERNELS = sorted(SOURCES.glob("*.cu"))


def toolkit() -> list[str]:
    """nvcc with the folders of its headers; [] where there is none."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or [] if spec else []:
        root = pathlib.Path(place) / "cu13"
        if (root / "bin" / "nvcc").is_file():
            return [str(root / "bin" / "nvcc"), f"-I{root / 'include'}", f"-I{root / 'include' / 'cccl'}"]
    found = shutil.which("nvcc")
    return [found] if found else []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])  # with and without Hopper's larger shared memory
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_compiles_without_a_warning(source, arch, tmp_path):
    nvcc = toolkit()
    if not nvcc:
        pytest.skip(
            "no nvcc: pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl"
        )
    words = [*nvcc, "-std=c++17", f"-arch=sm_{arch}", "--cubin", str(source), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert (tmp_path / "kernel.cubin").stat().st_size > 1000


@pytest.mark.slow
def test_group_norm_moves_16_bytes_at_a_time(tmp_path):
    """Four loads of 4 bytes are what a compiler made of one of 16 when that was passed on by reference."""
    nvcc = toolkit()
    if not nvcc:
        pytest.skip("no nvcc")
    words = [*nvcc, "-std=c++17", "-arch=sm_90", "--ptx", str(SOURCES / "group_norm.cu"), "-o", str(tmp_path / "k.ptx")]
    subprocess.run(words, check=True, capture_output=True)
    moves = set(re.findall(r"(?:ld|st)\.global\S*\.[bu]\d+", (tmp_path / "k.ptx").read_text()))
    assert len(moves) >= 2 and all(".v4." in move for move in moves), moves  # floats are statistics and parameters


def test_all_kernels_are_tried():
    assert {path.stem for path in KERNELS} == {"attention", "group_norm", "norm", "planes", "stream", "windows"}
