"""Estimates a conversion's time and memory from a checkpoint's header, corrected by measurements."""

import dataclasses
import functools
import os
import re
from collections.abc import Sequence

from vit_convert.batch.job import Job
from vit_convert.checkpoint.containers import read_container, split_subtree
from vit_convert.checkpoint.fetch import is_address, local_name
from vit_convert.core.config import QUANTIZED
from vit_convert.core.errors import ConvertError

MIB = 1 << 20
# benchmarks/convert.py, a straight line through Ti/16 to H/14 on two cores: docs/benchmarks.md, "growth with the
# model".
_BASE_MIB, _BYTES_A_PARAM = 437.0, 4.7
_BASE_S, _S_A_PARAM = 1.0, 38e-9  # without the imports, which a warm worker has already done
# benchmarks/calibrate.py: B/16 with 64 and with 512 images.
_QUANTIZED_BYTES_A_PARAM, _S_A_PARAM_AND_IMAGE = 7.5, 2.3e-9
_UNKNOWN_PARAMS = 90_000_000  # a ViT-B, assumed for an address before it is downloaded
_HEADROOM = 1.1  # above the most measured for a job of the same kind


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The time and memory that a conversion will need.

    Attributes:
        kind: jobs of the same kind need the same: (number of parameters, precision).
        num_params: of the checkpoint.
        seconds: on a machine of two cores with no other work.
        memory_mib: of the worker, at its peak.
        known: whether the checkpoint could be inspected.
    """

    kind: tuple[int, str]
    num_params: int
    seconds: float
    memory_mib: float
    known: bool


def estimate(job: Job, folders: Sequence[str] = ()) -> Estimate:
    """Inspects a job's checkpoint without reading weights.

    Args:
        job: what to convert.
        folders: where to look for an address, or for a path that does not exist.
    """
    precision, images = _value(job, "precision", "fp16"), float(_value(job, "calibration.num_images", "512"))
    found = next((path for path in candidates(job.checkpoint, folders) if os.path.isfile(path)), "")
    num_params = _num_params(found, os.stat(found).st_size) if found else 0
    count = num_params or _UNKNOWN_PARAMS
    quantized = any(word in QUANTIZED or word == "auto" for word in precision.split(","))
    memory = _BASE_MIB + count * (_BYTES_A_PARAM + (_QUANTIZED_BYTES_A_PARAM if quantized else 0)) / MIB
    seconds = _BASE_S + count * (_S_A_PARAM + (_S_A_PARAM_AND_IMAGE * images if quantized else 0))
    return Estimate((count, precision), count, seconds, memory, bool(num_params))


def is_here(job: Job, folders: Sequence[str] = ()) -> bool:
    """Whether a job's checkpoint can be read without a network; true if the config file names it."""
    return not is_address(job.checkpoint) or any(map(os.path.isfile, candidates(job.checkpoint, folders)))


def _value(job: Job, key: str, default: str) -> str:
    """The command line's value for a key; a config file's own value is ignored."""
    found = [match[1] for word in job.overrides if (match := re.fullmatch(rf"--config\.{re.escape(key)}=(.*)", word))]
    return found[-1] if found else default


def candidates(checkpoint: str, folders: Sequence[str]) -> list[str]:
    """The possible places of a checkpoint.

    Args:
        checkpoint: a path or an address, perhaps with a sub-tree.
        folders: to search.
    """
    if is_address(checkpoint):
        address = split_subtree(checkpoint.partition("#")[0])[0]
        names = [local_name(address), address.rpartition("/")[2]]
        return [os.path.join(folder, name) for folder in folders for name in names]
    name = split_subtree(checkpoint)[0] if checkpoint else ""
    return [os.path.join(folder, name) for folder in ("", *folders)] if name else []


@functools.lru_cache(maxsize=4096)
def _num_params(path: str, size: int) -> int:
    try:
        return sum(leaf.size for leaf in read_container(path).leaves.values())
    except (ConvertError, OSError):  # the conversion will report what is wrong with it
        return size // 4


class Corrected:
    """Estimates of memory that learn from measurements."""

    def __init__(self) -> None:
        self._peaks: dict[tuple[int, str], float] = {}
        self._worst = 1.0

    def memory_mib(self, given: Estimate) -> float:
        """The memory to reserve: for a measured kind its peak plus a tenth, otherwise the estimate times the worst
        ratio so far."""
        measured = self._peaks.get(given.kind)
        return measured * _HEADROOM if measured else given.memory_mib * self._worst

    def learn(self, given: Estimate, peak_mib: float) -> None:
        """Learns from a finished job's peak."""
        if peak_mib > 0:
            self._peaks[given.kind] = max(peak_mib, self._peaks.get(given.kind, 0.0))
            self._worst = max(self._worst, peak_mib / given.memory_mib)
