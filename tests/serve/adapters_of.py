"""Adapters of every kind for one tiny base, on disk as their makers write them, and each served alone by its maker."""

import copy
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import molex
from molex.io.files import write_json
from molex.workbench import load_base, load_tokenizer
from tests.cases import PRESETS
from tests.models import tiny, wake_experts

LORAS = {
    "law": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    "code": peft.LoraConfig(r=12, lora_alpha=4, target_modules="all-linear", use_rslora=True),
    "poem": peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["o_proj"], rank_pattern={"model.layers.1.self_attn.o_proj": 5}
    ),
}
SHARES = {"law": 0.6, "code": -0.4}
MIXTURES = tuple(sorted(PRESETS))
TASKS = {"poly": 1, "mhr": 1, "mtlora": 1, "lora-mixer": 1}  # of these the routers ask for a task


def save_lora(name: str, base: PreTrainedModel, folder: Path) -> Path:
    """What PEFT writes."""
    model = peft.get_peft_model(base, copy.deepcopy(LORAS[name]))  # PEFT writes into it what it found
    fill(model, "lora_B", name)
    model.save_pretrained(str(folder / name))
    return folder / name


def save_workbench(folder: Path) -> None:
    """As `molex serve --model base` finds it: the workbench's base, and the LoRAs adapters/law and adapters/code."""
    load_base().save_pretrained(folder / "base")
    load_tokenizer().save_pretrained(folder / "base")
    for name in ("law", "code"):
        model = peft.get_peft_model(load_base(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
        fill(model, "lora_B", name)
        model.save_pretrained(str(folder / "adapters" / name))


def save_blend(folder: Path) -> Path:
    """Of the saved LoRAs beside it."""
    (folder / "blend").mkdir()
    write_json(folder / "blend" / "blend.json", {"adapters": {f"../{name}": share for name, share in SHARES.items()}})
    return folder / "blend"


def save_mixture(method: str, base: PreTrainedModel, folder: Path) -> Path:
    """What molex writes."""
    mixture = molex.convert(base, molex.preset(method, **PRESETS[method].overrides))
    wake_experts(base)
    fill(base, "router", method)
    mixture.save(folder / method)
    return folder / method


def fill(model: nn.Module, part: str, seed: str) -> None:
    """Parameters that training would have moved."""
    generator = torch.Generator().manual_seed(sum(map(ord, seed)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def save_everyone(folder: Path) -> Path:
    """Of a tiny Llama, every LoRA, a blend and every mixture."""
    for name in LORAS:
        save_lora(name, tiny("llama"), folder)
    save_blend(folder)
    for name in MIXTURES:
        save_mixture(name, tiny("llama"), folder)
    return folder


def own_model(name: str, folder: Path, architecture: str = "llama") -> PreTrainedModel:
    """The adapter alone on its base, by its own library, merged where it can be."""
    base = tiny(architecture)
    if name in LORAS:
        return peft.PeftModel.from_pretrained(base, str(folder / name)).merge_and_unload()  # type: ignore[return-value]
    if name == "blend":
        add_blend(base, folder, architecture)
    elif name != "base":
        molex.load(base, folder / name).set_tasks([TASKS[name]] if name in TASKS else None)
    return base.eval()


def alone(name: str, folder: Path, architecture: str, ids: Tensor) -> Tensor:
    """Logits (S, V) of one text (S,)."""
    with torch.no_grad():
        return own_model(name, folder, architecture).eval()(ids[None]).logits[0]


def add_blend(base: PreTrainedModel, folder: Path, architecture: str) -> None:
    """W + Σ_i w_i (W_i − W), W_i merged by PEFT."""
    merged = {
        name: peft.PeftModel.from_pretrained(tiny(architecture), str(folder / name)).merge_and_unload()
        for name in SHARES
    }
    plain = dict(tiny(architecture).named_parameters())
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            for member, share in SHARES.items():
                parameter += share * (dict(merged[member].named_parameters())[name] - plain[name])
