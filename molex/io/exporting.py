"""Experts back into adapters: one folder each, in PEFT's format.

An expert that came from an adapter takes its own configuration and dtype back, so that, untrained since, it is the
folder it was. Others get a configuration that means them. Layers where an expert is zero in both factors are left out:
an adapter that did not change a layer is a zero expert there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molex.errors import CheckpointError, ConfigError
from molex.experts import LoRA
from molex.io.adapter import Adapter
from molex.io.hub import source_of
from molex.io.peft import write_adapter
from molex.mixture import Mixture


def export_peft(mixture: Mixture, directory: Path) -> list[Path]:
    """See `Mixture.export_peft`."""
    whole = trained_whole(mixture)
    every = [adapter_of(mixture, expert_id, whole) for expert_id in range(len(mixture.experts))]
    adapters = [adapter for adapter in every if adapter.factors]
    folders = [_folder(directory, adapter.name) for adapter in adapters]
    for adapter, folder in zip(adapters, folders, strict=True):
        write_adapter(adapter, folder)
    return folders


def _folder(directory: Path, name: str) -> Path:
    """Raises ConfigError on names that lead elsewhere than into the directory, CheckpointError on a file's."""
    if Path(name).name != name or name == ".." or "\0" in name:
        raise ConfigError(
            f"expert {name!r} cannot be a folder of that name; give it another: "
            "mixture.load_expert(expert_id, name, mixture.factors(expert_id))"
        )
    if (directory / name).is_file():
        raise CheckpointError(f"{directory / name} is a file; give another folder")
    return directory / name


def adapter_of(mixture: Mixture, expert_id: int, whole: Mapping[str, Tensor]) -> Adapter:
    """One expert as an adapter, with `whole`, what the mixture trains beside its experts.

    Raises ConfigError where experts are more than LoRAs.
    """
    name = mixture.experts[expert_id]
    origin: dict[str, Any] = mixture.origins.get(name, {})
    dtype = getattr(torch, origin["dtype"]) if origin else torch.float64
    factors = {
        layer: LoRA(_narrow(lora.A, dtype), _narrow(lora.B, dtype), lora.scale)
        for layer, lora in mixture.factors(expert_id).items()
        if lora.A.any() or lora.B.any()
    }
    narrowed = {key: _narrow(tensor, dtype) for key, tensor in whole.items()}
    base = source_of(mixture.model)
    return Adapter(name=name, factors=factors, whole=narrowed, base=base, config=origin.get("config", {}))


def trained_whole(mixture: Mixture) -> dict[str, Tensor]:
    """What a mixture trains beside its experts, as parameters by name."""
    modules = tuple(f"{module}." for module in mixture.also_trained)
    return {key: tensor for key, tensor in mixture.state_dict().items() if key.startswith(modules)} if modules else {}


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype it came in, where that loses nothing: what was trained since keeps its own."""
    narrowed = tensor.to(dtype)
    exact = dtype.itemsize < tensor.dtype.itemsize and torch.equal(narrowed.to(tensor.dtype), tensor)
    return narrowed if exact else tensor
