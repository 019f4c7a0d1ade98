"""What a conversion takes of time and memory: by a checkpoint's header, corrected by what was measured."""

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
# benchmarks/convert.py, one straight line through Ti/16 to H/14 on two cores: docs/benchmarks.md, "growth with the
# model".
_BASE_MIB, _BYTES_A_PARAM = 437.0, 4.7
_BASE_S, _S_A_PARAM = 1.0, 38e-9  # less the imports, which a warm worker has behind it
# benchmarks/calibrate.py: B/16 with 64 and with 512 images.
_QUANTIZED_BYTES_A_PARAM, _S_A_PARAM_AND_IMAGE = 7.5, 2.3e-9
_UNKNOWN_PARAMS = 90_000_000  # a ViT-B: of an address that is not here, before it is fetched
_HEADROOM = 1.1  # over the most that was measured of a job of the same kind


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a conversion will take.

    Attributes:
        kind: jobs of one kind take the same: (number of parameters, precision).
        num_params: of the checkpoint.
        seconds: on a machine of two cores with no other work.
        memory_mib: of the worker, at its peak.
        known: whether the checkpoint was there to look at.
    """

    kind: tuple[int, str]
    num_params: int
    seconds: float
    memory_mib: float
    known: bool


def estimate(job: Job, folders: Sequence[str] = ()) -> Estimate:
    """Looks at a job's checkpoint, and reads no weights.

    Args:
        job: what to convert.
        folders: where an address, or a path that is not there, is looked for.
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
    """Whether a job's checkpoint can be read without a network; true where the config file says which it is."""
    return not is_address(job.checkpoint) or any(map(os.path.isfile, candidates(job.checkpoint, folders)))


def _value(job: Job, key: str, default: str) -> str:
    """What the command line says of a key; a config file's own value is not looked at."""
    found = [match[1] for word in job.overrides if (match := re.fullmatch(rf"--config\.{re.escape(key)}=(.*)", word))]
    return found[-1] if found else default


def candidates(checkpoint: str, folders: Sequence[str]) -> list[str]:
    """Where a checkpoint may lie.

    Args:
        checkpoint: a path or an address, perhaps with a sub-tree.
        folders: where it is looked for.
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
    except (ConvertError, OSError):  # the conversion will say what is wrong with it
        return size // 4


class Corrected:
    """Estimates of memory that learn from what was measured."""

    def __init__(self) -> None:
        self._peaks: dict[tuple[int, str], float] = {}
        self._worst = 1.0

    def memory_mib(self, given: Estimate) -> float:
        """What to set aside: of a measured kind its peak and a tenth, else the estimate by the worst ratio so far."""
        measured = self._peaks.get(given.kind)
        return measured * _HEADROOM if measured else given.memory_mib * self._worst

    def learn(self, given: Estimate, peak_mib: float) -> None:
        """Takes a finished job's peak in."""
        if peak_mib > 0:
            self._peaks[given.kind] = max(peak_mib, self._peaks.get(given.kind, 0.0))
            self._worst = max(self._worst, peak_mib / given.memory_mib)
