"""Compiles a kernel for a GPU that is not there, and reads what came out.

Types and alignments are those of a usual launch: 16-bit or float32 data, int64 tables, and every pointer and stride a
multiple of 16, which is what lets loads be wide and asynchronous.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDE = ("gates", "planes", "logits", "router", "scale", "bias", "weights")  # float32 whatever x is
TABLES = ("expert", "row", "ids", "order", "blocks", "counts", "starts", "columns", "slots")  # int64


@dataclass(frozen=True)
class Compiled:
    ptx: str
    shared: int  # bytes
    registers: int  # a thread
    local: int  # bytes a thread spilled

    def has(self, instruction: str) -> bool:
        return instruction in self.ptx


def compile_for(
    kernel: Any, capability: int, dtype: torch.dtype, constants: dict[str, Any], tmp_path: Path, **options: int
) -> Compiled:
    signature = {name: _type(name, dtype, constants) for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or name.startswith("stride") or name in ("D", "C", "O", "N", "depth")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _resources(compiled.asm["cubin"], tmp_path / "kernel.cubin")
    return Compiled(compiled.asm["ptx"], compiled.metadata.shared, usage["REG"], usage["LOCAL"] + usage["STACK"])


def _type(name: str, dtype: torch.dtype, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if not name.endswith("_ptr"):
        return "i32"
    stem = name.removesuffix("_ptr").removeprefix("grad_")
    return "*" + ("i64" if stem in TABLES else "fp32" if stem in WIDE else TYPES[dtype])


def _resources(cubin: bytes, path: Path) -> dict[str, int]:
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    dump = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
