"""Mixture-of-experts layers as transformers fuses them: what one looks like, and who computes it.

    y[t] = Σ_k w[t, k] · down[e] (act(gate[e] x[t]) ⊙ up[e] x[t]),  e = ids[t, k]     gate_up (E, 2I, H)  down (E, H, I)

A module is such a layer by what it holds, not by its name. Its router is whoever calls it: ids and weights (T, K) are
arguments of its forward. transformers keeps several implementations of that forward in one registry and asks the
module's configuration for the one to run, so another one can be put in its place for single modules.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from molex.errors import TargetError

GROUPED = (torch.bfloat16, torch.float16)  # of which a GPU multiplies all groups in one launch
MOST_GROUPS = 1023  # that one launch takes

Forward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]  # (module, x (T, H), ids (T, K), weights (T, K))


class ExpertWeights(NamedTuple):
    """Of one expert, or of several stacked in front. The first I rows of gate_up are the gate's."""

    gate_up: Tensor  # (2I, H)
    down: Tensor  # (H, I)

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes


@dataclass(frozen=True)
class ExpertLayer:
    """number: of the decoder layer that it is part of."""

    name: str
    number: int
    module: nn.Module

    @property
    def gate_up(self) -> nn.Parameter:
        return self.module.gate_up_proj  # type: ignore[return-value]

    @property
    def down(self) -> nn.Parameter:
        return self.module.down_proj  # type: ignore[return-value]

    @property
    def num_experts(self) -> int:
        return self.gate_up.shape[0]


def find_layers(model: nn.Module) -> dict[int, ExpertLayer]:
    """A model's mixture-of-experts layers, by number. Raises TargetError where there are none, and where one is fused
    in another way."""
    found: dict[int, ExpertLayer] = {}
    for name, module in model.named_modules():
        if getattr(getattr(module, "gate_up_proj", None), "ndim", 0) != 3:
            continue
        reason = _why_not(module)
        if reason:
            raise TargetError(f"{name} holds experts that cannot be replaced one by one: {reason}")
        layer = ExpertLayer(name, _number(name), module)
        if layer.number in found:
            raise TargetError(f"{name} and {found[layer.number].name} are both of layer {layer.number}: give one stack")
        found[layer.number] = layer
    if not found:
        raise TargetError(
            f"this {type(model).__name__} has no layer with gate_up_proj (E, 2I, H) and down_proj (E, H, I); ESFT is "
            "for mixture-of-experts models such as DeepSeek-V2, Mixtral, Qwen3-MoE, OLMoE"
        )
    return found


def _why_not(module: nn.Module) -> str | None:
    """What of a module with fused experts is not as the equation has it."""
    for flag, expected in (
        ("is_transposed", False),
        ("has_bias", False),
        ("has_gate", True),
        ("is_concatenated", True),
        ("has_post_expert_norm", False),
        ("_is_expert_parallel", False),
    ):
        value = getattr(module, flag, None)
        if value is None:
            return f"{type(module).__name__} is not in transformers' registry of experts"
        if value != expected:
            return f"{flag.lstrip('_')} is {value}"
    own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    if set(own) != {"gate_up_proj", "down_proj"}:
        return f"its parameters are {', '.join(own)}"
    (E, double, H), down = own["gate_up_proj"], own["down_proj"]
    return None if down == (E, H, double // 2) else f"gate_up_proj is {own['gate_up_proj']} and down_proj {down}"


def _number(name: str) -> int:
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", f".{name}.")
    if len(numbers) != 1:
        raise TargetError(f"{name} does not say which layer it is in: one number is expected in its name")
    return int(numbers[0])


def take_over(module: nn.Module, implementation: str) -> Any:
    """Has the registry's implementation of this name compute a module's experts, and returns its own configuration,
    with which `own_forward` and `give_back` undo it. All modules share one configuration: this one gets a copy."""
    own: Any = module.config
    changed = copy.copy(own)
    changed._experts_implementation_internal = implementation
    module.config = changed
    return own


def give_back(module: nn.Module, own: Any) -> None:
    """Undoes `take_over`."""
    module.config = own


def own_forward(module: nn.Module, own: Any) -> Forward:
    """What would compute a module that was taken over, with the configuration that it had."""
    plain = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    return ALL_EXPERTS_FUNCTIONS.get_interface(own._experts_implementation, plain)


def gate_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """(N, 2I) -> (N, I): the activation of the first half times the second."""
    return module._apply_gate  # type: ignore[return-value]


def may_group(x: Tensor, experts: ExpertWeights) -> bool:
    """Whether one `grouped_mm` can multiply all of them: on a GPU, where rows begin at multiples of 16 bytes."""
    num_experts, hidden, inner = experts.down.shape
    fits = num_experts <= MOST_GROUPS and hidden % 8 == 0 and inner % 8 == 0
    return x.is_cuda and x.dtype in GROUPED and experts.down.dtype == x.dtype and fits


def weigh(pairs_NH: Tensor, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """Each token's sum (T, H) over its K pairs, in a fixed order and in the wider of the two dtypes, as transformers
    does it. pairs (N, H), N = T K, in the order of the tokens."""
    num_tokens, num_slots = weights_TK.shape
    weighted_NH = pairs_NH * weights_TK.reshape(-1, 1)
    return weighted_NH.view(num_tokens, num_slots, -1).sum(1).to(dtype)
