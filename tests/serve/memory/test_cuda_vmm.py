"""Arenas of a GPU's memory on a pretended driver: what it is told, in which order, and that nothing is left behind."""

import gc
import random
import sys
import threading
from collections import Counter

import pytest
import torch

from molex.errors import BackendError
from molex_serve.memory.cuda_vmm import CudaArena, Device
from tests.serve.memory.fake_cuda import CONTEXT, GRANULARITY, FakeDriver, as_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pretended pages are files in memory")

QUARTER = GRANULARITY // 16  # numbers of 4 bytes: four rows a page


def make(shape: tuple[int, ...], driver: FakeDriver, dtype: torch.dtype = torch.float32) -> CudaArena:
    return CudaArena(shape, dtype, Device(0, driver, lambda: None), as_bytes)


def since(driver: FakeDriver) -> list[str]:
    calls, driver.calls = driver.calls, []
    return calls


@pytest.mark.parametrize("width", [3, QUARTER, 3 * QUARTER, 4 * QUARTER, 11 * QUARTER + 5])
def test_rows_keep_what_they_hold_and_are_zeros_otherwise(width: int) -> None:
    driver = FakeDriver()
    made, expected, dice = make((40, width), driver), torch.zeros(40, width), random.Random(width)
    held: list[tuple[int, int]] = []
    for step in range(60):
        start = dice.randrange(40)
        stop = dice.randint(start + 1, min(40, start + 9))
        driver.busy = True  # kernels of the last step may still run
        if held and dice.random() < 0.5:
            start, stop = held.pop(dice.randrange(len(held)))
            made.release(start, stop)
            expected[start:stop] = 0
            assert not driver.busy
        elif not any(start < end and begin < stop for begin, end in held):
            made.commit(start, stop)
            held.append((start, stop))
            assert not made.tensor[start:stop].any()
            made.tensor[start:stop] = expected[start:stop] = float(step + 1)
        assert made.tensor.equal(expected)
        assert len(driver.files) == 1 + made.committed_bytes // GRANULARITY
        assert driver.stack == []
    made.close()
    assert len(driver.files) == 1
    assert not made.tensor.any()


def test_what_is_called() -> None:
    """Two pages for rows 2 to 7 of four a page: zeros give way, then come back before the memory is released."""
    driver = FakeDriver()
    made = make((16, QUARTER), driver)
    opening = Counter(since(driver))
    assert opening["cuMemAddressReserve"] == 2  # ours, and one for a moment, to clear the page of zeros
    assert (opening["cuMemMap"], opening["cuMemCreate"], opening["cuMemUnmap"]) == (5, 1, 1)
    made.commit(2, 7)
    wait, swap = ["cuCtxSynchronize"], ["cuMemUnmap", "cuMemMap", "cuMemSetAccess"]
    assert since(driver) == 2 * ["cuMemCreate"] + wait + 2 * swap + 2 * ["cuMemsetD8"] + wait
    made.commit(1, 2)
    made.commit(0, 1)
    assert not set(since(driver)) - {"cuCtxSynchronize"}  # their page is there
    made.release(2, 7)
    calls = [call for call in since(driver) if call != "cuCtxSynchronize"]
    assert calls == [*swap, "cuMemRelease"]  # the second page alone
    assert made.committed_bytes == GRANULARITY


def test_nothing_is_left_behind() -> None:
    driver = FakeDriver()
    made = make((16, QUARTER), driver)
    made.commit(3, 9)
    view = made.tensor[3:9]
    del made
    gc.collect()
    assert view.eq(0).all()
    assert (len(driver.reserved), len(driver.mapped), len(driver.files)) == (1, 4, 4)
    del view
    gc.collect()
    assert (len(driver.reserved), len(driver.mapped), len(driver.files)) == (0, 0, 1)
    assert driver.stack == []


