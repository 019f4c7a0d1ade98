"""Sampling the GPU goes on without NVML, and never ends what is being measured."""

import sys
import time
import types

import pytest

from vit_convert.engine.measure import monitor as monitors
from vit_convert.engine.measure.monitor import Monitor


class NVMLError(Exception):
    """pynvml's own, of no common base with the others."""


def refuse(*_):
    raise NVMLError("Driver/library version mismatch")


@pytest.fixture
def nvml(gpu, monkeypatch):
    """A pynvml whose readings a test may replace."""
    module = types.SimpleNamespace(
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByPciBusId=lambda address: address,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1980,
        nvmlDeviceGetPowerUsage=lambda handle: 700000,
        nvmlDeviceGetUtilizationRates=lambda handle: types.SimpleNamespace(gpu=100),
        nvmlDeviceGetTemperature=lambda handle, kind: 40,
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(used=3 << 30),
    )
    monkeypatch.setattr("vit_convert.engine.backend.cuda.pci_bus_id", lambda: "0000:18:00.0")
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_short_block_has_a_sample(nvml):
    monitor = Monitor()
    with monitor:
        pass
    assert monitor.missing == "" and monitor.summary()["sm_clock_mhz"] == 1980 and monitor.summary()["power_w"] == 700
    assert monitor.summary()["device_memory_max_mib"] == 3072


def test_nvml_that_does_not_start(nvml, monkeypatch):
    nvml.nvmlInit = refuse
    monkeypatch.setattr(monitors.ctypes, "CDLL", refuse)
    monitor = Monitor()
    assert monitor.missing.startswith("NVML cannot be used (pynvml: Driver/library version mismatch; libnvidia-ml.so.1: ")
    with monitor:
        pass
    assert monitor.summary() == {}


def test_pynvml_that_does_not_start_leaves_the_library(nvml, monkeypatch):
    nvml.nvmlInit = refuse
    monkeypatch.setattr(monitors, "_ctypes_quantities", lambda: {"power_w": lambda: 500.0})
    monitor = Monitor()
    with monitor:
        pass
    assert monitor.missing == "" and monitor.summary() == {"power_w": 500.0, "power_max_w": 500.0}


def test_what_this_gpu_does_not_tell_is_left_out(nvml):
    nvml.nvmlDeviceGetUtilizationRates = refuse
    monitor = Monitor()
    with monitor:
        pass
    assert "utilization_percent" not in monitor.summary() and monitor.summary()["temperature_c"] == 40


def test_sampling_outlives_a_refusal(nvml, monkeypatch):
    monkeypatch.setattr(monitors, "_PERIOD_S", 0.001)
    monitor = Monitor()
    answers = iter([1000, NVMLError("unknown error")])

    def power(handle):
        answer = next(answers, 3000)
        if isinstance(answer, Exception):
            raise answer
        return answer

    nvml.nvmlDeviceGetPowerUsage = power
    with monitor:
        deadline = time.monotonic() + 300  # for a machine that does other work; three samples take 3 ms
        while len(monitor._samples) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert [sample["power_w"] for sample in monitor._samples][:3] == [1, 3, 3] and monitor.missing == ""


def test_nvml_that_stops_answering_is_said(nvml):
    monitor = Monitor()
    nvml.nvmlDeviceGetPowerUsage = refuse
    with monitor:
        pass
    assert monitor.summary() == {} and "does not answer any more (NVMLError('Driver/library version mismatch'))" in monitor.missing
    nvml.nvmlDeviceGetPowerUsage = lambda handle: 1000
    with monitor:
        pass
    assert monitor.summary()["power_w"] == 1 and monitor.missing == ""
