"""Sampling the GPU goes on without NVML, and never ends what is being measured."""

import sys
import time
import types

import pytest

from vit_convert.engine.measure import monitor as monitors
from vit_convert.engine.measure.monitor import Monitor, merge_summaries, summarise


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
    assert monitor.missing.startswith(
        "NVML cannot be used (pynvml: Driver/library version mismatch; libnvidia-ml.so.1: "
    )
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
    assert (
        monitor.summary() == {}
        and "does not answer any more (NVMLError('Driver/library version mismatch'))" in monitor.missing
    )
    nvml.nvmlDeviceGetPowerUsage = lambda handle: 1000
    with monitor:
        pass
    assert monitor.summary()["power_w"] == 1 and monitor.missing == ""


def test_monitor_sums_up():
    samples = [{"sm_clock_mhz": clock, "power_w": power} for clock, power in ((1980, 400.0), (1400, 700.0))]
    assert summarise(samples) == {
        "sm_clock_mhz": 1690.0,
        "power_w": 550.0,
        "sm_clock_min_mhz": 1400,
        "power_max_w": 700.0,
    }
    assert summarise([{"temperature_c": 40}]) == {"temperature_c": 40.0}
    other = {"sm_clock_mhz": 1700.0, "power_w": 450.0, "sm_clock_min_mhz": 1600, "power_max_w": 800.0}
    together = {"sm_clock_mhz": 1695.0, "power_w": 500.0, "sm_clock_min_mhz": 1400, "power_max_w": 800.0}
    assert merge_summaries([summarise(samples), {}, other]) == together  # of both passes, not of the last alone
    assert summarise([]) == {}


def test_monitor_without_a_gpu_says_so():
    monitor = Monitor()
    if not monitor.missing:
        pytest.skip("this machine has a GPU")
    with monitor:
        pass
    assert monitor.summary() == {} and "GPU" in monitor.missing


class Library:
    """libnvidia-ml.so.1, by the signatures of nvml.h: results go where the last argument points, 0 is success."""

    def __init__(self):
        self.asked, self.status = [], {}

    def __getattr__(self, function):
        def call(*arguments):
            handle, *rest = arguments or (None,)
            asked = tuple(getattr(value, "value", value) for value in (handle, *rest[:-1]))
            self.asked.append((function, *asked) if rest else function)
            if status := self.status.get(function, 0):
                return status
            if function == "nvmlDeviceGetHandleByPciBusId_v2":
                rest[-1]._obj.value = 4711
            elif function == "nvmlDeviceGetUtilizationRates":
                rest[-1][:] = [87, 13]  # gpu, memory
            elif function == "nvmlDeviceGetMemoryInfo":
                rest[-1][:] = [80 << 30, 77 << 30, 3 << 30]  # total, free, used
            elif rest:
                numbers = {
                    ("nvmlDeviceGetClockInfo", 1): 1980,
                    ("nvmlDeviceGetClockInfo", 2): 2619,
                    ("nvmlDeviceGetTemperature", 0): 41,
                }
                rest[-1]._obj.value = 700_250 if function == "nvmlDeviceGetPowerUsage" else numbers[function, asked[1]]
            return 0

        return call


WHOLE = {
    "sm_clock_mhz": 1980,
    "memory_clock_mhz": 2619,
    "power_w": 700.25,
    "utilization_percent": 87,
    "temperature_c": 41,
    "device_memory_mib": 3072,
}


@pytest.fixture
def library(gpu, monkeypatch):
    monkeypatch.setattr("vit_convert.engine.backend.cuda.pci_bus_id", lambda: "0000:18:00.0")
    monkeypatch.setitem(sys.modules, "pynvml", None)  # cannot be imported
    found = Library()
    monkeypatch.setattr(monitors.ctypes, "CDLL", {"libnvidia-ml.so.1": found}.__getitem__)
    return found


