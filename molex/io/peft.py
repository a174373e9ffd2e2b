"""PEFT LoRA folders: read strictly into an `Adapter`, written so that PEFT loads them.

adapter_config.json          r, lora_alpha, use_rslora, rank_pattern, alpha_pattern, ...
adapter_model.safetensors    base_model.model.<linear>.lora_A.weight (R, D), ....lora_B.weight (O, R), and whole modules

    scale = alpha / r,  or alpha / sqrt(r) with use_rslora;  r and alpha as the patterns say for each linear

Whatever a LoRA of the form scale · B A cannot express is refused by name (molex.io.peft_features), never ignored.
"""

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from molex.checks import listed
from molex.errors import CheckpointError
from molex.experts import LoRA
from molex.io.adapter import Adapter
from molex.io.files import check_numbers, read_json, read_tensors, staged, write_json
from molex.io.hub import local_folder
from molex.io.peft_features import check_features

CONFIG_FILE, TENSOR_FILE, BIN_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
# PEFT also saves embeddings that were resized, without listing them
_RESIZED = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "shared")


def read_adapter(
    path: str | Path, name: str | None = None, *, allow_bin: bool = False, revision: str | None = None
) -> Adapter:
    """Reads a folder that PEFT wrote, or a hub id's at `revision`. Tensors are as they lie on disk, on the CPU.

    name: otherwise the folder's.
    allow_bin: also take an old adapter_model.bin, by torch's restricted unpickler. Raises CheckpointError on files
    that are missing, damaged or of another kind, and on every feature that is more than a LoRA, naming it.
    """
    folder = _find_folder(path, allow_bin, revision)
    config = read_config(folder)
    tensors = {_bare(key): tensor for key, tensor in read_weights(folder, allow_bin).items()}
    layers = sorted(key.removesuffix(_A) for key in tensors if key.endswith(_A))
    whole = {key: tensor for key, tensor in tensors.items() if ".lora_" not in key}
    check_features(config, [*tensors], folder)
    if not layers:
        raise CheckpointError(f"{folder} holds no lora_A of a linear: it adds nothing")
    factors = {layer: _factors(layer, tensors, config, folder) for layer in layers}
    _check_whole(whole, config, folder)
    base = config.get("base_model_name_or_path") or ""
    return Adapter(
        name=folder.resolve().name if name is None else name, factors=factors, whole=whole, base=base, config=config
    )


def _find_folder(path: str | Path, allow_bin: bool, revision: str | None) -> Path:
    """On the hub an adapter has one of two files; the old one is asked for last, and only where it is allowed."""
    expected = "give a folder that PEFT's save_pretrained wrote"
    try:
        return local_folder(path, [CONFIG_FILE, TENSOR_FILE], expected, revision)
    except CheckpointError:
        if not allow_bin:
            raise
    return local_folder(path, [CONFIG_FILE, BIN_FILE], expected, revision)


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises CheckpointError where it is missing, damaged, or no LoRA's."""
    config = read_json(folder / CONFIG_FILE)
    kind = config.get("peft_type")
    if kind == "XLORA":
        raise CheckpointError(f"{folder} is a PEFT X-LoRA, a router over adapters: molex.from_peft_xlora reads it")
    if kind != "LORA":
        raise CheckpointError(f"{folder} is a PEFT adapter of type {kind!r}; experts come from LORA only")
    return config


def read_weights(folder: Path, allow_bin: bool) -> Mapping[str, Tensor]:
    """A folder's tensors, of safetensors, or of adapter_model.bin where it is allowed. Raises CheckpointError."""
    if (folder / TENSOR_FILE).is_file() or not (folder / BIN_FILE).is_file():
        return read_tensors(folder / TENSOR_FILE)
    if not allow_bin:
        raise CheckpointError(
            f"{folder} holds {BIN_FILE}, a format that can carry code: pass allow_bin=True to read it by torch's "
            "restricted unpickler, or save it as safetensors"
        )
    return read_bin(folder / BIN_FILE)


