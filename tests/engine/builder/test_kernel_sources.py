"""The kernels compile: nvcc comes from a CUDA toolkit or from packages of the index, and needs no GPU."""

import importlib.util
import pathlib
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


def test_all_kernels_are_tried():
    assert {path.stem for path in KERNELS} == {"attention", "norm", "stream", "windows"}
