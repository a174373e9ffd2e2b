"""Arenas of a GPU's memory, by CUDA's virtual memory management, through `cuda.bindings`.

Addresses are reserved for the whole tensor. A page of them (2 MiB) has memory of its own while a row on it is
committed; all others are one and the same page of zeros, so that holes can be read as on a CPU, and cost nothing.
Changing a page is not ordered with streams: the device is waited for before and after.
"""

import importlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from molex.errors import BackendError
from molex_serve.memory.base import PagedArena


class Device:
    """One GPU's part of the driver, `api`, its calls checked. free_cached: gives back memory that nobody uses."""

    def __init__(self, index: int, api: Any, free_cached: Callable[[], None]):
        self.index, self.api, self.free_cached = index, api, free_cached
        self.call("cuInit", 0)
        number = self.call("cuDeviceGet", index)
        attribute = api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not self.call("cuDeviceGetAttribute", attribute, number):
            raise BackendError(f"GPU {index} has no virtual memory management")
        self._context = self.call("cuDevicePrimaryCtxRetain", number)  # torch's own
        self._memory = api.CUmemAllocationProp()
        self._memory.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._memory.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._memory.location.id = index
        self._access = api.CUmemAccessDesc()
        self._access.location = self._memory.location
        self._access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        smallest = api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        with self.current():
            self.page_bytes = int(self.call("cuMemGetAllocationGranularity", self._memory, smallest))
            self.zeros = self.create()
            self._clear_zeros()

    def call(self, name: str, *arguments: Any) -> Any:
        """What a function of the driver returns beside its code. Raises BackendError where the code is no success."""
        code, *values = getattr(self.api, name)(*arguments)
        if code != self.api.CUresult.CUDA_SUCCESS:
            raise BackendError(f"{name} of GPU {self.index} failed: {code.name}")
        return values[0] if values else None

    @contextmanager
    def current(self) -> Iterator[None]:
        """The driver's calls are for the context that is current in the thread, which afterwards is as it was."""
        self.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent")

    def wait(self) -> None:
        """For all streams."""
        self.call("cuCtxSynchronize")

    def create(self) -> Any:
        """A page of memory, of any content. Raises BackendError where none is left."""
        code, handle = self.api.cuMemCreate(self.page_bytes, self._memory, 0)
        if code == self.api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            self.free_cached()
            return self.call("cuMemCreate", self.page_bytes, self._memory, 0)
        if code != self.api.CUresult.CUDA_SUCCESS:
            raise BackendError(f"cuMemCreate of GPU {self.index} failed: {code.name}")
        return handle

    def release(self, handle: Any) -> None:
        self.call("cuMemRelease", handle)

    def map(self, address: int, handle: Any) -> None:
        """Puts a page of memory at an address that has none. Raises BackendError; then it still has none."""
        self.call("cuMemMap", address, self.page_bytes, 0, handle, 0)
        try:
            self.call("cuMemSetAccess", address, self.page_bytes, [self._access], 1)
        except BackendError:
            self.unmap(address)
            raise

    def unmap(self, address: int) -> None:
        self.call("cuMemUnmap", address, self.page_bytes)

    def clear(self, address: int) -> None:
        """Fills a page with zeros."""
        self.call("cuMemsetD8", address, 0, self.page_bytes)

    def _clear_zeros(self) -> None:
        address = int(self.call("cuMemAddressReserve", self.page_bytes, 0, 0, 0))
        self.map(address, self.zeros)
        self.clear(address)
        self.wait()
        self.unmap(address)
        self.call("cuMemAddressFree", address, self.page_bytes)


