"""MixLoRA folders of MoE-PEFT, mLoRA and the mixlora package, made a mixture that computes what they computed.

adapter_config.json   peft_type MIXLORA, routing_strategy, num_experts, top_k, r, lora_alpha, target_modules, ...
adapter_model.bin     mixlora.layers.<i>.mlp.moe_gate.weight (E, D), one gate a block
                      mixlora.layers.<i>.mlp.<linear>.experts.<e>.lora_A.weight (R, D), ....lora_B.weight (O, R)
                      mixlora.layers.<i>.self_attn.<linear>.lora_A.weight, ....lora_B.weight, plain LoRAs

    p = softmax(W x);   (w, ids) = topk(p, k);   w ← w / Σ w;   y = Σ_k w_k FFN_k(x)

FFN_k is the block with LoRAs of its own on the linears that target_modules names (MixLoRA, arXiv 2404.15159). MoE-PEFT
never turns LoRA dropout off, not even to generate; here it acts in training only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molex.checks import listed
from molex.config import MixtureConfig
from molex.errors import CheckpointError, ConfigError, TargetError
from molex.experts import LoRA
from molex.io.adapter import Adapter
from molex.io.files import read_json
from molex.io.fitting import adapted_layers
from molex.io.hub import local_folder
from molex.io.moe_peft_features import check_config
from molex.io.peft import BIN_FILE, CONFIG_FILE, pattern_value, read_weights, scale_of
from molex.linears import features
from molex.mixture import Mixture
from molex.presets import preset
from molex.routers.base import GatedRouter

_PARTS = ("mlp", "self_attn")
_LINEAR = re.compile(rf"(?:.*\.)?(layers\.\d+\.(?:{'|'.join(_PARTS)})\.\w+)")


def from_moe_peft(
    model: nn.Module, path: str | Path, *, allow_bin: bool = False, revision: str | None = None
) -> Mixture:
    """Converts a model into the MixLoRA mixture that MoE-PEFT saved, in place, and returns the handle.

    path: a folder or a hub id (`revision` is its branch, tag or commit). allow_bin: read adapter_model.bin, the only
    format MoE-PEFT writes, by torch's restricted unpickler. The experts are called "0", "1", ...

    Raises CheckpointError on damaged folders and on what is no MixLoRA, saying what to do, TargetError on a model that
    it was not made for; then the model is as it was.
    """
    from molex.surgery import convert  # needs what is read here, so it is above this file

    folder = local_folder(path, [CONFIG_FILE, BIN_FILE], "give a folder that MoE-PEFT wrote", revision)
    config = read_json(folder / CONFIG_FILE)
    check_config(config, folder)
    saved = _Saved(folder, config, _find_linears(model))
    saved.check_targets()
    _check_activations(model, saved)
    tensors = read_weights(folder, allow_bin)
    saved.check_tensors(tensors)
    plain, experts, gates = saved.attention(tensors), saved.experts(tensors), saved.gates(tensors, model)
    adapted_layers(model, [plain, *experts])
    mixture = convert(model, saved.mixture_config(), ranks=saved.ranks())
    try:
        _fill(mixture, plain, experts, gates)
    except BaseException:  # an interrupt too must leave the model as it was
        mixture.revert()
        raise
    return mixture


@dataclass(frozen=True)
class _Saved:
    """A MixLoRA's configuration beside a model. linears: of the model's blocks, by their names in the folder."""

    folder: Path
    config: Mapping[str, Any]
    linears: Mapping[str, str]

    @cached_property
    def of_experts(self) -> dict[str, Any]:
        """The LoRA settings of experts: the adapter's own, and what expert_lora says otherwise."""
        return {**self.config, **self.config.get("expert_lora", {})}

    @cached_property
    def targets(self) -> list[str]:
        """The linears with LoRAs, by their last names."""
        given = self.config.get("target_modules")
        names = [name for name, wanted in given.items() if wanted] if isinstance(given, Mapping) else given
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{self.folder} has target_modules={given!r}; it must be a list of linears' names")
        return sorted(set(names))

    @property
    def num_experts(self) -> int:
        return self.config["num_experts"]

    def part(self, part: str, adapted: bool = True) -> dict[str, str]:
        """The linears of "mlp" or "self_attn", all or those with LoRAs."""
        split = {key: key.split(".")[-2:] for key in self.linears}
        kept = [key for key, (of, name) in split.items() if of == part and (name in self.targets or not adapted)]
        return {key: self.linears[key] for key in kept}

    def check_targets(self) -> None:
        """Raises TargetError on a target that the model lacks."""
        known = sorted({key.split(".")[-1] for key in self.linears})
        absent = [name for name in self.targets if name not in known]
        if absent:
            raise TargetError(f"{self.folder} adapts {listed(absent)}; this model's blocks have {listed(known, 12)}")

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError unless there are just the tensors that configuration and model ask for, all finite."""
        stems = [*self.part("self_attn")]
        stems += [f"{key}.experts.{e}" for key in self.part("mlp") for e in range(self.num_experts)]
        wanted = {f"mixlora.{stem}.lora_{side}.weight" for stem in stems for side in "AB"}
        wanted |= {_gate_name(key) for key in self.part("mlp", adapted=False)}
        missing, odd = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
        if "classifier" in odd:
            raise CheckpointError(f"{self.folder} brings a classification head, which takes the place of no part here")
        if missing or odd:
            said = f"lacks {listed(missing)}" if missing else f"has {listed(odd)} besides"
            raise CheckpointError(f"{self.folder} {said}: it is damaged, or for a base with other layers")
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            raise CheckpointError(f"{self.folder}: {listed(broken)} is not finite: damaged, or training diverged")

    def attention(self, tensors: Mapping[str, Tensor]) -> Adapter:
        """The plain LoRAs."""
        factors = {name: self._lora(key, tensors, self.config) for key, name in self.part("self_attn").items()}
        return Adapter(name="attention", factors=factors)

    def experts(self, tensors: Mapping[str, Tensor]) -> list[Adapter]:
        """Each expert over all blocks."""
        linears = self.part("mlp").items()
        return [
            Adapter(
                name=str(e),
                factors={name: self._lora(f"{key}.experts.{e}", tensors, self.of_experts) for key, name in linears},
            )
            for e in range(self.num_experts)
        ]

    def _lora(self, stem: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoRA:
        A_RD, B_OR = (tensors[f"mixlora.{stem}.lora_{side}.weight"] for side in "AB")
        rank = _rank(config)
        if A_RD.dim() != 2 or B_OR.dim() != 2 or not A_RD.shape[0] == B_OR.shape[1] == rank:
            shapes = f"A {tuple(A_RD.shape)} and B {tuple(B_OR.shape)}"
            raise CheckpointError(f"{self.folder}: {stem} has {shapes}, its configuration says rank {rank}")
        return LoRA(A_RD, B_OR, scale_of(stem, config))

    def gates(self, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Each block's gate (E, D), under the name of the block's first linear."""
        firsts: dict[str, str] = {}
        for key, name in self.part("mlp", adapted=False).items():
            firsts.setdefault(_gate_name(key), name)
        for gate, name in firsts.items():
            sizes = features(model.get_submodule(name))
            assert sizes is not None
            given, wanted = tuple(tensors[gate].shape), (self.num_experts, sizes[0])
            if given != wanted or torch.promote_types(tensors[gate].dtype, torch.float32) != torch.float32:
                kind = tensors[gate].dtype
                raise CheckpointError(
                    f"{self.folder}: {gate} is {given} of {kind}, it must be {wanted} of float32 or less"
                )
        return {name: tensors[gate] for gate, name in firsts.items()}

    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Each layer's ranks: 1, the smallest, where its linear has no LoRAs."""
        routed, of_experts = self.part("mlp"), _rank(self.of_experts)
        every = self.part("mlp", adapted=False).items()
        ranks = {name: (of_experts if key in routed else 1,) * self.num_experts for key, name in every}
        return ranks | {name: (_rank(self.config),) for name in self.part("self_attn").values()}

    def mixture_config(self) -> MixtureConfig:
        """Raises CheckpointError on settings of another kind than they must be."""
        patterns = {p: {f"layers.*.{p}.{key.split('.')[-1]}" for key in self.part(p, p != "mlp")} for p in _PARTS}
        config, of_experts = self.config, self.of_experts
        loss = {"balance_coefficient": config.get("router_aux_loss_coef", 1e-3)}
        try:
            return preset(
                "mixlora",
                targets=tuple(sorted(patterns["mlp"])),
                plain_targets=tuple(sorted(patterns["self_attn"])),
                num_experts=self.num_experts,
                top_k=config.get("top_k", 2),
                rank=_rank(of_experts),
                alpha=of_experts.get("lora_alpha"),
                scaling="alpha/sqrt(rank)" if of_experts.get("use_rslora") else "alpha/rank",
                dropout=of_experts.get("lora_dropout", 0.0),
                gate_init=config.get("router_init_range", 0.02),
                jitter=config.get("jitter_noise", 0.0),
                **(loss if config.get("router_loss", True) else {"losses": ()}),
            )
        except ConfigError as error:
            raise CheckpointError(f"{self.folder / CONFIG_FILE}: {error}") from error