def read_bin(path: Path) -> Mapping[str, Tensor]:
    """An old checkpoint of tensors, with weights_only=True. Raises CheckpointError where it holds anything else."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        raise CheckpointError(f"{path} is damaged, or holds more than tensors: {error}") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} holds no mapping of names to tensors")
    return tensors


def _bare(key: str) -> str:
    """A tensor's name as the base model has it; adapters wrapped twice have PEFT's prefix twice."""
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    return key


def _factors(layer: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> LoRA:
    """One linear's LoRA. Raises CheckpointError where its two halves, or it and the configuration, disagree."""
    place = f"{folder}: {layer}"
    if layer + _B not in tensors:
        raise CheckpointError(f"{place} has lora_A without lora_B: damaged")
    A_RD, B_OR = tensors[layer + _A], tensors[layer + _B]
    if A_RD.dim() != 2 or B_OR.dim() != 2:
        raise CheckpointError(f"{place} is no LoRA of a linear, its lora_A is {tuple(A_RD.shape)}; leave it out")
    rank = pattern_value("rank_pattern", "r", layer, config)
    if not A_RD.shape[0] == B_OR.shape[1] == rank:
        raise CheckpointError(
            f"{place} has A {tuple(A_RD.shape)} and B {tuple(B_OR.shape)}, its configuration says rank {rank}"
        )
    check_numbers(place, A_RD, B_OR)
    return LoRA(A_RD, B_OR, scale_of(layer, config))


def scale_of(layer: str, config: Mapping[str, Any]) -> float:
    """What B A is multiplied by. Raises CheckpointError where the configuration has no number for it."""
    rank = pattern_value("rank_pattern", "r", layer, config)
    alpha = pattern_value("alpha_pattern", "lora_alpha", layer, config)
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def pattern_value(pattern: str, default: str, layer: str, config: Mapping[str, Any]) -> Any:
    """A linear's rank or alpha: of the first pattern, a regular expression, that its name ends in, or the default."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{CONFIG_FILE} has {pattern}={patterns!r}; it maps names of linears to numbers")
    try:
        matching = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)]
    except re.error as error:
        raise CheckpointError(f"{CONFIG_FILE} has a {pattern} that is no regular expression: {error}") from error
    value = [*matching, config.get(default)][0]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"{CONFIG_FILE} has {default}={value!r} for {layer}; it must be a number above 0")
    return value


def _check_whole(whole: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Raises CheckpointError on tensors that are neither LoRA's nor of a module the configuration says is saved."""
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(module, str) for module in saved):
        raise CheckpointError(f"{CONFIG_FILE} has modules_to_save={saved!r}; it lists names of modules")
    listed_or_resized = (*saved, *_RESIZED)
    stray = [key for key in whole if not any(f".{module}." in f".{key}" for module in listed_or_resized)]
    if stray:
        raise CheckpointError(f"{folder} has tensors of no LoRA and no module in modules_to_save: {listed(stray)}")


def write_adapter(adapter: Adapter, directory: str | Path, texts: Mapping[str, str] | None = None) -> None:
    """Writes a folder that `PeftModel.from_pretrained` loads: an adapter that was read comes out as it was. texts:
    further files to write beside.

    An adapter without a configuration of its own gets one that means its factors: r, lora_alpha and patterns for
    linears that differ. Raises CheckpointError where a configuration of its own does not mean these factors.
    """
    config = dict(adapter.config) or make_config(adapter)
    _list_whole(config, adapter.whole)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in adapter.whole.items()}
    for layer, lora in adapter.factors.items():
        if not math.isclose(lora.scale, scale_of(layer, config), rel_tol=1e-6):
            raise CheckpointError(f"{layer} has scale {lora.scale}, its configuration means {scale_of(layer, config)}")
        tensors[PREFIX + layer + _A], tensors[PREFIX + layer + _B] = lora.A, lora.B
    separate = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with staged(Path(directory)) as scratch:
        save_file(separate, scratch / TENSOR_FILE, metadata={"format": "pt"})
        write_json(scratch / CONFIG_FILE, config)
        for name, text in (texts or {}).items():
            (scratch / name).write_text(text, encoding="utf-8")


def _list_whole(config: dict[str, Any], whole: Mapping[str, Tensor]) -> None:
    """PEFT replaces a module only where modules_to_save names it."""
    saved = [*(config.get("modules_to_save") or ())]
    modules = {name.rpartition(".")[0] for name in whole}
    missing = [module for module in sorted(modules) if not f".{module}".endswith(tuple(f".{name}" for name in saved))]
    if missing:
        config["modules_to_save"] = saved + missing


def make_config(adapter: Adapter) -> dict[str, Any]:
    """adapter_config.json for factors that come from no PEFT folder."""
    ranks = {layer: lora.A.shape[0] for layer, lora in adapter.factors.items()}
    alphas = {layer: lora.scale * ranks[layer] for layer, lora in adapter.factors.items()}
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [*adapter.factors],
        "rank_pattern": {re.escape(layer): value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(layer): value for layer, value in alphas.items() if value != alpha},
        "inference_mode": True,
    }
