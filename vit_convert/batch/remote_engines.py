"""Engine tasks for bundles in a remote workdir, which are downloaded, worked on, and committed again."""

import dataclasses
import os
import pathlib
import socket
import tempfile

from vit_convert.batch.devices import Device
from vit_convert.batch.engines import EngineSettings, Tasks, kept
from vit_convert.batch.outcome import EngineOutcome
from vit_convert.batch.remote import StoreError, forget, remote_at
from vit_convert.core.bundle import Bundle
from vit_convert.core.errors import ConvertError, HeldError, PassingError


def run_task(tasks: Tasks, workdir: str, name: str, settings: EngineSettings, device: Device) -> EngineOutcome:
    """Runs an engine task, wherever its bundle is; see `Tasks.run`."""
    if not settings.remote:
        return tasks.run(workdir, name, settings, device)
    bundle, remote = Bundle(os.path.join(workdir, name)), remote_at(settings.remote)
    begun = EngineOutcome(gpu=device.type, device=device.id, host=socket.gethostname(), attempts=1)
    try:
        commit = remote.commits([name]).get(name)
        if commit is None:
            raise StoreError(f"{settings.remote}/{name}: is not committed")
        remote.pull(name, bundle.root, commit)
        outcome = tasks.run(workdir, name, settings, device)
        if not (outcome.passing and outcome.exit_code == HeldError.exit_code):  # another's files
            remote.push(bundle, commit.key, commit.checkpoint, commit.outcome)  # keep what was built, whatever failed
            forget(bundle)
    except ConvertError as e:
        passing = isinstance(e, PassingError)
        return dataclasses.replace(begun, exit_code=e.exit_code, error=str(e), fix=e.fix, passing=passing)
    return outcome


def kept_of(workdir: str, name: str, settings: EngineSettings, gpu: str) -> EngineOutcome | None:
    """What was done with a bundle on a type of GPU, wherever it is; see `kept`."""
    if not settings.remote:
        return kept(Bundle(os.path.join(workdir, name)), settings, gpu)
    remote = remote_at(settings.remote)
    commit = None if settings.force else remote.commits([name]).get(name)
    if commit is None:
        return None
    plans = {part: file.bytes for part, file in commit.files.items() if part.endswith(".plan")}
    with tempfile.TemporaryDirectory() as folder:
        remote.pull(name, pathlib.Path(folder), commit, of=_is_note)
        return kept(Bundle(folder), settings, gpu, plans)


def _is_note(part: str) -> bool:
    """Whether a file is one of the small ones that record what was done."""
    return part.endswith("manifest.json") or part.startswith("engines/batch-")