def test_every_quantity_of_the_library_alone(library):
    monitor = Monitor()
    assert library.asked[:2] == ["nvmlInit_v2", ("nvmlDeviceGetHandleByPciBusId_v2", b"0000:18:00.0")]
    assert {asked[1] for asked in library.asked[2:]} == {4711}  # of this GPU, not of the first
    with monitor:
        pass
    extremes = {"sm_clock_min_mhz": 1980, "power_max_w": 700.2, "device_memory_max_mib": 3072}
    # 700.25 is exact in binary, and rounds to the even tenth
    assert monitor.summary() == {**WHOLE, "power_w": 700.2, **extremes}


def test_every_quantity_of_pynvml(nvml):
    nvml.nvmlDeviceGetHandleByPciBusId = {"0000:18:00.0": 4711}.__getitem__
    clocks = {(4711, nvml.NVML_CLOCK_SM): 1980, (4711, nvml.NVML_CLOCK_MEM): 2619}
    nvml.nvmlDeviceGetClockInfo = lambda *arguments: clocks[arguments]
    nvml.nvmlDeviceGetPowerUsage = {4711: 700_250}.__getitem__
    nvml.nvmlDeviceGetUtilizationRates = {4711: types.SimpleNamespace(gpu=87, memory=13)}.__getitem__
    nvml.nvmlDeviceGetTemperature = lambda *arguments: {(4711, nvml.NVML_TEMPERATURE_GPU): 41}[arguments]
    nvml.nvmlDeviceGetMemoryInfo = {
        4711: types.SimpleNamespace(total=80 << 30, free=77 << 30, used=3 << 30)
    }.__getitem__
    monitor = Monitor()
    assert {name: read() for name, read in monitor._quantities.items()} == WHOLE


@pytest.mark.parametrize("function", ["nvmlInit_v2", "nvmlDeviceGetHandleByPciBusId_v2"])
def test_a_library_that_refuses_is_said_with_its_number(library, function):
    library.status[function] = 9
    monitor = Monitor()
    assert f"libnvidia-ml.so.1: {function}: NVML error 9)" in monitor.missing and monitor.summary() == {}


def test_what_the_library_refuses_is_left_out(library):
    library.status = dict.fromkeys(
        ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUtilizationRates"), 3
    )
    monitor = Monitor()
    with monitor:
        pass
    assert set(monitor.summary()) == {"sm_clock_mhz", "memory_clock_mhz", "temperature_c", "sm_clock_min_mhz"}
    library.status = dict.fromkeys((*library.status, "nvmlDeviceGetClockInfo", "nvmlDeviceGetTemperature"), 3)
    assert "libnvidia-ml.so.1 tells nothing of this GPU" in Monitor().missing


def test_each_block_has_samples_of_its_own(nvml):
    monitor = Monitor()
    for watts in (100, 300):
        nvml.nvmlDeviceGetPowerUsage = lambda handle, watts=watts: 1000 * watts
        with monitor as entered:
            assert entered is monitor
        assert monitor.summary()["power_w"] == watts and monitor._thread is None


def test_sampling_goes_on_every_tenth_of_a_second(nvml, monkeypatch):
    """By the times that its thread asks to wait for; the block ends with the fourth."""
    monitor, waits = Monitor(), []

    def wait(seconds):
        waits.append(seconds)
        return len(waits) > 3

    monkeypatch.setattr(monitor._stop, "wait", wait)
    with monitor:
        monitor._thread.join()
    assert waits == [0.1] * 4 and len(monitor._samples) == 3


def test_summaries_of_blocks_that_tell_different_things():
    one, two = (
        {"power_w": 100.0, "power_max_w": 150.0, "sm_clock_min_mhz": 1500.0},
        {"power_w": 101.5, "power_max_w": 140.0},
    )
    assert merge_summaries([one, two]) == {"power_w": 100.8, "power_max_w": 150.0, "sm_clock_min_mhz": 1500.0}
    assert merge_summaries([]) == merge_summaries([{}, {}]) == {}
    found = summarise([{"device_memory_mib": size} for size in (1000.0, 3000.0625)])
    assert found == {"device_memory_mib": 2000.0, "device_memory_max_mib": 3000.1}
