"""A mixture's linears computed as others compute them: same base, same experts, same router, another way between.

`replace(mixture, way)` puts them in the place of a converted model's layers, so that whole training and decoding steps
are compared. They route as all of these codes do: softmax over a gate, the k largest, renormalised.

loop            MoE-PEFT's code (MoLA on all linears)
meteora         MeteoRA's: a loop in training, gathered factors in inference, laid out for it once
every_expert    PEFT-style, as HydraLoRA's code
scattermoe      as published and "…, rank_gated" (`scattermoe.py`), where it is installed
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import scattermoe
from benchmarks.contestants import SCATTERMOE, Method, every_expert, loop, meteora, meteora_loop
from benchmarks.problem import Apart, Layer, Routed, Transposed, split, transposed
from molex.experts.lora import LoRABank
from molex.layer import MixtureLinear
from molex.mixture import Mixture
from molex.routers.topk import TopKRouter


class Way(NamedTuple):
    """apart: every expert has its own parameters, else one A and one B have all. transposed: inference has them so."""

    training: Method
    inference: Method
    apart: bool = False
    transposed: bool = False


def ways(device: str, dtype: torch.dtype) -> dict[str, Way]:
    """Those that can run there; of others the reason is printed."""
    found = {
        "loop": Way(loop, loop, apart=True),
        "meteora": Way(meteora_loop, meteora, transposed=True),
        "every_expert": Way(every_expert, every_expert, apart=True),
    }
    reason = scattermoe.available(Layer.draw((1, 8, 8), (1, 1, 1), device, dtype))
    if reason is None:
        return found | {name: Way(method, method) for name, method in SCATTERMOE.items()}
    print(f"without scattermoe: {reason}", flush=True)
    return found


class RoutedLinear(nn.Module):
    """Has the parameters of the layer it replaces. It has no balance loss, which only spares it work."""

    lora_A: Any  # one parameter, or a list of them
    lora_B: Any
    _laid_out: tuple[Tensor, Tensor] | None

    def __init__(self, layer: MixtureLinear, way: Way):
        super().__init__()
        experts, router = layer.experts, layer.router
        assert isinstance(experts, LoRABank)
        assert isinstance(router, TopKRouter)
        self.base, self.way, self.rank = layer.base, way, experts.ranks[0]
        if way.apart:
            parts = split(experts.lora_A, experts.lora_B, self.rank)
            self.lora_A, self.lora_B = (nn.ParameterList(own) for own in parts)
        else:
            self.lora_A, self.lora_B = experts.lora_A, experts.lora_B
        self.gate, self.top_k, self.scale = router.gate.weight, router.config.top_k, float(experts.scale[0])
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        picked = F.linear(rows.to(self.gate.dtype), self.gate).softmax(-1).topk(self.top_k)
        weights = self.scale * picked.values / picked.values.sum(-1, keepdim=True)
        method = self.way.training if self.training else self.way.inference
        y = method(self.layer(rows, weights, picked.indices))
        return y.view(*x.shape[:-1], y.shape[-1])

    def layer(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Routed:
        routed = (x, self.base, weights, expert_ids, None)
        if self.way.apart:
            return Apart(*routed, *([factor.to(x.dtype) for factor in own] for own in (self.lora_A, self.lora_B)))
        A, B = self.lora_A, self.lora_B
        if self.way.transposed and not self.training:
            if self._laid_out is None:
                self._laid_out = transposed(A.detach().to(x.dtype), B.detach().to(x.dtype), self.rank)
            return Transposed(*routed, *self._laid_out)
        return Layer(*routed, A.to(x.dtype), B.to(x.dtype), self.rank)

    def train(self, mode: bool = True) -> "RoutedLinear":
        self._laid_out = None
        return super().train(mode)


def replace(mixture: Mixture, way: Way) -> nn.Module:
    """The mixture's model, its layers computed in another way; it is no mixture any more."""
    found = {name: RoutedLinear(layer, way) for name, layer in mixture.layers.items()}
    model = mixture.revert()
    for name, linear in found.items():
        model.set_submodule(name, linear)
    return model
