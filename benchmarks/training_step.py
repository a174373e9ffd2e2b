"""A whole MixLoRA training step of a small Llama (router, losses, backward, AdamW) against other ways of computing it.

    python -m benchmarks.training_step [--device cuda] [--dtype bfloat16] [--rounds 20]
    python -m benchmarks.training_step --hidden 2048 --inner 5632 --layers 2 --tokens 256 --threads 1

base              the frozen model, forward and the gradient of its input, without an optimizer
textbook, shared  MixLoRA's experts by the textbook's equation and as MoE-PEFT computes them (`blocks.py`), plain LoRAs
                  on attention, load balance over all layers
molex, BACKEND    `molex.preset("mixlora")`

All start from the same numbers, and must first agree with the textbook in float64, loss and gradients. Other codes'
experts have parameters of their own.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import molex
from benchmarks.blocks import NAMES, THEIRS, Apart, Method
from benchmarks.harness import interleave, ratios, summary, write
from benchmarks.problem import split
from benchmarks.stack import awake, build, compare, gradients, read_arguments, runs
from molex.experts.lora import LoRABank
from molex.layer import MixtureLinear
from molex.mixture import Mixture

SIZES = {"hidden": 1024, "inner": 2816, "layers": 2, "tokens": 1024, "experts": 8, "rank": 16, "top_k": 2}
BACKENDS = ("auto", "dense", "preload", "triton")
BALANCE, RATE, CHECKED_TOKENS = 1e-3, 1e-4, 32


class PlainLoRA(nn.Module):
    """What PEFT computes, without its dispatch."""

    def __init__(self, layer: MixtureLinear):
        super().__init__()
        assert isinstance(layer.experts, LoRABank)
        self.base, self.lora_A, self.lora_B = layer.base, layer.experts.lora_A, layer.experts.lora_B

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))


class RoutedBlock(nn.Module):
    """A feed-forward block with MixLoRA's experts. It keeps its logits (T, E) for the balance loss."""

    logits: Tensor

    def __init__(self, layers: Mapping[str, MixtureLinear], method: Method):
        super().__init__()
        first: Any = layers["gate"].router
        self.gate, self.top_k, self.method = first.gate.weight, first.config.top_k, method
        self.base = nn.ModuleDict({name: layer.base for name, layer in layers.items()})
        self.A, self.B = nn.ModuleDict(), nn.ModuleDict()
        for name, layer in layers.items():
            bank: Any = layer.experts
            parts = split(bank.lora_A, bank.lora_B, bank.ranks[0])
            self.A[name], self.B[name] = (nn.ParameterList(own) for own in parts)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        self.logits = F.linear(rows.to(self.gate.dtype), self.gate)
        picked = self.logits.softmax(-1).topk(self.top_k)
        weights = picked.values / picked.values.sum(-1, keepdim=True)
        A, B = ({name: [*own] for name, own in factors.items()} for factors in (self.A, self.B))  # type: ignore[misc]
        return self.method(Apart(dict(self.base.items()), weights, picked.indices, A, B), rows).view(x.shape)


def replace(mixture: Mixture, method: Method) -> nn.Module:
    """The mixture's model with RoutedBlock and PlainLoRA in place of its layers."""
    layers = mixture.layers
    blocks = {name.removesuffix(".gate_proj") for name in layers if name.endswith(".gate_proj")}
    found: dict[str, nn.Module] = {
        block: RoutedBlock({name: layers[f"{block}.{name}_proj"] for name in NAMES}, method) for block in blocks
    }
    found |= {name: PlainLoRA(layer) for name, layer in layers.items() if name.rpartition(".")[0] not in blocks}
    model = mixture.revert()
    for name, module in found.items():
        model.set_submodule(name, module)
    return model


def convert(base: LlamaForCausalLM, arguments: argparse.Namespace, backend: str) -> nn.Module:
    sizes = {"num_experts": arguments.experts, "rank": arguments.rank, "alpha": arguments.rank}
    torch.manual_seed(0)
    molex.convert(base, molex.preset("mixlora", backend=backend, dropout=0.0, top_k=arguments.top_k, **sizes))
    return awake(base)


def contestants(arguments: argparse.Namespace) -> dict[str, nn.Module]:
    """Every model that runs here; of the others the reason is printed."""
    base = build(arguments)
    made: dict[str, nn.Module] = {"base": base}
    for name, method in THEIRS.items():
        mixture: Any = convert(copy.deepcopy(base), arguments, "dense").molex_mixture
        made[name] = replace(mixture, method)
    for backend in BACKENDS:
        model = convert(copy.deepcopy(base), arguments, backend)
        if runs(model, backend, arguments.device):
            made[f"molex, {backend}"] = model
    return made


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Language modelling, and MixLoRA's balance: E · Σ_e f_e P_e over the tokens of all layers."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    mixture: Any = getattr(model, "molex_mixture", None)
    if mixture is not None:
        return loss + mixture.aux_loss()
    blocks = [module for module in model.modules() if isinstance(module, RoutedBlock)]
    if not blocks:
        return loss
    probs_NE = torch.cat([block.logits for block in blocks]).softmax(-1)
    num_experts = probs_NE.shape[1]
    share_E = F.one_hot(probs_NE.topk(blocks[0].top_k).indices, num_experts).sum(1).to(probs_NE.dtype).mean(0)
    return loss + BALANCE * num_experts * (share_E * probs_NE.mean(0)).sum()


def results(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The loss and the gradients, by name."""
    loss = loss_of(model, ids)
    return {"loss": loss.detach().double(), **{_in_block(name): grad for name, grad in gradients(model, loss).items()}}


def _in_block(name: str) -> str:
    """`…mlp.up_proj.lora_A` as it is called in a RoutedBlock, `…mlp.A.up`."""
    for projection in NAMES:
        for factor in "AB":
            name = name.replace(f"mlp.{projection}_proj.lora_{factor}", f"mlp.{factor}.{projection}")
    return name.replace("mlp.gate_proj.gate", "mlp.gate")


def check(models: Mapping[str, nn.Module], arguments: argparse.Namespace) -> None:
    """Refuses to time a model that is wrong. In float32: in a narrower type the gates may choose otherwise."""
    ids = torch.randint(0, 1024, (1, CHECKED_TOKENS), device=arguments.device)
    truth = results(copy.deepcopy(models["textbook"]).double(), ids)
    for name in models.keys() - {"base"}:
        compare(name, results(copy.deepcopy(models[name]).float(), ids), truth)


def training_step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE) if trained else None

    def step() -> None:
        loss_of(model, ids).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def main() -> None:
    description = "MixLoRA's training step against the textbook's and its own code's"
    arguments = read_arguments(description, SIZES, rounds=30, seconds=60.0)
    models = contestants(arguments)
    check(models, arguments)
    ids = torch.randint(0, 1024, (1, arguments.tokens), device=arguments.device)
    steps = {name: training_step(model, ids) for name, model in models.items()}
    warmup = 10 if arguments.device == "cuda" else 1
    times = interleave(steps, arguments.rounds, warmup, arguments.device, arguments.seconds)
    row = {name: getattr(arguments, name) for name in (*SIZES, "device", "dtype")} | {"rounds": len(times["base"])}
    row["milliseconds"] = {name: summary([1e3 * t for t in own]) for name, own in times.items()}
    row["times_base"] = {name: ratios(own, times["base"]) for name, own in times.items() if name != "base"}
    ours = [name for name in times if name.startswith("molex")]
    row |= {f"{name}_over": {own: ratios(times[name], times[own]) for own in ours} for name in THEIRS}
    write("training_step", row)


if __name__ == "__main__":
    main()
