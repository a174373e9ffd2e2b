"""X-LoRA folders, of PEFT and of the original xlora package, made a mixture that routes as they did.

PEFT       adapter_config.json   peft_type XLORA, adapters {"0": path, ...}, xlora_depth, layerwise_scalings, ...
           adapter_model.safetensors   base_model.internal_xlora_classifier.layers.<i>.weight, .bias
original   xlora_config.json   adapters [name, ...], each a folder beside it; the same settings
           xlora_classifier.safetensors   inner.<i>.weight, .bias; last.weight, .bias

The classifier becomes the mixture's head (molex.routers.scalings, arXiv 2402.07148). Its last layer has a row for each
(linear, expert), linears in the order of the model's modules, which is molex's order too.

A folder of PEFT's holds no experts, only the paths they were trained from, and PEFT 0.20.0 to 0.21.2 lose classifier
layers: they drop every tensor with an expert's name in its key, and experts are called as its layers are numbered.
PEFT sorts the paths by name when it saves, so that "10" comes before "2"; here they are in the order of their numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molex.checks import listed
from molex.config import MixtureConfig
from molex.errors import CheckpointError, ConfigError
from molex.io.adapter import Adapter
from molex.io.files import read_json, read_tensors
from molex.io.fitting import adapted_layers
from molex.io.hub import local_folder
from molex.io.peft import CONFIG_FILE, TENSOR_FILE, read_adapter
from molex.mixture import Mixture
from molex.model_scope import head_width
from molex.presets import preset

ORIGINAL_CONFIG_FILE, ORIGINAL_TENSOR_FILE = "xlora_config.json", "xlora_classifier.safetensors"
_CLASSIFIER = "internal_xlora_classifier."
_SETTINGS = {  # theirs -> ours; what a folder leaves out has one default in both
    "xlora_depth": "depth",
    "xlora_size": "hidden_size",
    "xlora_dropout_p": "head_dropout",
    "softmax_temperature": "temperature",
    "enable_softmax": "softmax",
    "layerwise_scalings": "layerwise",
    "top_k_lora": "top_k",
    "enable_softmax_topk": "softmax_top_k",
    "global_scaling_weight": "global_weight",
}

Sources = Mapping[str, str | Path | Adapter]


def from_peft_xlora(
    model: nn.Module,
    path: str | Path,
    adapters: Sources | None = None,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    revision: str | None = None,
) -> Mixture:
    """Converts a model into the X-LoRA mixture saved at `path`, in place, and returns the handle.

    path: a folder of PEFT's or of the original xlora package, or a hub id of PEFT's (`revision` is its branch, tag or
    commit). adapters: the experts in the classifier's order, under names of your choice; otherwise those that the
    folder names. state_dict: the living model's, where its classifier is taken from instead of from the folder.

    Raises CheckpointError on a folder that lacks its classifier, its experts, or what a mixture cannot do, TargetError
    on a model it was not made for; then the model is as it was.
    """
    from molex.composing import from_peft  # needs what is read here, so it is above this file

    folder = local_folder(path, [CONFIG_FILE, TENSOR_FILE], "give a folder of an X-LoRA", revision)
    saved = _read_original(folder) if (folder / ORIGINAL_CONFIG_FILE).is_file() else _read_peft(folder)
    sources = _sources(saved, adapters)
    linears = _linears(saved, state_dict)
    experts = {name: _read_expert(saved, name, source) for name, source in sources.items()}
    layers = adapted_layers(model, [*experts.values()])
    _check_linears(linears, saved, head_width(model), len(experts), len(layers))
    mixture = from_peft(model, experts, router=saved.router)
    head = mixture.head
    assert head is not None
    own = [module for module in head.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for module, (weight, bias) in zip(own, linears, strict=True):
            module.weight.copy_(weight)
            module.bias.copy_(bias)
    return mixture


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """What a folder says. layers: the classifier's linears by name, in order. adapters: where its experts are;
    holds_experts: whether that is in the folder itself."""

    folder: Path
    config: Mapping[str, Any]
    router: MixtureConfig
    layers: list[str]
    tensor_file: str
    biased: bool
    adapters: Mapping[str, str]
    holds_experts: bool


def _read_peft(folder: Path) -> _Saved:
    config = read_json(folder / CONFIG_FILE)
    kind, adapters = config.get("peft_type"), config.get("adapters") or {}
    if kind != "XLORA":
        raise CheckpointError(f"{folder} is a PEFT adapter of type {kind!r}, no X-LoRA; molex.from_peft reads LORA")
    if not isinstance(adapters, Mapping) or not all(isinstance(path, str) for path in adapters.values()):
        raise CheckpointError(f"{folder} has adapters={adapters!r:.80}; they must be paths by number")
    router = _router(config, folder)
    stride = 3 if config.get("xlora_dropout_p", 0.2) > 0 else 2  # linear, ReLU and, where there is one, dropout
    return _Saved(
        folder=folder,
        config=config,
        router=router,
        layers=[f"layers.{stride * i}" for i in range(_depth(config))],
        tensor_file=TENSOR_FILE,
        biased=True,
        adapters={name: adapters[name] for name in _by_number(adapters)},
        holds_experts=False,
    )


def _read_original(folder: Path) -> _Saved:
    config = read_json(folder / ORIGINAL_CONFIG_FILE)
    names = config.get("adapters")
    if not isinstance(names, list | Mapping) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{folder} has adapters={names!r:.80}; it must be a list of names")
    router = _router(config, folder)
    if _depth(config) > 1 and not config.get("enable_relu_and_dropout", True):
        raise CheckpointError(f"{folder} has enable_relu_and_dropout=false: heads of several layers have ReLUs here")
    if config.get("enable_softmax_topk"):
        raise CheckpointError(
            f"{folder} has enable_softmax_topk, which in the xlora package is one softmax over all tokens of a batch: "
            "train it anew, with PEFT or molex, whose softmax is each token's own"
        )
    return _Saved(
        folder=folder,
        config=config,
        router=router,
        layers=[*(f"inner.{3 * i}" for i in range(_depth(config) - 1)), "last"],
        tensor_file=ORIGINAL_TENSOR_FILE,
        biased=config.get("use_bias", True),
        adapters={name: str(folder / name) for name in names},
        holds_experts=True,
    )


def _router(config: Mapping[str, Any], folder: Path) -> MixtureConfig:
    """Raises CheckpointError on a setting of a wrong kind, and on a first pass that is not the base's."""
    value = config.get("scaling_pass_value", 0.0)
    if value:
        raise CheckpointError(
            f"{folder} has scaling_pass_value={value!r}: its first pass runs with the experts on, here it is the "
            "base's. Set it to 0 (model.set_scaling_pass_value(0)), train the classifier on, and save it again"
        )
    try:
        return preset("xlora", **{ours: config[theirs] for theirs, ours in _SETTINGS.items() if theirs in config})
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _depth(config: Mapping[str, Any]) -> int:
    return config.get("xlora_depth", 1)


