"""molex.load: a saved mixture onto a base in memory, or with the base it names.

Everything that can be checked is checked before the model is touched, and what is built is taken back where the rest
fails: a refused file leaves the model as it was.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from molex.checks import listed
from molex.errors import CheckpointError, ConfigError, TargetError
from molex.experts.lora import LoRABank
from molex.io.checkpoint import check_layer, fill, read_record, refuse_foreign, set_names_and_stages
from molex.io.hub import local_folder
from molex.io.record import CONFIG_FILE, TENSOR_FILE, MixtureRecord, base_record
from molex.layer import MixtureLinear
from molex.linears import features
from molex.mixture import Mixture
from molex.surgery import convert

_INSTEAD = "load the base yourself and call molex.load(model, path)"


def load(
    source: nn.Module | str | Path,
    path: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | dict[str, int | str] | None = None,
) -> Mixture:
    """`load(model, path)` converts a base in place and fills it; `load(path)` first loads the base that the path names.

    path: a folder or a hub id (`revision` is its branch, tag or commit). dtype, device_map: for the base where it is
    loaded here; dtype is otherwise what the mixture was saved with. Raises CheckpointError on files that are missing,
    damaged, foreign, newer than this molex or made for another base; StateError on a model that is a mixture already.
    """
    if isinstance(source, nn.Module):
        if path is None:
            raise ConfigError("molex.load(model, path): give the mixture's folder or hub id")
        folder = find_folder(path, revision)
        return _convert_and_fill(source, read_record(folder), folder)
    if path is not None:
        raise ConfigError(f"molex.load({source!r}, ...): no model; call molex.load(model, path) or molex.load(path)")
    folder = find_folder(source, revision)
    record = read_record(folder)
    return _convert_and_fill(_load_base(record, source, revision, dtype, device_map), record, folder)


def find_folder(path: str | Path, revision: str | None = None) -> Path:
    """Where the files are: the folder itself, or a snapshot of it from the hub. Raises CheckpointError otherwise."""
    expected = "molex.load takes a folder written by mixture.save"
    folder = local_folder(path, [CONFIG_FILE, TENSOR_FILE], expected, revision)
    refuse_foreign(folder)
    return folder


def _load_base(
    record: MixtureRecord,
    source: str | Path,
    revision: str | None,
    dtype: torch.dtype | None,
    device_map: str | dict[str, int | str] | None,
) -> PreTrainedModel:
    """The base that a mixture names, or the one in its own folder. Raises CheckpointError where it cannot be had."""
    base, name = record.base, base_of(record, source)
    model_class = getattr(transformers, base.class_name, None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise CheckpointError(f"{source}: transformers has no model class {base.class_name!r}; {_INSTEAD}")
    try:
        loaded: Any = model_class.from_pretrained(
            name,
            revision=(revision or "main") if base.included else "main",
            dtype=base.dtype if dtype is None else dtype,
            device_map=device_map,
            use_safetensors=True,
            output_loading_info=True,
        )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{source}: its base {name!r} cannot be loaded ({reason}); {_INSTEAD}") from error
    model, report = loaded
    if report["missing_keys"]:
        raise CheckpointError(f"{name} lacks weights of the base: {listed(sorted(report['missing_keys']))}")
    return model


def base_of(record: MixtureRecord, source: str | Path) -> str:
    """Where the base of a mixture is: a folder or hub id. Raises CheckpointError where the mixture does not say."""
    base = record.base
    if base.included:
        return str(source)
    if base.quantization:
        raise CheckpointError(f"{source} was made on a base quantised by {base.quantization}: {_INSTEAD}")
    if not base.name_or_path:
        raise CheckpointError(f"{source} does not name its base, a {base.class_name} made in memory: {_INSTEAD}")
    return base.name_or_path


def load_experts(skeleton: nn.Module, folder: Path) -> Mixture:
    """A mixture over a base without memory (on the meta device): experts, routers and what it trains whole are real.

    For what reads experts alone; the model cannot run. Raises CheckpointError as `load` does.
    """
    return _convert_and_fill(skeleton, read_record(folder), folder, torch.device("cpu"))


def _convert_and_fill(
    model: nn.Module, record: MixtureRecord, folder: Path, device: torch.device | None = None
) -> Mixture:
    _check_base(model, record)
    try:
        mixture = convert(model, record.config, ranks=_first_ranks(record), device=device)
    except (TargetError, ConfigError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{folder} does not fit this model: {error}") from error
    try:
        for name in mixture.also_trained if device is not None else ():
            model.get_submodule(name).to_empty(device=device)
        _grow(mixture, record)
        fill(mixture, folder)
    except BaseException:  # an interrupt too must leave the model as it was
        mixture.revert()
        raise
    set_names_and_stages(mixture, record)
    return mixture


def _check_base(model: nn.Module, record: MixtureRecord) -> None:
    """Raises CheckpointError unless the model has the architecture, sizes and layers that the mixture was made for."""
    wanted, given = record.base, base_record(model)
    if given.model_type != wanted.model_type:
        raise CheckpointError(f"made for a {wanted.model_type} base, this model is a {given.model_type}")
    for name in wanted.sizes.keys() & given.sizes.keys():
        if given.sizes[name] != wanted.sizes[name]:
            raise CheckpointError(
                f"made for a base with {name} {wanted.sizes[name]}, this model has {given.sizes[name]}"
            )
    modules = dict(model.named_modules())
    for name, layer in record.layers.items():
        shape = features(modules[name]) if name in modules else None
        if shape != (layer.in_features, layer.out_features):
            raise CheckpointError(
                f"made for a base whose {name} is {layer.in_features} -> {layer.out_features}; "
                + (f"here it is {shape[0]} -> {shape[1]}" if shape else "this model has no such linear")
            )


def _first_ranks(record: MixtureRecord) -> dict[str, tuple[int, ...]]:
    """Ranks that are not the configuration's, of the experts there were before `mixture.grow`."""
    ranks = {name: layer.ranks for name, layer in record.layers.items()}
    return {name: own[: record.layers[name].frozen or None] for name, own in ranks.items() if own is not None}


def _grow(mixture: Mixture, record: MixtureRecord) -> None:
    """Freezes and adds what `mixture.grow` did on the saved one, and checks each layer against its record."""
    if mixture.layers.keys() != record.layers.keys():
        odd = sorted(mixture.layers.keys() ^ record.layers.keys())
        raise CheckpointError(f"targets {record.config.targets} now mean other layers than when saved: {listed(odd)}")
    for name, saved in record.layers.items():
        layer = mixture.layers[name]
        if saved.frozen:
            _grow_layer(layer, record.ranks(saved)[saved.frozen :])
        check_layer(layer, saved, record)


def _grow_layer(layer: MixtureLinear, ranks: tuple[int, ...]) -> None:
    """Freezes the experts there are and adds others, as `mixture.grow` did; scales come with the tensors."""
    bank, router = layer.experts, layer.router
    if not isinstance(bank, LoRABank) or router is None or not ranks:
        raise CheckpointError(f"{layer.name}: its {bank.num_experts} experts cannot all be frozen: damaged")
    bank.grow(ranks, 1.0)
    router.num_experts = bank.num_experts
