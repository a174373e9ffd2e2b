"""How a checkpoint is split into files, as transformers names and indexes them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molex.checks import listed
from molex.errors import CheckpointError, ConfigError
from molex.io.files import Header

WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def split(headers: Mapping[str, Header], shard_size: int | str) -> list[dict[str, Header]]:
    """Files of at most shard_size bytes of tensors, in order; a larger tensor gets a file of its own."""
    limit = num_bytes(shard_size)
    shards: list[dict[str, Header]] = [{}]
    filled = 0
    for name, header in headers.items():
        if shards[-1] and filled + header.num_bytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = header
        filled += header.num_bytes
    return shards


def num_bytes(size: int | str) -> int:
    """ "5GB", "500MB", "1GiB" or a number of bytes. Raises ConfigError on anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", str(size).strip().upper())
    number = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if isinstance(size, bool) or number < 1:
        raise ConfigError(f"shard_size={size!r}; give a number of bytes, or one with KB, MB, GB, KiB, MiB, GiB")
    return number


def shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_of(names: Sequence[str], shards: Sequence[Mapping[str, Header]]) -> dict[str, Any]:
    """model.safetensors.index.json."""
    total = sum(header.num_bytes for shard in shards for header in shard.values())
    placed = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    return {"metadata": {"total_size": total}, "weight_map": placed}


def check_no_weights(out: Path) -> None:
    """Raises CheckpointError where a folder holds a model's weights: shards of two checkpoints would mix."""
    found = [path.name for pattern in WEIGHT_FILES for path in out.glob(pattern)] if out.is_dir() else []
    if found:
        raise CheckpointError(f"{out} holds weights already ({listed(found)}); give another folder, or remove them")
