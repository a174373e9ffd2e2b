"""Writing that never leaves half a file behind, and reading that refuses whatever is not what it should be.

Only safetensors and JSON: nothing here can run code that a file brings along.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from molex.errors import CheckpointError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Header(NamedTuple):
    """What a safetensors file says about one tensor; `dtype` is the format's own code ("F32", "BF16", "I64")."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_values(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        digits = re.search(r"\d+", self.dtype)
        return self.num_values * int(digits[0] if digits else 8) // 8


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A scratch folder inside `directory`; its files replace their namesakes there once the block has ended well.

    After an exception the folder is as it was. Raises CheckpointError where `directory` is a file or cannot be made.
    """
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file; give a folder to save into")
    existed = directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be made: {error.strerror}; give another folder") from error
    try:
        with TemporaryDirectory(prefix=".saving-", dir=directory) as scratch:
            yield Path(scratch)
            written = sorted(Path(scratch).iterdir())
            for path in written:
                _flush(path)
            for path in written:
                os.replace(path, directory / path.name)
    finally:
        if not existed and not any(directory.iterdir()):
            directory.rmdir()


def _flush(path: Path) -> None:
    """To the disk itself, so that a power cut after the renaming finds the bytes."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Indented UTF-8 with a newline at the end."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError unless the file is there and holds a JSON object."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged, it is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(document).__name__}, not an object")
    return document


def read_headers(path: Path) -> tuple[dict[str, Header], dict[str, str]]:
    """Each tensor's shape and dtype, and the file's own metadata. Raises CheckpointError as `read_tensors` does."""
    with _damage_named(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        headers = {name: Header(tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
        return headers, file.metadata() or {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor, on the CPU, in memory of its own: what is written into the file later changes none, where a mapped
    one would follow, or end the process. By name, so that all processes have one order. Raises CheckpointError where
    it is missing, damaged, cut short or foreign."""
    with _damage_named(path):
        return dict(sorted(load(path.read_bytes()).items()))


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged, cut short or no safetensors file: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{path} has numbers of a kind that torch lacks: {error}") from error


def check_numbers(place: str, *tensors: Tensor) -> None:
    """Raises CheckpointError unless all are finite floating-point numbers, of types that can be computed with."""
    for tensor in tensors:
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{place} is {tensor.dtype}; give floating-point numbers of 16 bits or more")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{place} has values that are not finite: damaged, or training diverged")
