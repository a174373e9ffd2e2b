"""One mixture-of-experts layer whose tokens' adapters have experts of their own: what rerouting is of it, and what
different experts cost.

    python -m benchmarks.serving_experts [--tokens 1,8,32,128,512] [--adapters 1,5,20] [--device cuda --dtype bfloat16]

base     the layer's own forward, on the base's experts
served   the same router's choices, each token's through its adapter's slots
reroute  of that, the gather that turns ids into slots, with the counts

Each adapter replaces `--tuned` experts, and its tokens choose them about three times in ten, as the experts that are
tuned are chosen for (arXiv 2407.01906). Slots are read once for all their tokens, so what a step costs depends on how
many different ones it has: they are beside the times. Compared with each token's own matrices first.
"""

import argparse
import json
from functools import partial

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.harness import interleave, ratios, summary, write
from molex.esft import ExpertWeights, find_layers
from molex_serve.adapters.base import ExpertSwap
from molex_serve.model.experts import ExpertPool, SlotLayer
from molex_serve.model.reroute import reroute
from molex_serve.model.step import Span, Step

SIZES = {"hidden": 512, "inner": 256, "experts": 64, "top_k": 6, "tuned": 7, "rounds": 60, "threads": 2}
PREFERENCE = 1.3  # of a token for its adapter's experts, beside noise of Gumbel's
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def base_model(arguments: argparse.Namespace) -> PreTrainedModel:
    """Of one layer."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=arguments.hidden,
        intermediate_size=arguments.inner,
        moe_intermediate_size=arguments.inner,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return model.to(arguments.device, getattr(torch, arguments.dtype))


def attach(pool: ExpertPool, number: int, arguments: argparse.Namespace) -> Tensor:
    """(N + 1, M) bool: which experts an adapter has of its own; row 0 the base's, none."""
    ((name, layer),) = pool.layers.items()
    tuned_HM = torch.zeros(number + 1, arguments.experts, dtype=torch.bool)
    for handle in range(1, number + 1):
        chosen = torch.randperm(arguments.experts)[: arguments.tuned].tolist()
        tuned_HM[handle, chosen] = True
        own = {e: ExpertWeights(*(w + 0.02 * torch.randn_like(w) for w in _slot(layer, e))) for e in chosen}
        swap = ExpertSwap(kind="esft", generation=str(handle), num_bytes=0, source="made up", experts={name: own})
        pool.attach(handle, swap)
    return tuned_HM


def _slot(layer: SlotLayer, slot: int) -> ExpertWeights:
    return ExpertWeights(layer.gate_up.tensor[slot], layer.down.tensor[slot])


def routed(tuned_HM: Tensor, handles_T: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """ids (T, K) and weights (T, K) that a router could have given."""
    noise_TM = -torch.empty(len(handles_T), tuned_HM.shape[1]).exponential_().log()
    scores_TM = noise_TM + PREFERENCE * tuned_HM[handles_T]
    best_TK, ids_TK = scores_TM.topk(top_k, dim=-1)
    return ids_TK, best_TK.softmax(dim=-1)


def check(found: Tensor, layer: SlotLayer, x: Tensor, slots: Tensor, weights: Tensor) -> None:
    """Refuses to time a wrong result."""
    dtype, num_checked = str(x.dtype).removeprefix("torch."), min(len(x), 32)
    for t in range(num_checked):
        y = x.new_zeros(x.shape[1], dtype=torch.float64)
        for slot, weight in zip(slots[t].tolist(), weights[t].tolist(), strict=True):
            gate_up, down = (w.double() for w in _slot(layer, slot))
            gate, up = (gate_up @ x[t].double()).chunk(2)
            y += weight * (down @ (torch.nn.functional.silu(gate) * up))
        error = float((found[t] - y).norm() / y.norm())
        assert error < TOLERANCE[dtype], f"token {t}: relative error {error:.2g}"


def measure(num_tokens: int, number: int, arguments: argparse.Namespace) -> dict[str, object]:
    plain, model = base_model(arguments), base_model(arguments)
    (base,) = (found.module for found in find_layers(plain).values())
    pool = ExpertPool(model, number * arguments.tuned, number)
    (layer,) = pool.layers.values()
    handles_T = torch.randint(1, number + 1, (num_tokens,))
    ids, weights = routed(attach(pool, number, arguments), handles_T, arguments.top_k)
    x = torch.randn(num_tokens, arguments.hidden).to(arguments.device, layer.down.tensor.dtype)
    ids, weights, handles = ids.to(x.device), weights.to(x), handles_T.to(x.device)
    pool.step = Step(tuple(Span(handle, t, t + 1) for t, handle in enumerate(handles_T.tolist())), handles)
    slots = layer.table[handles[:, None], ids]
    served = partial(layer.layer.module, x, ids, weights)
    check(served(), layer, x, slots, weights)
    steps = {
        "base": partial(base, x, ids, weights),
        "served": served,
        "reroute": partial(reroute, layer.table, handles, ids, layer.num_slots),
    }
    times = interleave(steps, arguments.rounds, device=arguments.device)
    return {
        "served_over_base": ratios(times["served"], times["base"]),
        "reroute_share": ratios(times["reroute"], times["served"]),
        "milliseconds": {name: summary([1e3 * t for t in own]) for name, own in times.items()},
        "distinct": {"base": ids.unique().numel(), "served": slots.unique().numel()},
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Rerouting in one mixture-of-experts layer")
    parser.add_argument("--tokens", default="1,8,32,128,512")
    parser.add_argument("--adapters", default="1,5,20")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for number in map(int, arguments.adapters.split(",")):
        for num_tokens in map(int, arguments.tokens.split(",")):
            torch.manual_seed(number)
            fixed = {name: getattr(arguments, name) for name in ("device", "dtype", *SIZES) if name != "threads"}
            row = {**fixed, "tokens": num_tokens, "adapters": number, **measure(num_tokens, number, arguments)}
            write("serving_experts", row)
            print(json.dumps({"reroute_share": row["reroute_share"], "over": row["served_over_base"]}), flush=True)


if __name__ == "__main__":
    main()
