"""How a checkpoint is split into files, as transformers names and indexes them."""

import re
from collections.abc import Sequence
from pathlib import Path

from molex.checks import listed
from molex.errors import CheckpointError, ConfigError
from molex.io.files import write_json
from molex.io.stream import Entry, write_stream

INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", INDEX_FILE)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def num_bytes(size: int | str) -> int:
    """ "5GB", "500MB", "1GiB" or a number of bytes. Raises ConfigError on anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", str(size).strip().upper())
    number = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if isinstance(size, bool) or number < 1:
        raise ConfigError(f"shard_size={size!r}; give a number of bytes, or one with KB, MB, GB, KiB, MiB, GiB")
    return number


def split(entries: Sequence[Entry], limit: int) -> dict[str, list[Entry]]:
    """Neighbouring tensors, as many in a file as `limit` bytes hold, by the file's name; a larger one is alone."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.header.num_bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.header.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_shards(shards: dict[str, list[Entry]], folder: Path) -> None:
    """The files and, where there are several, their index; one tensor is in memory at a time."""
    for name, shard in shards.items():
        write_stream(folder / name, shard, {"format": "pt"})
    if len(shards) > 1:
        total = sum(entry.header.num_bytes for shard in shards.values() for entry in shard)
        placed = {entry.name: name for name, shard in shards.items() for entry in shard}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": placed})


def check_no_weights(out: Path) -> None:
    """Raises CheckpointError where a folder holds a model's weights: shards of two checkpoints would mix."""
    found = [path.name for pattern in WEIGHT_FILES for path in out.glob(pattern)] if out.is_dir() else []
    if found:
        raise CheckpointError(f"{out} holds weights already ({listed(found)}); give another folder, or remove them")
