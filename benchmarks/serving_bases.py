"""Bases that are served, adapters for them on disk, and each adapter merged into a base of its own.

A Llama with LoRAs on all its linears, and a Qwen3-MoE of which each ESFT adapter replaces some experts in every layer,
others for each adapter. Random, of the sizes that are asked for.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import peft
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import molex.esft
from molex.esft import Selection

VOCABULARY = 512
EXPERTS, TOP_K, REPLACED = 32, 4, 6  # an adapter replaces what a fifth of the choices are
HEAD = 64


def dense(hidden: int, layers: int) -> LlamaForCausalLM:
    """Inner width 8/3 of the hidden one."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=hidden // HEAD,
        vocab_size=VOCABULARY,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def sparse(hidden: int, layers: int) -> PreTrainedModel:
    """Each of its experts is half as wide as the hidden width."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=hidden,
        intermediate_size=hidden,
        moe_intermediate_size=hidden // 2,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=hidden // HEAD,
        head_dim=HEAD,
        vocab_size=VOCABULARY,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def save_loras(base: PreTrainedModel, folder: Path, number: int, rank: int) -> list[Path]:
    """Trained ones: B is not zero."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=rank, target_modules="all-linear"))
    folders = []
    for index in range(number):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        folders.append(folder / str(index))
        model.save_pretrained(str(folders[-1]))
    return folders


def save_swaps(base: PreTrainedModel, folder: Path, number: int, rank: int) -> list[Path]:
    """rank: of nothing here."""
    dice, folders = Random(0), []
    for index in range(number):
        chosen = {layer: tuple(dice.sample(range(EXPERTS), REPLACED)) for layer in molex.esft.find_layers(base)}
        tuning = molex.esft.tune(base, Selection(chosen))
        with torch.no_grad():
            for parameter in tuning.trainable_parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        folders.append(folder / str(index))
        tuning.save(folders[-1])
        tuning.revert()
    return folders


def merged_lora(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """By PEFT."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).merge_and_unload()  # type: ignore


def merged_swap(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The files' matrices over the base's."""
    model = copy.deepcopy(base)
    own = dict(model.named_parameters())
    for key, tensor in load_file(folder / "model.safetensors").items():
        experts, expert, projection, _ = key.rsplit(".", 3)
        if projection == "down_proj":
            own[f"{experts}.down_proj"].data[int(expert)] = tensor
        else:
            start = 0 if projection == "gate_proj" else len(tensor)
            own[f"{experts}.gate_up_proj"].data[int(expert), start : start + len(tensor)] = tensor
    return model


class Kind(NamedTuple):
    """hidden: the base's usual width. merged: a base with one adapter, without a server."""

    hidden: int
    base: Callable[[int, int], PreTrainedModel]
    save: Callable[[PreTrainedModel, Path, int, int], list[Path]]
    merged: Callable[[PreTrainedModel, Path], PreTrainedModel]


KINDS = {"lora": Kind(512, dense, save_loras, merged_lora), "esft": Kind(192, sparse, save_swaps, merged_swap)}
