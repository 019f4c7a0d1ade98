"""One conversion of a batch, as it is sent to another process or machine."""

import dataclasses
import hashlib
from typing import Any

import ml_collections

from vit_convert.core import config as configs
from vit_convert.core.config_files import load_config
from vit_convert.core.overrides import apply_overrides


@dataclasses.dataclass(frozen=True)
class Job:
    """Describes one conversion, in a form small enough to keep fifty thousand.

    Attributes:
        name: of its bundle, unique in the batch.
        checkpoint: a path or an address; "" if the config file gives it.
        overrides: "--config.key=value" words, without name and checkpoint.
        config: path of the config file; "" for the defaults.
        argument: for the file's get_config().
        origin: where it was requested, for messages: "zoo/a.npz", "table.csv:3".
    """

    name: str
    checkpoint: str = ""
    overrides: tuple[str, ...] = ()
    config: str = ""
    argument: str = ""
    origin: str = ""

    @property
    def words(self) -> list[str]:
        """The arguments of `python -m vit_convert` for the same conversion; without --config if the job has no config
        file."""
        config = [f"--config={self.config}{f':{self.argument}' if self.argument else ''}"] if self.config else []
        return [*config, *self._overrides]

    @property
    def _overrides(self) -> list[str]:
        checkpoint = [f"--config.checkpoint={self.checkpoint}"] if self.checkpoint else []
        return [*self.overrides, *checkpoint, f"--config.name={self.name}"]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for jobs that differ only in name and checkpoint."""
        return self.config, self.argument, self.overrides, bool(self.checkpoint)

    def make_config(self) -> ml_collections.ConfigDict:
        """The full, checked config, valid until the next call: jobs of one kind share an object, because creating it
        takes longer than finding out that a bundle is fresh.

        Raises:
            UsageError: the config file fails, or a value is out of range.
        """
        if self.kind not in _made:
            given: Any = load_config(self.config, self.argument) if self.config else ml_collections.ConfigDict()
            config = apply_overrides(configs.complete(given, self.name, check=False), self._overrides)
            configs.check_values(config)
            while len(_made) >= _MOST_KINDS:
                _made.pop(next(iter(_made)))
            _made[self.kind] = config
        config = _made[self.kind]
        config.name = self.name
        if self.checkpoint:
            config.checkpoint = self.checkpoint
        return config


_MOST_KINDS = 64
_made: dict[tuple[Any, ...], Any] = {}


def shard_of(name: str, count: int) -> int:
    """The shard, from 1 to `count`, that a job belongs to; the same on every machine and independent of the other jobs.

    Example:
        >>> shard_of("vit_b32", 4)
        2
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % count + 1