def _by_number(names: Mapping[str, Any]) -> list[str]:
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else [*names]


def _sources(saved: _Saved, adapters: Sources | None) -> Sources:
    """The experts, in the classifier's order."""
    if adapters is not None:
        if not isinstance(adapters, Mapping) or len(adapters) != len(saved.adapters):
            names = listed([*saved.adapters], 20)
            raise ConfigError(f"adapters={adapters!r:.200}; give a mapping of {len(saved.adapters)}, for {names}")
        return {name: adapters[name] for name in _by_number(adapters)}
    if saved.config.get("use_trainable_adapters") and not saved.holds_experts:
        raise CheckpointError(
            f"{saved.folder} has use_trainable_adapters: its experts were trained on, and PEFT does not save them so "
            "that they can be read; its paths lead to what they were before. Save them from the living model, one by "
            "one, and pass adapters={name: folder, ...}, or pass the untrained ones if you want those"
        )
    if not saved.adapters:
        raise CheckpointError(f"{saved.folder} names no adapters")
    return saved.adapters


def _read_expert(saved: _Saved, name: str, source: str | Path | Adapter) -> Adapter:
    if isinstance(source, Adapter):
        return replace(source, name=name)
    try:
        return read_adapter(source, name)
    except CheckpointError as error:
        raise CheckpointError(
            f"expert {name!r} of {saved.folder}: {error}. An X-LoRA's folder holds no experts, only where they were: "
            "pass adapters={name: folder, ...} if they are elsewhere now"
        ) from error


def _linears(saved: _Saved, state_dict: Mapping[str, Tensor] | None) -> list[tuple[Tensor, Tensor]]:
    """The classifier's weights and biases. Raises CheckpointError where some are missing, unknown or not finite."""
    if state_dict is None:
        named, place = read_tensors(saved.folder / saved.tensor_file), str(saved.folder / saved.tensor_file)
    else:
        named, place = {name: tensor for name, tensor in state_dict.items() if _CLASSIFIER in name}, "state_dict"
    tensors = {name.rpartition(_CLASSIFIER)[2]: tensor.detach().cpu() for name, tensor in named.items()}
    ends = ("weight", "bias") if saved.biased else ("weight",)
    wanted = [f"{layer}.{end}" for layer in saved.layers for end in ends]
    missing, odd = [name for name in wanted if name not in tensors], sorted(tensors.keys() - set(wanted))
    if missing:
        raise CheckpointError(
            f"{place} lacks {listed(missing)} of the classifier. PEFT 0.20.0 to 0.21.2 lose them when they save, and "
            "they cannot be had back from here: save the living model with PEFT 0.19.1, or pass its "
            "state_dict=model.state_dict()"
        )
    if odd:
        raise CheckpointError(f"{place} has {listed(odd)}, no part of a classifier of depth {len(saved.layers)}")
    broken = [name for name in wanted if not tensors[name].isfinite().all()]
    if broken:
        raise CheckpointError(f"{place}: {listed(broken)} is not finite: damaged, or training diverged")
    weights = {layer: tensors[f"{layer}.weight"] for layer in saved.layers}
    return [(w, tensors.get(f"{layer}.bias", w.new_zeros(w.shape[:1]))) for layer, w in weights.items()]


def _check_linears(
    linears: list[tuple[Tensor, Tensor]], saved: _Saved, width: int, num_experts: int, num_layers: int
) -> None:
    """Raises CheckpointError unless the classifier is for this model, these experts and the linears they change."""
    router: Any = saved.router.router
    num_out = num_experts * (num_layers if router.layerwise else 1)
    sizes = [width, *[router.hidden_size] * (len(linears) - 1), num_out]
    for name, (weight, bias), num_in, rows in zip(saved.layers, linears, sizes[:-1], sizes[1:], strict=True):
        if tuple(weight.shape) != (rows, num_in) or tuple(bias.shape) != (rows,):
            raise CheckpointError(
                f"{saved.folder}: the classifier's {name} is {tuple(weight.shape)} with a bias {tuple(bias.shape)}, it "
                f"must be {(rows, num_in)} for this model, its {num_experts} experts and the {num_layers} linears that "
                "they change: it is for another base or other experts"
            )
        if torch.promote_types(weight.dtype, torch.float32) != torch.float32:
            raise CheckpointError(f"{saved.folder}: the classifier is {weight.dtype}, which a float32 head would round")
