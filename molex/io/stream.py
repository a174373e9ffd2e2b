"""safetensors one tensor at a time, on both sides: a checkpoint is rewritten in the memory of its largest tensor.

    8 bytes: length of the header | header: {name: {dtype, shape, data_offsets}} as JSON | the tensors' bytes

The library's own reader maps whole files and its writer takes all tensors at once. A header says sizes before values
are known, so here it is written first, and each tensor's bytes are asked for when their turn comes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from molex.errors import CheckpointError
from molex.io.files import Header, read_headers

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Slot(NamedTuple):
    """Where one tensor's bytes lie in a file."""

    path: Path
    header: Header
    start: int

    def read(self) -> bytearray:
        """Its bytes. Raises CheckpointError where the file ends before they do."""
        data = bytearray(self.header.num_bytes)
        with self.path.open("rb") as file:
            file.seek(self.start)
            if file.readinto(data) != len(data):
                raise CheckpointError(f"{self.path} is cut short")
        return data

    def tensor(self) -> Tensor:
        """Its values where it is of one of DTYPES, otherwise its bytes."""
        dtype = DTYPES.get(self.header.dtype, torch.uint8)
        flat = torch.frombuffer(self.read(), dtype=dtype) if self.header.num_bytes else torch.empty(0, dtype=dtype)
        return flat.view(self.header.shape) if self.header.dtype in DTYPES else flat


def read_slots(path: Path) -> dict[str, Slot]:
    """Every tensor of a file, by name. Raises CheckpointError where the file is damaged, cut short or foreign."""
    headers, _ = read_headers(path)  # the library checks the whole header, and that the file holds all it says
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    return {name: Slot(path, header, 8 + length + entries[name]["data_offsets"][0]) for name, header in headers.items()}


class Entry(NamedTuple):
    """A tensor to write, before it exists. `make` gives its values when its turn comes, in the header's dtype or wider,
    or its bytes (uint8) where the header's dtype is none of DTYPES."""

    name: str
    header: Header
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> "Entry":
        """With the header that tells of this shape, and of one of DTYPES."""
        return cls(name, Header(shape, CODES[dtype]), make)

    def data(self) -> memoryview:
        """Its bytes as the file holds them, without a copy where it is made contiguous, on the CPU and in its dtype."""
        made, (shape, code) = self.make().detach(), self.header
        if code in DTYPES:
            assert tuple(made.shape) == shape, f"{self.name} is {tuple(made.shape)}, not {shape}"
            made = made.to("cpu", DTYPES[code])
        data = made.contiguous().view(-1).view(torch.uint8).numpy().data
        assert len(data) == self.header.num_bytes, f"{self.name}: {len(data)} bytes, {self.header} was promised"
        return data


def write_stream(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, asking for one tensor at a time."""
    # wide dtypes first, as the library does: every tensor then starts at a multiple of its dtype's size
    ordered = sorted(entries, key=lambda entry: -_width(entry.header))
    document: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in ordered:
        start, end = end, end + entry.header.num_bytes
        document[entry.name] = {
            "dtype": entry.header.dtype,
            "shape": list(entry.header.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            file.write(entry.data())


def _width(header: Header) -> float:
    return header.num_bytes / header.num_values if header.num_values else 0.0
