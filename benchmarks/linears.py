"""A mixture's linears computed as others compute them: same base, same experts, same router, another way between.

`replace(mixture, way)` puts them in the place of a converted model's layers, so that whole training and decoding steps
are compared. They route as all of these codes do: softmax over a gate, the k largest, renormalised.

loop            MoE-PEFT's code (MoLA on all linears)
meteora         MeteoRA's: a loop in training, gathered factors in inference
every_expert    PEFT-style, as HydraLoRA's code
scattermoe      as published and "…, rank_gated" (`scattermoe.py`), where it is installed
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import scattermoe
from benchmarks.contestants import SCATTERMOE, Method, every_expert, loop, meteora, meteora_loop
from benchmarks.problem import Layer
from molex.experts.lora import LoRABank
from molex.layer import MixtureLinear
from molex.mixture import Mixture
from molex.routers.topk import TopKRouter


class Way(NamedTuple):
    training: Method
    inference: Method


def ways(device: str, dtype: torch.dtype) -> dict[str, Way]:
    """Those that can run there; of others the reason is printed."""
    found = {
        "loop": Way(loop, loop),
        "meteora": Way(meteora_loop, meteora),
        "every_expert": Way(every_expert, every_expert),
    }
    reason = scattermoe.available(Layer.draw((1, 8, 8), (1, 1, 1), device, dtype))
    if reason is None:
        return found | {name: Way(method, method) for name, method in SCATTERMOE.items()}
    print(f"without scattermoe: {reason}", flush=True)
    return found


class RoutedLinear(nn.Module):
    """Shares its parameters with the layer it replaces. It has no balance loss, which only spares it work."""

    def __init__(self, layer: MixtureLinear, way: Way):
        super().__init__()
        experts, router = layer.experts, layer.router
        assert isinstance(experts, LoRABank)
        assert isinstance(router, TopKRouter)
        self.base, self.way, self.rank = layer.base, way, experts.ranks[0]
        self.lora_A, self.lora_B = experts.lora_A, experts.lora_B
        self.gate, self.top_k, self.scale = router.gate.weight, router.config.top_k, float(experts.scale[0])
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        picked = F.linear(rows.to(self.gate.dtype), self.gate).softmax(-1).topk(self.top_k)
        weights = self.scale * picked.values / picked.values.sum(-1, keepdim=True)
        factors = (self.lora_A.to(x.dtype), self.lora_B.to(x.dtype))
        method = self.way.training if self.training else self.way.inference
        y = method(Layer(self.rank, rows, self.base, *factors, weights, picked.indices))
        return y.view(*x.shape[:-1], y.shape[-1])


def replace(mixture: Mixture, way: Way) -> nn.Module:
    """The mixture's model, its layers computed in another way; it is no mixture any more."""
    found = {name: RoutedLinear(layer, way) for name, layer in mixture.layers.items()}
    model = mixture.revert()
    for name, linear in found.items():
        model.set_submodule(name, linear)
    return model
