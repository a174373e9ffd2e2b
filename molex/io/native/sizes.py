"""What an export weighs, told before it is written, and its files: shards of safetensors and their index."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from molex.errors import CheckpointError, ConfigError
from molex.io.files import write_json
from molex.io.native.blocks import Entry

INDEX_FILE = "model.safetensors.index.json"


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


def split(entries: Sequence[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Neighbouring tensors, as many in a file as fit; a tensor larger than that has a file of its own."""
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes={max_shard_bytes}; give a number of bytes, at least 1")
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def shard_names(num_shards: int) -> list[str]:
    """As transformers names them."""
    if num_shards == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{num_shards:05}.safetensors" for number in range(1, num_shards + 1)]


def write_shards(shards: Sequence[Sequence[Entry]], folder: Path) -> None:
    """One shard in memory at a time."""
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        save_file({entry.name: entry.write() for entry in shard}, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(entry.num_bytes for shard in shards for entry in shard)
        where = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})


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
