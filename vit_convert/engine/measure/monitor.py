"""The GPU's clocks, power, utilisation and temperature during a block, sampled through NVML in a thread."""

import ctypes
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vit_convert.engine.backend import cuda

_PERIOD_S = 0.1
_SM_CLOCK, _MEMORY_CLOCK, _TEMPERATURE_GPU = 1, 2, 0  # nvml.h: NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU
Quantity = Callable[[], float]
# Extremes that reveal throttling and lack of memory: the quantity, the name of its extreme, and which extreme.
_EXTREMES: tuple[tuple[str, str, Callable[[Iterable[float]], float]], ...] = (
    ("sm_clock_mhz", "sm_clock_min_mhz", min),
    ("power_w", "power_max_w", max),
    ("device_memory_mib", "device_memory_max_mib", max),
)


class Monitor:
    """Samples the GPU while a `with` block runs: every 0.1 s, and at the end of a block that is shorter.

    Attributes:
        missing: why nothing is sampled, or was sampled in the last block; otherwise "".
    """

    def __init__(self) -> None:
        self._samples: list[dict[str, float]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._quantities, self.missing = _open_quantities()

    def __enter__(self) -> "Monitor":
        if self._quantities:
            self._samples.clear()
            self._stop.clear()
            self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            self.missing = "" if self._samples else f"NVML does not answer any more ({self._failure!r})"

    def summary(self) -> dict[str, float]:
        """Mean of each quantity over the last block, and the extremes that reveal throttling; {} if nothing was
        sampled."""
        return summarise(self._samples)

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            self._sample()
        if not self._samples:  # the GPU has only just finished, so its clocks have not dropped yet
            self._sample()

    def _sample(self) -> None:
        try:
            self._samples.append({name: read() for name, read in self._quantities.items()})
        except Exception as e:  # a missing sample is no reason to lose a measurement
            self._failure = e


def summarise(samples: list[dict[str, float]]) -> dict[str, float]:
    """Summarises samples.

    Args:
        samples: of "sm_clock_mhz", "memory_clock_mhz", "power_w", "utilization_percent", "temperature_c" and
            "device_memory_mib" (in use by all processes), the same in each.

    Returns:
        The mean of each, with "sm_clock_min_mhz", "power_max_w" and "device_memory_max_mib"; {} for no samples.
    """
    if not samples:
        return {}
    summary = {key: round(float(np.mean([sample[key] for sample in samples])), 1) for key in samples[0]}
    for key, name, extreme in _EXTREMES:
        if key in summary:
            summary[name] = round(extreme(sample[key] for sample in samples), 1)
    return summary


def merge_summaries(summaries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combines the summaries of several blocks: the mean of the means, the extreme of the extremes.

    Args:
        summaries: of `summarise`; those without samples are skipped.
    """
    extremes = {name: extreme for _, name, extreme in _EXTREMES}
    merged: dict[str, float] = {}
    for key in dict.fromkeys(key for summary in summaries for key in summary):
        values = [summary[key] for summary in summaries if key in summary]
        merged[key] = extremes[key](values) if key in extremes else round(float(np.mean(values)), 1)
    return merged


def _open_quantities() -> tuple[dict[str, Quantity], str]:
    if cuda.gpu() is None:
        return {}, "there is no GPU here"
    reasons = []
    for package, open_quantities in (("pynvml", _pynvml_quantities), ("libnvidia-ml.so.1", _ctypes_quantities)):
        try:
            quantities = open_quantities()
        except Exception as e:
            # pynvml has a separate class for each error, and no benchmark should fail for lack of a clock
            reasons.append(f"{package}: {e}")
            continue
        # a slice of a GPU (MIG) reports less than a whole one
        working = {name: quantity for name, quantity in quantities.items() if _works(quantity)}
        if working:
            return working, ""
        reasons.append(f"{package} tells nothing of this GPU")
    return {}, f"NVML cannot be used ({'; '.join(reasons)})"


def _works(quantity: Quantity) -> bool:
    try:
        quantity()
        return True
    except Exception:
        return False


def _pynvml_quantities() -> dict[str, Quantity]:
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByPciBusId(cuda.pci_bus_id())
    return {
        "sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "utilization_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "device_memory_mib": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20,
    }


def _ctypes_quantities() -> dict[str, Quantity]:
    """The same six calls without nvidia-ml-py, which a host that only runs engines may lack."""
    library = ctypes.CDLL("libnvidia-ml.so.1")

    def call(function: str, *arguments: Any) -> None:
        if (status := getattr(library, function)(*arguments)) != 0:
            raise RuntimeError(f"{function}: NVML error {status}")

    handle = ctypes.c_void_p()
    call("nvmlInit_v2")
    call("nvmlDeviceGetHandleByPciBusId_v2", cuda.pci_bus_id().encode(), ctypes.byref(handle))

    def number(function: str, *arguments: Any) -> int:
        value = ctypes.c_uint()
        call(function, handle, *arguments, ctypes.byref(value))
        return value.value

    def utilization() -> int:
        rates = (ctypes.c_uint * 2)()  # nvmlUtilization_t: gpu, memory
        call("nvmlDeviceGetUtilizationRates", handle, rates)
        return rates[0]

    def memory_used() -> int:
        memory = (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
        call("nvmlDeviceGetMemoryInfo", handle, memory)
        return memory[2]

    return {
        "sm_clock_mhz": lambda: number("nvmlDeviceGetClockInfo", _SM_CLOCK),
        "memory_clock_mhz": lambda: number("nvmlDeviceGetClockInfo", _MEMORY_CLOCK),
        "power_w": lambda: number("nvmlDeviceGetPowerUsage") / 1000,
        "utilization_percent": utilization,
        "temperature_c": lambda: number("nvmlDeviceGetTemperature", _TEMPERATURE_GPU),
        "device_memory_mib": lambda: memory_used() / 2**20,
    }
