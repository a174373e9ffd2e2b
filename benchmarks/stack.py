"""Decoder layers of an 8 B Llama's shape: a training step and a decoding step, by tokens a second and peak memory.

    python -m benchmarks.stack --device cuda --dtype bfloat16
    python -m benchmarks.stack --hidden 64 --inner 128 --layers 2 --tokens 64 --rounds 5

base      the frozen model; its training step is forward and the gradient of its input, as below an adapter
lora      PEFT's LoRA on all seven linears, of as many ranks as a token uses; "lora, C" of as many as there are
molex     MoLA's router and experts on all seven linears, with each backend, or what the planner picks (auto)

Training is forward and backward of one sequence, without the optimizer. Decoding is one token without a cache, as a
whole model's latency grows with its launches: as it is, and on a GPU captured in a CUDA graph, where that is possible.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import molex
from benchmarks.harness import interleave, ratios, summary, write
from molex.errors import BackendError

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """The frozen base. Its embeddings' output asks for a gradient, as if there were layers to train below."""
    heads = max(1, arguments.hidden // 128)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.inner,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=1024,
    )
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype)).requires_grad_(False)
    model.enable_input_require_grads()
    return model


def with_lora(base: LlamaForCausalLM, rank: int) -> nn.Module:
    return peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS))  # type: ignore[arg-type]


def with_experts(base: LlamaForCausalLM, arguments: argparse.Namespace, backend: str) -> nn.Module:
    settings = {"num_experts": arguments.experts, "rank": arguments.rank, "top_k": arguments.top_k}
    config = molex.preset("mola", targets=LINEARS, allocation=None, dropout=0.0, backend=backend, **settings)
    molex.convert(base, config)
    return base


def contestants(arguments: argparse.Namespace) -> dict[str, nn.Module]:
    """Every model that runs here; of the others the reason is printed."""
    used, stored = arguments.top_k * arguments.rank, arguments.experts * arguments.rank
    base = build(arguments)
    made: dict[str, nn.Module] = {"base": base}
    made |= {"lora": with_lora(copy.deepcopy(base), used), "lora, C": with_lora(copy.deepcopy(base), stored)}
    ids = torch.zeros(1, 2, dtype=torch.int64, device=arguments.device)
    for backend in ("auto", "dense", "preload", "triton"):
        model = with_experts(copy.deepcopy(base), arguments, backend)
        try:
            with torch.no_grad():
                model(ids)
        except BackendError as error:
            print(f"without {backend}: {error}", flush=True)
        else:
            made[f"molex, {backend}"] = model
    return made


def train_step(model: nn.Module, ids: Tensor) -> None:
    mixture: Any = getattr(model, "molex_mixture", None)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    (loss if mixture is None else loss + mixture.aux_loss()).backward()
    model.zero_grad(set_to_none=True)


def decode_step(model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)


def captured(step: Callable[[], None]) -> Callable[[], object]:
    """A CUDA graph of a step. Raises RuntimeError where something in it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak_gib(step: Callable[[], object]) -> float:
    torch.cuda.reset_peak_memory_stats()
    step()
    return round(torch.cuda.max_memory_allocated() / 2**30, 3)


def report(
    what: str, steps: Mapping[str, Callable[[], object]], num_tokens: int, arguments: argparse.Namespace
) -> None:
    times = interleave(steps, arguments.rounds, device=arguments.device)
    row = {key: value for key, value in vars(arguments).items() if key not in ("device", "threads")}
    row |= {"timed": what, "tokens_per_second": {n: summary([num_tokens / t for t in own]) for n, own in times.items()}}
    row["times_base"] = {name: ratios(own, times["base"]) for name, own in times.items() if name != "base"}
    if arguments.device == "cuda" and what == "training":
        row["peak_gib"] = {name: peak_gib(step) for name, step in steps.items()}
    write("stack", row)


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoder layers with experts against their base")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    sizes = {"hidden": 4096, "inner": 14336, "layers": 4, "tokens": 8192, "experts": 8, "rank": 16, "top_k": 2}
    for name, size in {**sizes, "rounds": 20, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = contestants(arguments)
    ids = torch.randint(0, 1024, (1, arguments.tokens), device=arguments.device)
    report("training", {n: partial(train_step, model, ids) for n, model in models.items()}, ids.numel(), arguments)
    one = {name: partial(decode_step, model.eval(), ids[:, :1]) for name, model in models.items()}
    report("decoding", one, 1, arguments)
    if arguments.device == "cuda":
        graphs: dict[str, Callable[[], object]] = {}
        for name, step in one.items():
            try:
                graphs[name] = captured(step)
            except RuntimeError as error:
                print(f"no CUDA graph of {name}: {str(error).splitlines()[0]}", flush=True)
        report("decoding, CUDA graph", graphs, 1, arguments)


if __name__ == "__main__":
    main()
