"""Which GPUs engine tasks run on."""

import subprocess

import pytest

from vit_convert.batch import devices
from vit_convert.batch.devices import Device, local_devices
from vit_convert.core.errors import UsageError

# What nvidia-smi --query-gpu=index,uuid,name --format=csv,noheader prints.
SMI = "#!/bin/sh\nprintf '0, GPU-11aa-22, NVIDIA H100 80GB HBM3\\n1, GPU-33bb-44, Tesla T4\\n'\n"


@pytest.fixture
def driver(tmp_path, monkeypatch):
    path = tmp_path / "nvidia-smi"
    path.write_text(SMI)
    path.chmod(0o755)
    monkeypatch.setattr(devices.shutil, "which", lambda name: str(path))


def test_all_that_the_driver_shows(driver):
    assert local_devices([], {}) == [Device("0", "NVIDIA H100 80GB HBM3"), Device("1", "Tesla T4")]


def test_what_the_environment_makes_visible(driver):
    assert local_devices([], {"CUDA_VISIBLE_DEVICES": "1"}) == [Device("1", "Tesla T4")]
    assert local_devices([], {"CUDA_VISIBLE_DEVICES": "GPU-33bb"}) == [Device("GPU-33bb", "Tesla T4")]
    with pytest.raises(UsageError, match="shows no GPU"):
        local_devices([], {"CUDA_VISIBLE_DEVICES": ""})


def test_named_ones_with_and_without_their_type(driver):
    assert local_devices(["1", "0:H100"], {}) == [Device("1", "Tesla T4"), Device("0", "H100")]
    assert local_devices(["7"], {}) == [Device("7", "")]


@pytest.mark.parametrize(("words", "said"), [(["x"], "'x' names no GPU"), (["0", "0:L4"], "twice")])
def test_wrong_names(driver, words, said):
    with pytest.raises(UsageError, match=said):
        local_devices(words, {})


def test_a_process_sees_its_gpu_alone():
    assert Device("3", "L4").environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert Device("", "L4").environment == {}  # a cluster has set it


def test_a_driver_that_does_not_answer(monkeypatch):
    """Not runnable, gone meanwhile, or hanging: then nothing is known, and a number is taken as it is."""
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    for error in (OSError("cannot execute"), FileNotFoundError("gone"), subprocess.TimeoutExpired("nvidia-smi", 60)):

        def fail(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(devices.subprocess, "run", fail)
        assert local_devices(["0:L4"], {}) == [Device("0", "L4")]
        with pytest.raises(UsageError, match="this machine shows no GPU"):
            local_devices([], {})


@pytest.mark.parametrize(
    "said",
    ["No devices were found", "NVIDIA-SMI has failed, because, it could not", "0, GPU-11aa-22", "0, a, b, c", ""],
)
def test_a_driver_that_says_something_else(driver, tmp_path, said):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{said}'\n")
    with pytest.raises(UsageError, match="this machine shows no GPU"):
        local_devices([], {})
