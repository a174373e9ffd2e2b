"""A batch in which every row has a LoRA of its own, on all linears of a small Llama, against PEFT's mixed batch.

    python -m benchmarks.serving_mixed [--hidden 768] [--adapters 16] [--rank 16] [--rounds 50]

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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import interleave, ratios, summary, write
from molex_serve.model.served import ServedModel
from molex_serve.model.step import Span, Step

TOLERANCE = 1e-3
Forward = Callable[[Tensor], Tensor]  # ids (B, S), row i for adapter i -> logits (B, S, V)


def base_model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 64,
        vocab_size=512,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def save_adapters(base: LlamaForCausalLM, folder: Path, arguments: argparse.Namespace) -> list[Path]:
    """Trained ones: B is not zero."""
    config = peft.LoraConfig(r=arguments.rank, target_modules="all-linear")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    folders = []
    for number in range(arguments.adapters):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        folders.append(folder / str(number))
        model.save_pretrained(str(folders[-1]))
    return folders


def served(base: LlamaForCausalLM, folders: list[Path]) -> Forward:
    model = ServedModel(copy.deepcopy(base))
    handles = [model.attach(model.read(str(folder))) for folder in folders]

    def forward(ids: Tensor) -> Tensor:
        length = ids.shape[1]
        spans = [Span(handle, row * length, (row + 1) * length) for row, handle in enumerate(handles)]
        model.begin_step(Step.of(tuple(spans), torch.device("cpu")))
        return model.model(input_ids=ids, use_cache=False).logits

    return forward


def peft_mixed(base: LlamaForCausalLM, folders: list[Path]) -> Forward:
    names = [folder.name for folder in folders]
    model: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folders[0]), adapter_name=names[0])
    for folder in folders[1:]:
        model.load_adapter(str(folder), adapter_name=folder.name)
    model.eval()
    return lambda ids: model(input_ids=ids, use_cache=False, adapter_names=names).logits


def merged(base: LlamaForCausalLM, folders: list[Path]) -> Forward:
    models: list[Any] = [
        peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).merge_and_unload() for folder in folders
    ]
    return lambda ids: torch.cat(
        [model(input_ids=row[None], use_cache=False).logits for model, row in zip(models, ids, strict=True)]
    )


def check(found: dict[str, Forward], ids: Tensor) -> None:
    """Refuses to time a wrong result."""
    truth = found["merged"](ids)
    for name in ("served", "peft"):
        error = float((found[name](ids) - truth).norm() / truth.norm())
        assert error < TOLERANCE, f"{name}: relative error {error:.2g}"
    assert float((found["base"](ids) - truth).norm() / truth.norm()) > 10 * TOLERANCE, "the adapters change nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description="Many LoRAs in one batch, against PEFT's mixed batch")
    sizes = {"hidden": 768, "layers": 4, "adapters": 16, "rank": 16, "length": 64, "rounds": 50, "threads": 2}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = base_model(arguments)
    with TemporaryDirectory() as folder, torch.no_grad():
        folders = save_adapters(base, Path(folder), arguments)
        ways: dict[str, Forward] = {
            "base": lambda ids: base(input_ids=ids, use_cache=False).logits,
            "served": served(base, folders),
            "peft": peft_mixed(base, folders),
            "merged": merged(base, folders),
        }
        for timed, length in (("decoding", 1), ("prefill", arguments.length)):
            ids = torch.randint(0, 512, (arguments.adapters, length))
            check(ways, ids)
            times = interleave({name: partial(way, ids) for name, way in ways.items()}, arguments.rounds)
            row = {name: getattr(arguments, name) for name in sizes if name != "threads"} | {"timed": timed}
            row["milliseconds"] = {name: summary([1e3 * t for t in own]) for name, own in times.items()}
            row["times_served"] = {
                name: ratios(own, times["served"]) for name, own in times.items() if name != "served"
            }
            row["served_over_base"] = ratios(times["served"], times["base"])
            write("serving_mixed", row)
            print(json.dumps({name: ratio["median"] for name, ratio in row["times_served"].items()}))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