def _rank(config: Mapping[str, Any]) -> int:
    return pattern_value("rank_pattern", "r", "every linear", config)


def _gate_name(key: str) -> str:
    """The gate of the block that "layers.0.mlp.up_proj" lies in."""
    return f"mixlora.{key.rpartition('.')[0]}.moe_gate.weight"


def _find_linears(model: nn.Module) -> dict[str, str]:
    """The linears of a model's blocks. Raises TargetError where there are none, or two of one name."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        match = _LINEAR.fullmatch(name)
        if match and features(module):
            if match[1] in found:
                raise TargetError(f"{found[match[1]]} and {name} are both {match[1]} in a MixLoRA's folder")
            found[match[1]] = name
    if not any(".mlp." in key for key in found):
        raise TargetError(f"this {type(model).__name__} has no linears layers.<i>.mlp.<name>, as bases of MixLoRA have")
    return found


def _check_activations(model: nn.Module, saved: _Saved) -> None:
    """Raises TargetError unless the blocks' own activation is the one the experts were trained with."""
    from transformers.activations import ACT2FN

    wanted = saved.config.get("act_fn")
    if wanted is None:  # the base's own
        return
    grid = torch.linspace(-6, 6, 241)
    for block in dict.fromkeys(name.rpartition(".")[0] for name in saved.part("mlp", adapted=False).values()):
        mlp = model.get_submodule(block)
        own = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
        if own is None or wanted not in ACT2FN or not torch.allclose(own(grid), ACT2FN[wanted](grid), atol=1e-6):
            raise TargetError(f"these experts were trained with act_fn={wanted!r}, {block} runs {own}: another base")


@torch.no_grad()
def _fill(mixture: Mixture, plain: Adapter, experts: list[Adapter], gates: Mapping[str, Tensor]) -> None:
    for name, lora in plain.factors.items():
        mixture.layers[name].load_expert(0, "0", lora)
    for expert_id, expert in enumerate(experts):
        mixture.load_expert(expert_id, expert.name, expert.factors)
    for name, gate_ED in gates.items():
        router = mixture.layers[name].router
        assert isinstance(router, GatedRouter)
        router.gate.weight.copy_(gate_ED)
