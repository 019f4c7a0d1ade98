"""A host's TensorRT at work on one bundle: what building, verifying, measuring and tuning have in common."""

import dataclasses
import functools
import pathlib

import ml_collections

from vit_convert.core.bundle import Bundle
from vit_convert.core.progress import Progress
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.handoff import Facts, judged_by, read_facts


@dataclasses.dataclass(frozen=True)
class EngineHost:
    """What every command on engines works with.

    Attributes:
        backend: the TensorRT that builds and runs.
        bundle: holds the graphs; gets the engines.
        config: the resolved config.
        facts: what the export side found out about the model.
        progress: what people and machines see.
        command: the command line, for records.
    """

    backend: Backend
    bundle: Bundle
    config: ml_collections.ConfigDict
    facts: Facts
    progress: Progress
    command: str = ""

    @classmethod
    def open(
        cls,
        backend: Backend,
        bundle: Bundle,
        config: ml_collections.ConfigDict,
        progress: Progress,
        *,
        command: str = "",
    ) -> "EngineHost":
        """The host for a bundle, whose facts are read now.

        Raises:
            UsageError: the conversion has not got far enough.
        """
        return cls(backend, bundle, config, read_facts(bundle), progress, command)

    def plan(self, precision: str) -> pathlib.Path:
        """The path of the engine of a precision that is built here."""
        return self.bundle.plan(self.backend.name, self.backend.version, self.backend.arch, precision)

    def in_bundle(self, path: pathlib.Path) -> str:
        """A path as in the report: relative to the bundle."""
        return str(path.relative_to(self.bundle.root))

    @functools.cached_property
    def judge(self) -> str:
        """The hash of what the bundle's engines are compared with."""
        return judged_by(self.bundle)
