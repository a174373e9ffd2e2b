"""MixLoRA folders as MoE-PEFT writes them, against a loop over tokens and experts written from its forward."""

import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

import molex
from molex.errors import MolexError
from molex.io.inspect import describe
from molex.io.moe_peft import from_moe_peft
from molex.layer import MixtureLinear
from tests.models import VOCABULARY, tiny

CONFIG, TENSORS = "adapter_config.json", "adapter_model.bin"
IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(7))
MLP = {"llama": ("gate_proj", "up_proj", "down_proj"), "phi3": ("gate_up_proj", "down_proj")}
SETTINGS: dict[str, Any] = {
    "bias": "none",
    "peft_type": "MIXLORA",
    "r": 3,
    "lora_alpha": 7,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"],
    "routing_strategy": "mixlora",
    "num_experts": 4,
    "act_fn": "silu",
    "top_k": 2,
    "base_model_name_or_path": "tiny",
    "task_type": "CAUSAL_LM",
}

Tensors = dict[str, Tensor]


def write(folder: Path, model: nn.Module, **changed: Any) -> Path:
    """A folder as MoE-PEFT's trainer leaves it, with random weights, for all layers of a tiny model."""
    config = {name: value for name, value in (SETTINGS | changed).items() if value is not ...}
    of_experts = config | config.get("expert_lora", {})
    targets = config["target_modules"]
    targets = [name for name, on in targets.items() if on] if isinstance(targets, dict) else targets
    generator, tensors = torch.Generator().manual_seed(5), {}

    def pair(stem: str, linear: nn.Linear, rank: int) -> None:
        tensors[f"{stem}.lora_A.weight"] = 0.3 * torch.randn(rank, linear.in_features, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = 0.3 * torch.randn(linear.out_features, rank, generator=generator)

    for i, layer in enumerate(model.model.layers):  # type: ignore[union-attr,arg-type]
        stem = f"mixlora.layers.{i}"
        width = layer.mlp.down_proj.out_features  # type: ignore[union-attr]
        tensors[f"{stem}.mlp.moe_gate.weight"] = torch.randn(config["num_experts"], width, generator=generator)
        for part in ("self_attn", "mlp"):
            for name, linear in getattr(layer, part).named_children():
                if name in targets and part == "self_attn":
                    pair(f"{stem}.{part}.{name}", linear, config["r"])
                if name in targets and part == "mlp":
                    for e in range(config["num_experts"]):
                        pair(f"{stem}.{part}.{name}.experts.{e}", linear, of_experts["r"])
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=4))
    torch.save({name: nn.Parameter(tensor) for name, tensor in tensors.items()}, folder / TENSORS)
    return folder


def tensors_of(folder: Path) -> Tensors:
    return torch.load(folder / TENSORS, weights_only=True)


