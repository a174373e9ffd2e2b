"""Many adapters registered over one base, few of them resident: what memory that takes, beside one model for each.

    python -m benchmarks.serving_registered [--registered 1000] [--resident 32] [--hidden 256]

Every adapter, a LoRA of its own on disk, is asked for once, then `--asks` more times by a power law; those that find no
place push out whoever was not used for longest. Memory is the kernel's count of the process' pages, and the pools' own
of the pages of resident adapters. merged: copies of the base, as merged models are.
"""

import argparse
import copy
import json
import logging
import random
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness import write
from benchmarks.serving_bases import dense, save_loras
from benchmarks.serving_memory import mib, resident
from molex_serve.adapters.registry import Registry
from molex_serve.adapters.residency import Residency
from molex_serve.model.served import ServedModel
from molex_serve.settings import AdapterLimits

SIZES = {"registered": 1000, "resident": 32, "hidden": 256, "layers": 4, "rank": 16, "host_mib": 32, "asks": 1000}
ALPHA = 0.3  # of the power law: adapter ⌊N u^(1/α)⌋
MERGED = 20
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_adapters(folder: Path, arguments: argparse.Namespace) -> list[Path]:
    """Of the same shapes, with other numbers each."""
    (first,) = save_loras(dense(arguments.hidden, arguments.layers), folder, 1, arguments.rank)
    tensors, config = load_file(first / TENSORS), (first / CONFIG).read_bytes()
    folders = [first]
    for number in range(1, arguments.registered):
        folders.append(folder / str(number))
        folders[-1].mkdir()
        (folders[-1] / CONFIG).write_bytes(config)
        save_file({name: torch.randn_like(tensor) for name, tensor in tensors.items()}, folders[-1] / TENSORS)
    return folders


def ask(registry: Registry, number: int) -> None:
    with registry.resolve(str(number)):
        pass


def measure(folders: list[Path], arguments: argparse.Namespace) -> dict[str, object]:
    limits = AdapterLimits(
        resident=arguments.resident,
        columns=arguments.resident * max(arguments.rank, 8),
        host_bytes=arguments.host_mib << 20,
        registered=arguments.registered,
    )
    base = dense(arguments.hidden, arguments.layers)
    served = ServedModel(base, limits)
    residency = Residency(served.attach, served.detach, served.read, nullcontext, limits)
    registry = Registry(residency)
    sizes, start = {}, resident()
    for number, folder in enumerate(folders):
        registry.register(str(number), folder)
    sizes["registered"] = resident() - start
    for number in range(arguments.registered):
        ask(registry, number)
        if number + 1 in (arguments.registered // 10, arguments.registered // 2, arguments.registered):
            sizes[f"{number + 1} used"] = resident() - start
    dice, before, begun = random.Random(0), residency.counts(), time.perf_counter()
    for _ in range(arguments.asks):
        ask(registry, int(arguments.registered * dice.random() ** (1 / ALPHA)))
    seconds, counts = time.perf_counter() - begun, residency.counts()
    sizes |= {f"{arguments.asks} more asks": resident() - start}
    registry.close()
    one = sum(listed.num_bytes for listed in registry.listing()) / arguments.registered
    found = {
        "resident": counts.resident,
        "hits": {level: number - before.hits[level] for level, number in counts.hits.items()},
        "milliseconds_a_load": round(1e3 * counts.load_seconds / counts.loads, 2),
        "milliseconds_an_ask": round(1e3 * seconds / arguments.asks, 2),
        "mib": {name: mib(size) for name, size in sizes.items()},
        "mib_of": {
            "the base": mib(sum(parameter.nbytes for parameter in base.parameters())),
            "an adapter": mib(one),
            "the device's pools": mib(served.pool.committed_bytes()),
            "adapters on the host": mib(counts.host_bytes),
        },
    }
    start = resident()
    copies = [copy.deepcopy(served.pristine) for _ in range(MERGED)]
    found["merged_mib"] = {"models": len(copies), "each": mib((resident() - start) / MERGED)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Many registered adapters, few resident ones")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        folders = write_adapters(Path(folder), arguments)
        row = {**{name: getattr(arguments, name) for name in SIZES}, "device": "cpu", **measure(folders, arguments)}
    write("serving_registered", row)
    print(json.dumps(row["mib"]))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
