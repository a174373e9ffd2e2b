"""Every way of computing one linear with experts, (layer) -> y (T, O): the codes of papers and libraries, and ours.

base            x Wᵀ alone
lora            one PEFT-style LoRA of as many ranks as a token uses (K · r); "lora, C" of as many as there are
loop            MoE-PEFT's and MixLoRA's code: for each expert its tokens, two products, weighed at the O-wide end and
                added to zeros, which are added to the base's output
meteora_loop    MeteoRA's code in training: the same, added to the base's output itself
meteora         MeteoRA's code in inference: A_e and B_e gathered for each (token, slot), two batched products, from
                arrays that it lays out for this once, before
every_expert    HydraLoRA's code, PEFT-style: every expert on every token, weighed at the O-wide end
xlora           X-LoRA's code in PEFT: the same, weighed at x
scattermoe      ScatterMoE, as published and "…, rank_gated" as we would (`scattermoe.py`), where it is installed
compiled        `dense` under torch.compile
and molex's backends. All compute in x's dtype, which is never slower than what the codes do. Experts' parameters lie as
each code has them (FORMS): a pair for each expert; in MeteoRA's, ScatterMoE's and ours one A and one B for all.
"""

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import scattermoe
from benchmarks.problem import Apart, Layer, Routed, Transposed
from molex.kernels import backends
from molex.kernels.extend import Extend

BACKENDS = tuple(name for name in backends if name != "reference")
REFERENCES = ("base", "lora", "lora, C")  # these compute something else
# they ask the GPU how many tokens an expert has, which no graph can hold
SYNCHRONISE = ("loop", "meteora_loop", "megablocks", "scattermoe", "scattermoe, rank_gated")
MOST_EXPERTS = 16  # a loop over more takes seconds, and loses by far
MOST_GATHERED = {"cpu": 2**30, "cuda": 5 * 2**30}  # bytes of factors gathered for each token

Method = Callable[[Any], Tensor]  # of a Layer, or of what FORMS makes of one


def loop(layer: Layer | Apart) -> Tensor:
    y_TO = layer.base(layer.x)
    return y_TO + _add_experts(layer, torch.zeros_like(y_TO))


def meteora_loop(layer: Layer) -> Tensor:
    return _add_experts(layer, layer.base(layer.x))


def _add_experts(layer: Layer | Apart, y_TO: Tensor) -> Tensor:
    for expert_id in range(layer.num_experts):
        A_RD, B_OR = layer.expert(expert_id)
        tokens_N, slots_N = torch.where(layer.expert_ids == expert_id)
        y_NO = F.linear(F.linear(layer.x[tokens_N], A_RD), B_OR)
        y_TO.index_add_(0, tokens_N, y_NO * layer.weights[tokens_N, slots_N, None].to(y_NO.dtype))
    return y_TO


def meteora(layer: Transposed) -> Tensor:
    num_tokens, num_slots = layer.expert_ids.shape
    ids_N = layer.expert_ids.flatten()
    A_NDR, B_NRO = layer.A[ids_N].contiguous(), layer.B[ids_N].contiguous()
    x_N1D = layer.x[:, None].expand(-1, num_slots, -1).reshape(num_tokens * num_slots, 1, -1)
    y_NO = torch.bmm(torch.bmm(x_N1D, A_NDR), B_NRO).squeeze(1)
    y_NO = y_NO * layer.weights.flatten()[:, None].to(y_NO.dtype)
    return layer.base(layer.x).add_(y_NO.view(num_tokens, num_slots, -1).sum(1))


def every_expert(layer: Layer | Apart) -> Tensor:
    y_TO, gates_TE = layer.base(layer.x), layer.routing().gates().to(layer.x.dtype)
    for expert_id in range(layer.num_experts):
        A_RD, B_OR = layer.expert(expert_id)
        y_TO += F.linear(F.linear(layer.x, A_RD), B_OR) * gates_TE[:, expert_id, None]
    return y_TO


def xlora(layer: Layer | Apart) -> Tensor:
    y_TO, gates_TE = layer.base(layer.x), layer.routing().gates().to(layer.x.dtype)
    for expert_id in range(layer.num_experts):
        A_RD, B_OR = layer.expert(expert_id)
        y_TO += F.linear(F.linear(layer.x * gates_TE[:, expert_id, None], A_RD), B_OR)
    return y_TO


def one_lora(layer: Layer) -> Tensor:
    return layer.base(layer.x) + F.linear(F.linear(layer.x, layer.A), layer.B)


def through(name: str) -> Method:
    kernel, moved = backends[name](), WeakKeyDictionary[nn.Module, nn.Module]()

    def method(layer: Layer) -> Tensor:
        base = layer.base
        if isinstance(kernel, Extend):  # it lays the base's weight elsewhere, and all the others read that weight
            base = moved.get(base) or moved.setdefault(base, copy.deepcopy(base))
        return kernel.linear(layer.x, base, layer.columns(), layer.routing())

    return method


def contestants(layer: Layer, compiled: bool = False) -> dict[str, Method]:
    """All that can run here; of every other the reason is printed."""
    found: dict[str, Method] = {"base": lambda layer: layer.base(layer.x), "lora": one_lora, "lora, C": one_lora}
    too_many = f"{layer.num_experts} experts are too many to loop over" if layer.num_experts > MOST_EXPERTS else None
    reasons = dict.fromkeys(LOOPS, too_many)
    reasons["meteora"] = _too_much_to_gather(layer)
    reasons |= dict.fromkeys(SCATTERMOE, scattermoe.available(layer))
    for name in BACKENDS:
        reasons[name] = backends[name]().supports(layer.x, layer.columns(), layer.routing(), layer.base)
    for name, reason in reasons.items():
        if reason is None:
            found[name] = through(name) if name in BACKENDS else CODES[name]
        else:
            print(f"without {name}: {reason}", flush=True)
    if compiled:
        torch.compiler.reset()
        found["compiled"] = torch.compile(through("dense"))
    return found


def _too_much_to_gather(layer: Layer) -> str | None:
    size = layer.expert_ids.numel() * layer.rank * (layer.A.shape[1] + len(layer.B)) * layer.x.itemsize
    if size <= MOST_GATHERED[layer.x.device.type]:
        return None
    return f"it would gather {size / 2**30:.1f} GiB of factors"


LOOPS: dict[str, Method] = {
    "loop": loop,
    "meteora_loop": meteora_loop,
    "every_expert": every_expert,
    "xlora": xlora,
}
SCATTERMOE: dict[str, Method] = {
    "scattermoe": scattermoe.published,
    "scattermoe, rank_gated": scattermoe.rank_gated,
}
CODES: dict[str, Method] = {**LOOPS, "meteora": meteora, **SCATTERMOE}
FORMS: dict[str, Callable[[Layer], Routed]] = {
    "lora": lambda layer: layer.first(layer.expert_ids.shape[1] * layer.rank),
    **dict.fromkeys(("loop", "every_expert", "xlora"), Apart.of),
    "meteora": Transposed.of,
}


def as_kept(name: str, layer: Layer) -> Routed:
    """The layer with its experts' parameters as that code has them; where that differs, they are other leaves."""
    return FORMS[name](layer) if name in FORMS else layer
