"""Arenas: what rows hold, what they cost by the kernel's own account, and who shares a page."""

import gc
import mmap
import random
import weakref
from pathlib import Path

import pytest
import torch

from molex.errors import BackendError
from molex_serve.memory import cuda_vmm
from molex_serve.memory.arena import arena
from molex_serve.memory.base import Arena
from molex_serve.memory.eager import EagerArena
from molex_serve.memory.mapped import MappedArena

CPU = torch.device("cpu")
PAGE = mmap.PAGESIZE


def make(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Arena:
    return MappedArena(shape, dtype) if kind == "mapped" else EagerArena(shape, dtype, CPU)


@pytest.mark.parametrize("kind", ["mapped", "eager"])
@pytest.mark.parametrize("width", [3, 100, 1024, 1500, 5000])
def test_rows_keep_what_they_hold_and_are_zeros_otherwise(kind: str, width: int) -> None:
    """Rows smaller and larger than a page, at odd places, against an ordinary tensor."""
    made, expected, dice = make(kind, (64, width)), torch.zeros(64, width), random.Random(width)
    held: list[tuple[int, int]] = []
    for step in range(60):
        start = dice.randrange(64)
        stop = dice.randint(start + 1, min(64, start + 9))
        if held and dice.random() < 0.5:
            start, stop = held.pop(dice.randrange(len(held)))
            made.release(start, stop)
            expected[start:stop] = 0
        elif not any(start < end and begin < stop for begin, end in held):
            made.commit(start, stop)
            held.append((start, stop))
            made.tensor[start:stop] = expected[start:stop] = float(step + 1)
        assert made.tensor.equal(expected)
    made.close()
    assert not made.tensor.any()


@pytest.mark.parametrize("kind", ["mapped", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_shapes_and_dtypes(kind: str, dtype: torch.dtype) -> None:
    made = make(kind, (6, 3, 5), dtype)
    assert made.tensor.shape == (6, 3, 5)
    assert made.tensor.dtype == dtype
    assert made.tensor.is_contiguous()
    assert not made.tensor.any()
    made.commit(2, 6)
    made.tensor[2:] = 7
    made.release(2, 5)
    assert made.tensor.to(torch.float64).flatten(1).unique(dim=1).flatten().tolist() == [0, 0, 0, 0, 0, 7]


@pytest.mark.parametrize("kind", ["mapped", "eager"])
def test_rows_are_committed_once_and_released_once(kind: str) -> None:
    made = make(kind, (8, 4))
    made.commit(2, 4)
    for start, stop in ((3, 5), (0, 8), (2, 3)):
        with pytest.raises(AssertionError, match="committed already"):
            made.commit(start, stop)
    for start, stop in ((3, 5), (0, 1)):
        with pytest.raises(AssertionError, match="not committed"):
            made.release(start, stop)
    for start, stop in ((-1, 2), (7, 9), (4, 4), (5, 4)):
        with pytest.raises(AssertionError):
            made.commit(start, stop)


def test_pages_are_counted_and_shared_by_neighbours() -> None:
    """Rows of three quarters of a page: row r is on pages floor(3r/4) to ceil(3(r+1)/4)."""
    made = MappedArena((16, 3 * PAGE // 16), torch.float32)
    made.commit(0, 1)
    assert made.committed_bytes == PAGE
    made.commit(2, 3)
    assert made.committed_bytes == 3 * PAGE
    made.commit(1, 2)  # pages 0 and 1, which its neighbours have
    assert made.committed_bytes == 3 * PAGE
    made.tensor[:3] = 1
    made.release(0, 1)
    assert made.tensor[1:3].eq(1).all()
    assert made.committed_bytes == 3 * PAGE
    made.release(2, 3)
    assert made.committed_bytes == 2 * PAGE
    made.release(1, 2)
    assert made.committed_bytes == 0


def test_the_address_stays() -> None:
    made = MappedArena((1000, 1000), torch.float32)
    view, address = made.tensor[10:20], made.tensor.data_ptr()
    made.commit(10, 20)
    made.tensor[10:20] = 3
    assert made.tensor.data_ptr() == address
    assert view.eq(3).all()


def test_memory_lives_as_long_as_a_tensor() -> None:
    made = MappedArena((1000, 1000), torch.float32)
    gone = weakref.ref(made._memory)
    made.commit(0, 10)
    view = made.tensor[:10]
    view.fill_(5)
    made.close()
    made.close()
    del made
    gc.collect()
    assert gone() is not None
    assert not view.any()
    view.fill_(6)  # wrong of its holder, and yet no crash
    del view
    gc.collect()
    assert gone() is None


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


def measure() -> list[float]:
    """Reserves 8 GiB, writes 50 MiB and releases the half: what is resident after each step, over the start."""
    found = [resident()]
    made = MappedArena((1 << 15, 1 << 17), torch.bfloat16)
    on_every_page = made.tensor[:, :: PAGE // 2]
    found.append(resident())
    made.commit(100, 300)
    made.tensor[100:300] = 1
    found.append(resident())
    assert on_every_page[5000:5100].sum() == 0
    found.append(resident())
    made.release(150, 250)
    found.append(resident())
    assert on_every_page[90:310].sum() == 100 * (1 << 17) // (PAGE // 2)
    assert made.committed_bytes == 25 << 20
    made.close()
    found.append(resident())
    return [number - found[0] for number in found[1:]]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
def test_what_the_kernel_counts() -> None:
    measure()  # what is allocated once
    reserved, written, read, half, closed = measure()
    assert max(reserved, closed) < 1
    assert 49 < written < 51
    assert abs(read - written) < 1  # untouched rows are all the kernel's one page of zeros
    assert 24 < half < 26


def test_what_a_device_gets() -> None:
    assert isinstance(arena((4, 4), torch.float32, CPU), MappedArena)
    with pytest.warns(RuntimeWarning, match="allocated at once: meta has no virtual memory"):
        assert isinstance(arena((4, 4), torch.float32, torch.device("meta")), EagerArena)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_why_there_is_no_virtual_memory_of_a_gpu() -> None:
    assert cuda_vmm.why_not(torch.device("cuda")) == "torch finds no GPU"


def test_too_many_addresses() -> None:
    with pytest.raises(BackendError, match="GiB of addresses cannot be reserved"):
        MappedArena((1 << 10, 1 << 50), torch.float32)
