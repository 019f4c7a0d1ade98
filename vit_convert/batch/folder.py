"""The files of a batch in its workdir, beside the bundles."""

import pathlib

from vit_convert.core.bundle import Bundle


class BatchFolder(Bundle):
    """A workdir, and the files that a batch writes there; a shard's files carry its number.

    Args:
        workdir: the folder.
        shard: (number, of how many); None for a whole batch.
    """

    def __init__(self, workdir: str, shard: tuple[int, int] | None = None):
        super().__init__(workdir)
        self._of = f".{shard[0]}-of-{shard[1]}" if shard else ""

    @property
    def lock(self) -> pathlib.Path:
        """The lock: one batch, or one of each shard, at a time."""
        return self.root / f".batch{self._of}.lock"

    @property
    def record(self) -> pathlib.Path:
        """How each job ended: `batch.json`."""
        return self.root / f"batch{self._of}.json"

    @property
    def table(self) -> pathlib.Path:
        """The same for spreadsheets: `batch.csv`."""
        return self.root / f"batch{self._of}.csv"

    @property
    def events(self) -> pathlib.Path:
        """One line for each thing that happened: `batch.events.jsonl`."""
        return self.root / f"batch{self._of}.events.jsonl"

    @property
    def page(self) -> pathlib.Path:
        """The same for people: `batch.html`."""
        return self.root / f"batch{self._of}.html"
