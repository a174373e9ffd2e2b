"""A batch in which every row has a LoRA of its own, on all linears of a small Llama, against PEFT's mixed batch.

    python -m benchmarks.serving_mixed [--hidden 192,384,768] [--adapters 16] [--rank 16] [--seconds 15]
    python -m benchmarks.serving_mixed --device cuda --dtype bfloat16 --hidden 2048

base     the model without adapters
served   molex_serve's model, all adapters resident
peft     PEFT's `adapter_names`: row by row to its adapter, in a loop over adapters in every linear
merged   one merged model for each adapter, one after another on its own row: what adapters in a batch save

Decoding is one token a row, prefill `--length` tokens a row; without attention to a past, which is the same for all.
Logits of all are compared with the merged models' first.
"""

import argparse
import copy
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness import interleave, ratios, summary, write
from benchmarks.serving_bases import VOCABULARY, dense, merged_lora, save_loras
from molex_serve.model.served import ServedModel
from molex_serve.model.step import Span, Step

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
SIZES = {"layers": 4, "adapters": 16, "rank": 16, "length": 32, "rounds": 30, "seconds": 15}
FIXED = ("device", "dtype", "layers", "adapters", "rank", "length")
Forward = Callable[[Tensor], Tensor]  # ids (B, S), row i for adapter i -> logits (B, S, V)


def served(base: PreTrainedModel, folders: list[Path]) -> Forward:
    model = ServedModel(copy.deepcopy(base))
    handles = [model.attach(model.read(str(folder))) for folder in folders]

    def forward(ids: Tensor) -> Tensor:
        length = ids.shape[1]
        spans = [Span(handle, row * length, (row + 1) * length) for row, handle in enumerate(handles)]
        model.begin_step(Step.of(tuple(spans), ids.device))
        return model.model(input_ids=ids, use_cache=False).logits

    return forward


def peft_mixed(base: PreTrainedModel, folders: list[Path]) -> Forward:
    names = [folder.name for folder in folders]
    model: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folders[0]), adapter_name=names[0])
    for folder in folders[1:]:
        model.load_adapter(str(folder), adapter_name=folder.name)
    model.eval()
    return lambda ids: model(input_ids=ids, use_cache=False, adapter_names=names).logits


def merged(base: PreTrainedModel, folders: list[Path]) -> Forward:
    models = [merged_lora(base, folder) for folder in folders]
    return lambda ids: torch.cat(
        [model(input_ids=row[None], use_cache=False).logits for model, row in zip(models, ids, strict=True)]
    )


def check(found: Mapping[str, Forward], ids: Tensor, tolerance: float) -> None:
    """Refuses to time a wrong result."""
    truth = found["merged"](ids)
    for name in ("served", "peft"):
        error = float((found[name](ids) - truth).norm() / truth.norm())
        assert error < tolerance, f"{name}: relative error {error:.2g}"
    assert float((found["base"](ids) - truth).norm() / truth.norm()) > 2 * tolerance, "the adapters change nothing"


def measure(hidden: int, arguments: argparse.Namespace, folder: Path) -> None:
    base = dense(hidden, arguments.layers).to(arguments.device, getattr(torch, arguments.dtype))
    folders = save_loras(base, folder, arguments.adapters, arguments.rank)
    ways: dict[str, Forward] = {
        "base": lambda ids: base(input_ids=ids, use_cache=False).logits,
        "served": served(base, folders),
        "peft": peft_mixed(base, folders),
        "merged": merged(base, folders),
    }
    fixed = {name: getattr(arguments, name) for name in FIXED} | {"hidden": hidden}
    for timed, length in (("decoding", 1), ("prefill", arguments.length)):
        ids = torch.randint(0, VOCABULARY, (arguments.adapters, length), device=arguments.device)
        check(ways, ids, TOLERANCE[arguments.dtype])
        steps = {name: partial(way, ids) for name, way in ways.items()}
        times = interleave(steps, arguments.rounds, device=arguments.device, seconds=arguments.seconds)
        row = {
            **fixed,
            "timed": timed,
            "milliseconds": {name: summary([1e3 * t for t in own]) for name, own in times.items()},
            "times_served": {name: ratios(own, times["served"]) for name, own in times.items() if name != "served"},
            "served_over_base": ratios(times["served"], times["base"]),
        }
        write("serving_mixed", row)
        print(json.dumps({name: ratio["median"] for name, ratio in row["times_served"].items()}), flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Many LoRAs in one batch, against PEFT's mixed batch")
    parser.add_argument("--hidden", default="192,384,768")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for hidden in map(int, arguments.hidden.split(",")):
        with TemporaryDirectory() as folder:
            measure(hidden, arguments, Path(folder))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
