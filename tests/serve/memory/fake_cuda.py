"""A driver of CUDA that has a CPU's memory and CUDA's rules: real addresses, files as pages, an error for each misuse.

Reading an address that nothing is mapped at ends the process, as it ends a CUDA context.
"""

import ctypes
import mmap
import os
import threading
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from molex_serve.memory.cuda_vmm import Pages

GRANULARITY = 4 * mmap.PAGESIZE
MAP_FIXED = 0x10
CONTEXT, DEVICE = "primary context", "device 0"

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2


OK, MISUSE, FULL = CUresult


class FakeDriver:
    """In the place of `cuda.bindings.driver`. capacity: pages of memory. busy: work began that nobody waited for."""

    CUresult = CUresult
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED="virtual memory")
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED="pinned")
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE="on a device")
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE="read and write")
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM="minimum")

    def __init__(self, capacity: int = 1000, supported: int = 1):
        self.capacity, self.supported = capacity, supported
        self.calls: list[str] = []
        self.files: dict[int, int] = {}  # handle -> file
        self.mapped: dict[int, int] = {}  # address -> handle
        self.reserved: dict[int, int] = {}  # address -> bytes
        self.fail: dict[str, int] = {}  # call -> after how many it fails, once
        self.busy = False
        self._contexts = threading.local()

    def CUmemAllocationProp(self) -> Any:
        return SimpleNamespace(type=None, location=SimpleNamespace(type=None, id=None))

    def CUmemAccessDesc(self) -> Any:
        return SimpleNamespace(location=None, flags=None)

    def _called(self, name: str) -> bool:
        """Whether it may go on."""
        self.calls.append(name)
        if name in self.fail:
            self.fail[name] -= 1
            if self.fail[name] < 0:
                del self.fail[name]
                return False
        return name in ("cuInit", "cuDeviceGet") or self.stack[-1:] == [CONTEXT]

    @property
    def stack(self) -> list[str]:
        """The contexts of this thread."""
        if not hasattr(self._contexts, "stack"):
            self._contexts.stack = []
        return self._contexts.stack

    def cuInit(self, flags: int) -> tuple[CUresult]:
        self._called("cuInit")
        return (OK,)

    def cuDeviceGet(self, index: int) -> tuple[CUresult, str]:
        return OK if self.calls == ["cuInit"] else MISUSE, DEVICE

    def cuDeviceGetAttribute(self, attribute: str, device: str) -> tuple[CUresult, int]:
        return OK if (attribute, device) == ("virtual memory", DEVICE) else MISUSE, self.supported

    def cuDevicePrimaryCtxRetain(self, device: str) -> tuple[CUresult, str]:
        return OK if device == DEVICE else MISUSE, CONTEXT

    def cuCtxPushCurrent(self, context: str) -> tuple[CUresult]:
        self.stack.append(context)
        return (OK,)

    def cuCtxPopCurrent(self) -> tuple[CUresult, str]:
        return OK, self.stack.pop()

    def cuCtxSynchronize(self) -> tuple[CUresult]:
        self.busy = False
        return (OK if self._called("cuCtxSynchronize") else MISUSE,)

    def cuMemGetAllocationGranularity(self, prop: Any, option: str) -> tuple[CUresult, int]:
        right = (prop.type, prop.location.type, prop.location.id, option) == ("pinned", "on a device", 0, "minimum")
        return OK if self._called("cuMemGetAllocationGranularity") and right else MISUSE, GRANULARITY

    def cuMemAddressReserve(self, size: int, alignment: int, hint: int, flags: int) -> tuple[CUresult, int]:
        if not self._called("cuMemAddressReserve") or size % GRANULARITY or (alignment, hint, flags) != (0, 0, 0):
            return MISUSE, 0
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = int(libc.mmap(None, size, 0, anonymous, -1, 0))
        self.reserved[address] = size
        return OK, address

    def cuMemAddressFree(self, address: int, size: int) -> tuple[CUresult]:
        inside = any(address <= page < address + size for page in self.mapped)
        if not self._called("cuMemAddressFree") or self.reserved.get(address) != size or inside:
            return (MISUSE,)
        del self.reserved[address]
        libc.munmap(address, size)
        return (OK,)

    def cuMemCreate(self, size: int, prop: Any, flags: int) -> tuple[CUresult, int]:
        if not self._called("cuMemCreate") or size != GRANULARITY or flags:
            return MISUSE, 0
        if len(self.files) >= self.capacity:
            return FULL, 0
        file = os.memfd_create("page")
        os.write(file, b"\xff" * size)  # NaN: memory comes as its last owner left it
        self.files[file] = file
        return OK, file

    def cuMemRelease(self, handle: int) -> tuple[CUresult]:
        if not self._called("cuMemRelease") or handle not in self.files or handle in self.mapped.values():
            return (MISUSE,)
        os.close(self.files.pop(handle))
        return (OK,)

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> tuple[CUresult]:
        inside = any(start <= address < start + length for start, length in self.reserved.items())
        right = size == GRANULARITY and address % mmap.PAGESIZE == 0 and (offset, flags) == (0, 0)
        if not self._called("cuMemMap") or not inside or not right or address in self.mapped:
            return (MISUSE,)
        self.mapped[address] = handle
        return (self._mmap(address, mmap.MAP_SHARED, self.files[handle]),)

    def cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> tuple[CUresult]:
        flags = [(one.location.type, one.location.id, one.flags) for one in access]
        right = flags == [("on a device", 0, "read and write")] and count == 1 and size == GRANULARITY
        if not self._called("cuMemSetAccess") or not right or address not in self.mapped:
            return (MISUSE,)
        libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE)
        return (OK,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[CUresult]:
        if not self._called("cuMemUnmap") or size != GRANULARITY or address not in self.mapped or self.busy:
            return (MISUSE,)
        del self.mapped[address]
        return (self._mmap(address, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1),)

    def cuMemsetD8(self, address: int, value: int, size: int) -> tuple[CUresult]:
        if not self._called("cuMemsetD8") or address not in self.mapped or size != GRANULARITY:
            return (MISUSE,)
        ctypes.memset(address, value, size)
        self.busy = True
        return (OK,)

    def _mmap(self, address: int, flags: int, file: int) -> CUresult:
        found = libc.mmap(address, GRANULARITY, 0, flags | MAP_FIXED, file, 0)
        return OK if found == address else MISUSE


def as_bytes(pages: Pages) -> Tensor:
    """What torch makes of `__cuda_array_interface__`: a tensor whose storage keeps the pages."""
    interface = pages.__cuda_array_interface__
    assert (interface["typestr"], interface["version"], interface["strides"]) == ("|u1", 3, None)
    (length,), (address, read_only) = interface["shape"], interface["data"]
    assert not read_only
    kind: Any = type("Buffer", (ctypes.Array,), {"_type_": ctypes.c_ubyte, "_length_": length})
    buffer = kind.from_address(address)
    buffer.pages = pages
    return torch.frombuffer(buffer, dtype=torch.uint8)
