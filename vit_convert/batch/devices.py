"""The GPUs that engine tasks run on."""

import csv
import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Protocol

from vit_convert.batch.outcome import EngineOutcome
from vit_convert.core.errors import UsageError

_FIX = "Name them, --gpus=0,1, or leave --engines to a host that has one."
_QUERY_S = 60.0  # a driver may need a while to wake many GPUs


@dataclasses.dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        id: as in CUDA_VISIBLE_DEVICES: "0", or the beginning of a UUID; "" on a cluster, where Ray assigns it.
        type: its name, which distinguishes engines: "NVIDIA H100 80GB HBM3", on Ray "H100"; "" if unknown.
    """

    id: str
    type: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that let a process see only this GPU."""
        # In the order in which nvidia-smi counts them, not by speed.
        return {"CUDA_VISIBLE_DEVICES": self.id, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if self.id else {}


class Gpus(Protocol):
    """Where engine tasks run: this machine's GPUs, or a cluster's."""

    def devices(self) -> list[Device]:
        """All GPUs; on a cluster as many of each type as it has now."""

    def run(self, name: str, device: Device) -> EngineOutcome:
        """Runs the task of one bundle on one GPU; called from a thread for each GPU.

        Raises:
            Cancelled: after `close`.
        """

    def close(self) -> None:
        """Ends running tasks; called from another thread than `run`."""


def local_devices(words: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[Device]:
    """The GPUs of this machine that tasks may use.

    Args:
        words: of --gpus: "0", "GPU-8f2b…", or "0:L4" with the type for which its engines are; empty for all visible
            ones.
        environment: its CUDA_VISIBLE_DEVICES says what is visible.

    Raises:
        UsageError: there is none, or one is named twice.

    Example:
        >>> local_devices(["0:L4", "1:L4"], {})
        [Device(id='0', type='L4'), Device(id='1', type='L4')]
    """
    found = _asked_driver()
    if words:
        devices = [_named(word, found) for word in words]
    elif (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        devices = [_named(word.strip(), found) for word in visible.split(",") if word.strip()]
    else:
        devices = [Device(index, name) for index, _, name in found]
    if not devices:
        raise UsageError("--engines: this machine shows no GPU", fix=_FIX)
    if len({device.id for device in devices}) < len(devices):
        raise UsageError(f"--gpus={','.join(words)}: one of them twice", fix=_FIX)
    return devices


def _named(word: str, found: Sequence[tuple[str, str, str]]) -> Device:
    id, _, type = word.partition(":")
    if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", id):
        raise UsageError(f"--gpus: {word!r} names no GPU", fix="A number or a UUID, as CUDA_VISIBLE_DEVICES has them.")
    known = next((name for index, uuid, name in found if id == index or (id[:1] in "GM" and uuid.startswith(id))), "")
    return Device(id, type or known)


def _asked_driver() -> list[tuple[str, str, str]]:
    """(number, UUID, name) of each GPU from the driver's own program, which needs no CUDA context."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [(row[0], row[1], row[2]) for row in rows if len(row) == 3 and row[0].isdigit()]