class TheirLinear(nn.Module):
    """One LoRA beside a linear: W x + s B (A x)."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, scale: float):
        super().__init__()
        self.base, self.A, self.B, self.scale = base, A.double(), B.double(), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * ((x @ self.A.T) @ self.B.T)


class TheirBlock(nn.Module):
    """Softmax, top-k, division by the sum; each chosen expert is the whole block with LoRAs of its own."""

    def __init__(self, mlp: nn.Module, stem: str, tensors: Tensors, config: dict[str, Any]):
        super().__init__()
        self.mlp, self.gate, self.top_k = mlp, tensors[f"{stem}.moe_gate.weight"].double(), config["top_k"]
        self.experts = nn.ModuleList()
        for e in range(config["num_experts"]):
            expert = {}
            for name in MLP["phi3" if hasattr(mlp, "gate_up_proj") else "llama"]:
                linear, own = getattr(mlp, name), f"{stem}.{name}.experts.{e}"
                lora = [tensors.get(f"{own}.lora_{side}.weight") for side in "AB"]
                expert[name] = linear if lora[0] is None else TheirLinear(linear, *lora, their_scale(config))
            self.experts.append(nn.ModuleDict(expert))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for b in range(x.shape[0]):
            for s in range(x.shape[1]):
                p = (self.gate @ x[b, s]).softmax(-1)
                chosen = p.argsort(descending=True)[: self.top_k].tolist()
                for e in chosen:
                    y[b, s] += p[e] / p[chosen].sum() * self.expert(self.experts[e], x[b, s])
        return y

    def expert(self, linears: Any, x_D: Tensor) -> Tensor:
        if "gate_up_proj" in linears:
            gate, up = linears["gate_up_proj"](x_D).chunk(2)
        else:
            gate, up = linears["gate_proj"](x_D), linears["up_proj"](x_D)
        return linears["down_proj"](gate * torch.sigmoid(gate) * up)


def their_scale(config: dict[str, Any]) -> float:
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def theirs(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model as MoE-PEFT would run it with this folder, in float64."""
    config = json.loads((folder / CONFIG).read_text())
    of_experts, tensors = config | config.get("expert_lora", {}), tensors_of(folder)
    for i, layer in enumerate(model.model.layers):  # type: ignore[union-attr,arg-type]
        stem = f"mixlora.layers.{i}"
        for name, linear in [*layer.self_attn.named_children()]:
            lora = [tensors.get(f"{stem}.self_attn.{name}.lora_{side}.weight") for side in "AB"]
            if lora[0] is not None:
                setattr(layer.self_attn, name, TheirLinear(linear, *lora, their_scale(config)))
        layer.mlp = TheirBlock(layer.mlp, f"{stem}.mlp", tensors, of_experts)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "experts of their own rank": ("llama", {"expert_lora": {"r": 5, "lora_alpha": 4, "lora_dropout": 0.1}}),
    "all experts": ("llama", {"top_k": 4}),
    "one expert of one": ("llama", {"num_experts": 1, "top_k": 1}),
    "no up_proj, no attention": ("llama", {"target_modules": ["gate_proj", "down_proj"]}),
    "attention alone": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "no act_fn, no top_k": ("llama", {"act_fn": ...}),
    "targets as trained": ("llama", {"target_modules": {"q_proj": True, "k_proj": False, "up_proj": True}}),
    "fused gate and up": ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_moe_peft_computes(case: str, tmp_path: Path) -> None:
    architecture, changed = CASES[case]
    folder = write(tmp_path / "m", tiny(architecture), **changed)
    model = tiny(architecture).double()
    mixture = from_moe_peft(model, folder, allow_bin=True)
    expected = logits(theirs(tiny(architecture).double(), folder))
    assert (expected - logits(tiny(architecture).double())).abs().max() > 0.05
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-10)
    assert mixture.config.scope == "ffn"
    assert mixture.config.method == "mixlora"
    assert mixture.experts == [str(e) for e in range(changed.get("num_experts", 4))]