def test_arenas_of_a_device_share_their_zeros() -> None:
    driver = FakeDriver()
    device = Device(0, driver, lambda: None)
    arenas = [CudaArena((16, QUARTER), torch.float32, device, as_bytes) for _ in range(3)]
    assert len(driver.files) == 1
    arenas[1].commit(0, 16)
    arenas[1].tensor.fill_(1)
    assert not arenas[0].tensor.any()
    assert not arenas[2].tensor.any()


def test_any_thread_may_call_and_finds_its_context_again() -> None:
    driver = FakeDriver()
    made = make((16, QUARTER), driver)
    found: list[list[str]] = []

    def elsewhere() -> None:
        driver.stack.append("another context")
        made.commit(0, 8)
        made.release(0, 8)
        found.append(list(driver.stack))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(10)
    assert found == [["another context"]]
    assert CONTEXT not in driver.stack


@pytest.mark.parametrize(
    ("call", "after"), [("cuMemCreate", 1), ("cuMemMap", 0), ("cuMemMap", 2), ("cuMemSetAccess", 1), ("cuMemsetD8", 1)]
)
def test_a_commit_that_fails_changes_nothing(call: str, after: int) -> None:
    driver = FakeDriver()
    made = make((16, QUARTER), driver)
    made.commit(0, 2)
    made.tensor[:2] = 1
    driver.fail[call] = after
    with pytest.raises(BackendError, match=f"{call} of GPU 0 failed: CUDA_ERROR"):
        made.commit(2, 16)
    assert made.committed_bytes == GRANULARITY
    assert (len(driver.files), len(driver.mapped), driver.stack) == (2, 4, [])
    assert made.tensor.sum() == 2 * QUARTER
    made.commit(2, 16)
    made.tensor[2:] = 1
    assert made.tensor.sum() == 16 * QUARTER


def test_cached_memory_is_freed_where_none_is_left() -> None:
    driver, asked = FakeDriver(capacity=3), []

    def free_cached() -> None:
        asked.append(driver.capacity)
        driver.capacity += 1

    made = CudaArena((16, QUARTER), torch.float32, Device(0, driver, free_cached), as_bytes)
    made.commit(0, 12)
    assert asked == [3]
    driver.capacity = -1
    with pytest.raises(BackendError, match="cuMemCreate of GPU 0 failed: CUDA_ERROR_OUT_OF_MEMORY"):
        made.commit(12, 16)


def test_addresses_that_cannot_be_mapped_are_given_back() -> None:
    driver = FakeDriver()
    device = Device(0, driver, lambda: None)
    driver.fail["cuMemMap"] = 2
    with pytest.raises(BackendError, match="cuMemMap"):
        CudaArena((16, QUARTER), torch.float32, device, as_bytes)
    assert (driver.reserved, driver.mapped, driver.stack) == ({}, {}, [])


def test_a_gpu_without_virtual_memory() -> None:
    with pytest.raises(BackendError, match="GPU 0 has no virtual memory management"):
        Device(0, FakeDriver(supported=0), lambda: None)


def test_16_bit_numbers_and_more_dimensions() -> None:
    made = make((5, 3, 700), FakeDriver(), torch.bfloat16)
    assert made.tensor.shape == (5, 3, 700)
    made.commit(1, 3)
    made.tensor[1:3] = 2
    assert made.tensor.flatten(1).float().mean(1).tolist() == [0, 2, 2, 0, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu() -> None:
    pytest.importorskip("cuda.bindings")
    from molex_serve.memory.cuda_vmm import device_of

    device = torch.device("cuda")
    made = CudaArena((64, 1 << 20), torch.bfloat16, device_of(device))
    free = torch.cuda.mem_get_info()[0]
    made.commit(8, 24)
    made.tensor[8:24] = 1
    assert made.tensor.float().sum() == 16 << 20
    assert free - torch.cuda.mem_get_info()[0] >= 30 << 20
    made.release(8, 24)
    assert not made.tensor.any()
    assert free - torch.cuda.mem_get_info()[0] <= 2 << 20