class Pages:
    """A range of addresses, and the memory at each of its pages. The storage of tensors over it keeps it alive, and the
    addresses are free when the last of them is gone."""

    def __init__(self, device: Device, num_pages: int):
        self.device, self.num_pages = device, num_pages
        self._own: dict[int, Any] = {}  # page -> memory; all others are zeros
        with device.current():
            self.address = int(device.call("cuMemAddressReserve", num_pages * device.page_bytes, 0, 0, 0))
            mapped = 0
            try:
                for mapped in range(num_pages):
                    device.map(self._at(mapped), device.zeros)
            except BackendError:
                _free_addresses(device, self.address, range(mapped), num_pages)
                raise
        weakref.finalize(self, _free, device, self.address, num_pages, self._own).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        shape = (self.num_pages * self.device.page_bytes,)
        return {"shape": shape, "typestr": "|u1", "data": (self.address, False), "strides": None, "version": 3}

    def own(self, pages: range) -> None:
        """Gives pages memory of their own, cleared. Raises BackendError; then nothing has changed."""
        with self.device.current():
            created: list[Any] = []
            try:
                for _ in pages:
                    created.append(self.device.create())
                self.device.wait()
                for page, handle in zip(pages, created, strict=True):
                    self._swap(page, handle)
                    self._own[page] = handle
                for page in pages:
                    self.device.clear(self._at(page))
                self.device.wait()
            except BackendError:
                self.device.wait()
                for page in self._own.keys() & set(pages):
                    self._swap(page, self.device.zeros)
                    del self._own[page]
                for handle in created:
                    self.device.release(handle)
                raise

    def disown(self, pages: range) -> None:
        """Gives their memory back."""
        with self.device.current():
            self.device.wait()
            for page in pages:
                self._swap(page, self.device.zeros)
                self.device.release(self._own.pop(page))

    def _swap(self, page: int, handle: Any) -> None:
        """Raises BackendError; then the page is zeros."""
        address = self._at(page)
        self.device.unmap(address)
        try:
            self.device.map(address, handle)
        except BackendError:
            self.device.map(address, self.device.zeros)
            raise

    def _at(self, page: int) -> int:
        return self.address + page * self.device.page_bytes


def _free(device: Device, address: int, num_pages: int, own: dict[int, Any]) -> None:
    with device.current():
        device.wait()
        _free_addresses(device, address, range(num_pages), num_pages)
        for handle in own.values():
            device.release(handle)


def _free_addresses(device: Device, address: int, mapped: range, num_pages: int) -> None:
    for page in mapped:
        device.unmap(address + page * device.page_bytes)
    device.call("cuMemAddressFree", address, num_pages * device.page_bytes)


def as_bytes(pages: Pages) -> Tensor:
    """The pages' memory, which they own."""
    return torch.as_tensor(pages, device=torch.device("cuda", pages.device.index))


class CudaArena(PagedArena):
    """Raises BackendError where the addresses cannot be had. wrap: makes a tensor of bytes, which keeps the pages."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: Device,
        wrap: Callable[[Pages], Tensor] = as_bytes,
    ):
        super().__init__(shape, dtype)
        self.page_bytes = device.page_bytes
        self._pages = Pages(device, -(-self.num_bytes // device.page_bytes))
        self.tensor = wrap(self._pages)[: self.num_bytes].view(dtype).view(shape)

    def _map(self, pages: range) -> None:
        self._pages.own(pages)

    def _release(self, start: int, stop: int) -> None:
        self._wait()
        super()._release(start, stop)
        self._wait()

    def _unmap(self, pages: range) -> None:
        self._pages.disown(pages)

    def _wait(self) -> None:
        with self._pages.device.current():
            self._pages.device.wait()


def device_of(device: torch.device) -> Device:
    """A GPU's part of the driver. Raises BackendError where that or its bindings are missing."""
    if not torch.cuda.is_available():
        raise BackendError("torch finds no GPU")
    return _device(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _device(index: int) -> Device:
    """A process has one of each GPU, as it has one context: all arenas share its page of zeros."""
    try:
        api = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise BackendError(f"cuda.bindings is missing ({error}): pip install cuda-bindings") from error
    torch.empty(1, device=torch.device("cuda", index))  # makes the context that the driver is then asked for
    return Device(index, api, torch.cuda.empty_cache)


def why_not(device: torch.device) -> str | None:
    """Why a GPU has no such arena."""
    try:
        device_of(device)
    except BackendError as error:
        return str(error)
    return None
