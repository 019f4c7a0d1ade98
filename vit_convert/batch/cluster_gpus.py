"""Engine tasks on the GPUs of a Ray cluster: each is a task of one GPU, of the type that its engines are for."""

import contextlib
import os
import threading
from typing import Any

from vit_convert.batch.devices import Device
from vit_convert.batch.engines import Cancelled, EngineSettings, Tasks
from vit_convert.batch.outcome import EngineOutcome
from vit_convert.batch.remote_engines import run_task
from vit_convert.core.errors import UsageError

_TYPE = "accelerator_type:"  # Ray's resource for a node's type of GPU, as detected or given to `ray start`
_END_S = 10.0


class RayGpus:
    """The GPUs of a cluster, by type.

    The loss of a node counts as temporary: the next attempt goes to another node with that type.

    Args:
        ray: the module, connected.
        workdir: of the batch, as all nodes see it.
        settings: of its engine tasks.

    Raises:
        UsageError: no node has a GPU.
    """

    def __init__(self, ray: Any, workdir: str, settings: EngineSettings):
        self._ray, self._workdir, self._settings = ray, workdir, settings
        # No core is reserved, so that no GPU waits for one behind conversions, which Ray places on nodes without a GPU
        # while there is room.
        self._task = ray.remote(max_retries=0, num_cpus=0, num_gpus=1)(engine_task)
        self._running: set[Any] = set()
        self._closed = threading.Event()
        if not self.devices():
            raise UsageError(
                "--engines: no node of the cluster has a GPU",
                fix="Where Ray finds none itself: ray start --num-gpus=1 --resources='{\"accelerator_type:L4\": 1}'.",
            )

    def devices(self) -> list[Device]:
        """One for each GPU of every living node; Ray decides which one of a node."""
        found = []
        for node in self._ray.nodes():
            resources = node["Resources"] if node["Alive"] else {}
            type = next((name.removeprefix(_TYPE) for name in sorted(resources) if name.startswith(_TYPE)), "")
            found += [Device("", type)] * int(resources.get("GPU", 0))
        return found

    def run(self, name: str, device: Device) -> EngineOutcome:
        """See `Gpus`."""
        errors = self._ray.exceptions
        resources = {f"{_TYPE}{device.type}": 0.001} if device.type else {}  # a share of the node's single unit
        task = self._task.options(resources=resources)
        reference = task.remote(self._workdir, name, self._settings, device.type)
        self._running.add(reference)
        try:
            if self._closed.is_set():
                self._ray.cancel(reference)
            outcome: EngineOutcome = self._ray.get(reference)
        except errors.RayError as e:
            if self._closed.is_set():
                raise Cancelled from e
            how = f"its task ended by {type(e).__name__} ({' '.join(str(e).split())[:300]})"
            return EngineOutcome(gpu=device.type, error=how, passing=True)
        finally:
            self._running.discard(reference)
        return outcome

    def close(self) -> None:
        """Cancels running tasks and lets them release their bundles."""
        self._closed.set()
        running = list(self._running)
        for reference in running:
            self._ray.cancel(reference, force=False)
        _, left = self._ray.wait(running, num_returns=len(running), timeout=_END_S) if running else ([], [])
        for reference in left:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.cancel(reference, force=True)


def engine_task(workdir: str, name: str, settings: EngineSettings, gpu: str) -> EngineOutcome:
    """One bundle's engines, in a process of Ray's that sees one GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return run_task(Tasks(), workdir, name, settings, Device(given, gpu))
