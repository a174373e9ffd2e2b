"""What an export weighs, told before it is written."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from molex.errors import CheckpointError


@dataclass(frozen=True)
class Forecast:
    """Bytes of weights: of the base alone, and of the exported model; in how many files."""

    dense_bytes: int
    exported_bytes: int
    num_shards: int

    @property
    def ratio(self) -> float:
        """How many times the base."""
        return self.exported_bytes / self.dense_bytes

    def __str__(self) -> str:
        dense, exported = self.dense_bytes / 1e9, self.exported_bytes / 1e9
        return f"{exported:.3g} GB in {self.num_shards} files, {self.ratio:.2f} times the base's {dense:.3g} GB"


def check_space(directory: Path, num_bytes: int) -> None:
    """Raises CheckpointError where the disk under a folder, made or not, has not that much room."""
    there = next(path for path in _upwards(directory.absolute()) if path.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise CheckpointError(
            f"{directory}: the export takes {num_bytes / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; give another folder"
        )


def _upwards(path: Path) -> Iterator[Path]:
    yield path
    yield from path.parents