def test_it_saves_and_loads_bit_for_bit(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", tiny("llama"), expert_lora={"r": 5, "lora_alpha": 4})
    model, again = tiny("llama"), tiny("llama")
    mixture = from_moe_peft(model, folder, allow_bin=True)
    mixture.save(tmp_path / "own")
    assert molex.load(again, tmp_path / "own").config == mixture.config
    assert torch.equal(logits(again), logits(model))
    mixture.revert()
    assert torch.equal(logits(model), logits(tiny("llama")))


def test_what_training_needs_comes_along(tmp_path: Path) -> None:
    trained = {"router_aux_loss_coef": 0.01, "jitter_noise": 0.1, "router_init_range": 0.5, "lora_dropout": 0.2}
    folder = write(tmp_path / "a", tiny("llama"), **trained)
    model = tiny("llama")
    mixture = from_moe_peft(model, folder, allow_bin=True)
    assert mixture.config.losses[0].balance_coefficient == 0.01  # type: ignore[attr-defined]
    assert mixture.config.router.jitter == 0.1  # type: ignore[attr-defined]
    assert mixture.config.dropout == 0.2
    assert all(layer.plain for name, layer in mixture.layers.items() if "self_attn" in name)
    model.train()
    (model(IDS, labels=IDS).loss + mixture.aux_loss()).backward()
    assert all(p.grad is not None for p in mixture.trainable_parameters())
    silent = write(tmp_path / "b", tiny("llama"), router_loss=False)
    assert from_moe_peft(tiny("llama"), silent, allow_bin=True).config.losses == ()


def test_a_folder_turned_into_safetensors_needs_no_leave(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", tiny("llama"))
    save_file({name: t.detach() for name, t in tensors_of(folder).items()}, folder / "adapter_model.safetensors")
    (folder / TENSORS).unlink()
    from_moe_peft(tiny("llama"), folder)


def refused(model: PreTrainedModel, folder: Path, match: str, allow_bin: bool = True) -> None:
    """A clear error, after which the model is what it was."""
    before, attributes = deepcopy(model.state_dict()), {*vars(model)}
    with pytest.raises(MolexError, match=match):
        from_moe_peft(model, folder, allow_bin=allow_bin)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {*vars(model)} == attributes
    assert not any(isinstance(module, MixtureLinear) or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "top-p": ({"routing_strategy": "mixlora-dynamic", "top_p": 0.8}, "mixlora-dynamic.*do not sum to 1"),
    "switch": ({"routing_strategy": "mixlora-switch"}, "mixlora-switch.*unchanged"),
    "old layout": ({"routing_strategy": "mixtral"}, "legacy_weights_convertor"),
    "unknown strategy": ({"routing_strategy": "best"}, "'best': which is not known here"),
    "no strategy": ({"routing_strategy": ...}, "routing_strategy=None"),
    "plain LoRA": ({"peft_type": "LORA"}, r"molex\.from_peft\(model, \{name: path\}, allow_bin=True\)"),
    "MoLA": ({"peft_type": "MOLA"}, r"molex\.preset\('mola'\)"),
    "LoRAMoE": ({"peft_type": "LORAMOE"}, r"molex\.preset\('loramoe'\)"),
    "another kind": ({"peft_type": "VERA"}, "type 'VERA', no MixLoRA"),
    "unknown setting": ({"capacity": 2}, "not understood here: capacity"),
    "unknown expert setting": ({"expert_lora": {"r": 3, "shared": True}}, "not understood here: shared"),
    "expert_lora": ({"expert_lora": 3}, "it must be an object"),
    "DoRA": ({"use_dora": True}, "saves no magnitudes"),
    "DoRA in experts": ({"expert_lora": {"use_dora": True}}, "saves no magnitudes"),
    "bias": ({"bias": "all"}, "no MixLoRA trains biases"),
    "no number of experts": ({"num_experts": None}, "num_experts=None"),
    "top_k": ({"top_k": 5}, "num_experts=4, top_k=5"),
    "top_k of another kind": ({"top_k": "2"}, "top_k='2'"),
    "rank": ({"r": 0}, "r=0"),
    "alpha": ({"lora_alpha": "7"}, "lora_alpha='7'"),
    "another rank": ({"r": 4}, "has A .*3, 32.* says rank 4"),
    "fewer experts": ({"num_experts": 3}, r"has mixlora.*experts\.3.* besides"),
    "more experts": ({"num_experts": 5}, r"lacks mixlora.*experts\.4"),
    "dropout": ({"lora_dropout": 1.5}, "dropout=1.5"),
    "jitter": ({"jitter_noise": "much"}, "jitter='much'"),
    "targets": ({"target_modules": "q_proj"}, "must be a list"),
    "targets elsewhere": ({"target_modules": ["fc1", "q_proj"]}, "adapts fc1; this model's blocks have"),
    "fewer targets": ({"target_modules": ["q_proj"]}, "besides"),
    "activation": ({"act_fn": "gelu"}, "act_fn='gelu'"),
    "unknown activation": ({"act_fn": "glu2"}, "act_fn='glu2'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configurations_that_are_refused(case: str, tmp_path: Path) -> None:
    changed, reason = REFUSED[case]
    folder = write(tmp_path / "m", tiny("llama"))
    config = {name: value for name, value in (SETTINGS | changed).items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(config))
    refused(tiny("llama"), folder, reason)


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def changed(name: str, change: Callable[[Tensor], Any]) -> Callable[[Tensors], Any]:
    return lambda tensors: {**tensors, name: change(tensors[name])}


GATE, UP = "mixlora.layers.0.mlp.moe_gate.weight", "mixlora.layers.1.mlp.up_proj.experts.2.lora_B.weight"
DAMAGE: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no gate": (
        lambda tensors: {n: t for n, t in tensors.items() if n != GATE},
        r"lacks mixlora\.layers\.0\.mlp\.moe_",
    ),
    "half a LoRA": (lambda tensors: {n: t for n, t in tensors.items() if n != UP}, "lacks .*experts.2.lora_B"),
    "gates of each linear": (renamed("mlp.moe_gate", "mlp.up_proj.moe_gate"), "lacks mixlora"),
    "old names": (renamed("mlp.moe_gate", "gate"), "lacks mixlora"),
    "a head": (lambda tensors: {**tensors, "classifier": torch.ones(2, 32)}, "a classification head"),
    "something more": (lambda tensors: {**tensors, "mixlora.bias": torch.ones(2)}, r"has mixlora\.bias besides"),
    "gate of another width": (changed(GATE, lambda gate: gate[:, :-1]), r"is \(4, 31\) .*must be \(4, 32\)"),
    "gate as wide as the block": (changed(GATE, lambda gate: torch.ones(4, 48)), r"is \(4, 48\)"),
    "gate of fewer experts": (changed(GATE, lambda gate: gate[:-1]), r"is \(3, 32\)"),
    "wide gate": (changed(GATE, lambda gate: gate.double()), "of float32 or less"),
    "wide expert": (changed(UP, lambda B: B.double()), "would round it"),
    "expert of another base": (changed(UP, lambda B: B[:-1]), "another base"),
    "expert of three axes": (changed(UP, lambda B: B[None]), "has A"),
    "not finite": (changed(UP, lambda B: B / 0), "is not finite"),
    "no tensor": (changed(UP, lambda B: 3), "no mapping of names to tensors"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_tensors_are_refused(case: str, tmp_path: Path) -> None:
    damage, reason = DAMAGE[case]
    folder = write(tmp_path / "m", tiny("llama"))
    torch.save(damage(tensors_of(folder)), folder / TENSORS)
    refused(tiny("llama"), folder, reason)


def test_files_that_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", tiny("llama"))
    refused(tiny("llama"), folder, "pass allow_bin=True", allow_bin=False)
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-200])
    refused(tiny("llama"), folder, "is damaged")
    torch.save({"x": ACT2FN["silu"]}, folder / TENSORS)
    refused(tiny("llama"), folder, "holds more than tensors")
    (folder / CONFIG).write_text("[]")
    refused(tiny("llama"), folder, "not an object")
    refused(tiny("llama"), folder / "nowhere", "no folder")


def test_models_it_was_not_made_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", tiny("llama"))
    refused(tiny("llama", num_hidden_layers=3), folder, r"lacks mixlora\.layers\.2")
    refused(tiny("llama", num_hidden_layers=1), folder, r"has mixlora\.layers\.1.* besides")
    refused(tiny("llama", hidden_size=64), folder, "must be")
    refused(tiny("llama", intermediate_size=40), folder, "another base")
    refused(tiny("gpt2"), folder, "has no linears layers")
    refused(tiny("gemma2"), folder, "act_fn='silu'")


def test_two_stacks_are_refused(tmp_path: Path) -> None:
    folder, model = write(tmp_path / "m", tiny("llama")), tiny("llama")
    model.vision = deepcopy(model.model)
    with pytest.raises(MolexError, match=r"model\.layers\.0.* and vision\.layers\.0.* are both layers\.0"):
        from_moe_peft(model, folder, allow_bin=True)


def test_inspecting_one_says_who_reads_it(tmp_path: Path) -> None:
    with pytest.raises(MolexError, match=r"molex\.from_moe_peft\(model, path, allow_bin=True\) makes it a mixture"):
        describe(write(tmp_path / "m", tiny("llama")))
