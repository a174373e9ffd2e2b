"""Adapters against a model: which of its linears they change, and which of its modules they replace whole.

A module trained whole (a head, resized embeddings) cannot be routed, so adapters that become experts of one mixture
must agree on it. Nothing here changes the model.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from molex.checks import listed
from molex.errors import CheckpointError, TargetError
from molex.io.adapter import Adapter
from molex.linears import features, master_dtype
from molex.targets import find_linears


def adapted_layers(model: nn.Module, adapters: Sequence[Adapter]) -> list[str]:
    """The linears that any of the adapters changes, in the model's order.

    Raises TargetError on one that the model lacks or has in another shape, CheckpointError on factors that experts
    here would round.
    """
    modules = dict(model.named_modules())
    for adapter in adapters:
        check_present(adapter.factors, modules, f"{adapter.name} changes")
    linears = find_linears(model, tuple({layer: None for adapter in adapters for layer in adapter.factors}))
    for adapter in adapters:
        for layer, lora in adapter.factors.items():
            _check_linear(f"{adapter.name}: {layer}", lora.A, lora.B, linears[layer])
    return [*linears]


def check_present(layers: Iterable[str], modules: Mapping[str, nn.Module], subject: str) -> None:
    """Raises TargetError on layers that are none of a model's modules. subject: who changes them, "x changes"."""
    absent = [layer for layer in layers if layer not in modules]
    if absent:
        ends = sorted({name.split(".")[-1] for name, module in modules.items() if name and features(module)})
        raise TargetError(
            f"{subject} {listed(absent)}, not in this model, which has another architecture or wrapper. "
            f"Linears here: {listed(ends, 12)}"
        )


def _check_linear(place: str, A_RD: Tensor, B_OR: Tensor, linear: nn.Module) -> None:
    given, here = (A_RD.shape[1], B_OR.shape[0]), features(linear)
    if given != here:
        raise TargetError(f"{place} is for a linear {given[0]} -> {given[1]}, here it is {here}: another base")
    master, wider = master_dtype(linear), torch.promote_types(A_RD.dtype, B_OR.dtype)
    if torch.promote_types(wider, master) != master:
        raise CheckpointError(f"{place} is {wider}, experts here are {master}, which would round it: load a wider base")


def agreed_whole(model: nn.Module, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """What all adapters replace whole, where it differs from the model's own.

    Raises CheckpointError on a parameter that the model lacks or has in another shape, or shares with another module,
    and on one that not all adapters agree on.
    """
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    replaced = {}
    for name in sorted({name for adapter in adapters for name in adapter.whole}):
        if name not in own:
            raise CheckpointError(f"{_holders(name, adapters)} replace {name}, which this model does not have")
        here = own[name].detach().cpu()
        value = _agreed(name, here, adapters)
        if torch.equal(value, here):
            continue
        twins = [other for other, tensor in own.items() if tensor is own[name] and other != name]
        if twins:
            raise CheckpointError(f"adapters replace {name}, which this model ties to {twins[0]}: untie them first")
        replaced[name] = value
    return replaced


def _agreed(name: str, here: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    values = [adapter.whole.get(name, here) for adapter in adapters]
    for value in values:
        if value.shape != here.shape:
            raise CheckpointError(
                f"{_holders(name, adapters)} replace {name} by {tuple(value.shape)}, here it is {tuple(here.shape)}: "
                "resize the model's embeddings first, or give the base they were trained on"
            )
        if not torch.equal(value.to(here.dtype), values[0].to(here.dtype)):
            raise CheckpointError(
                f"{_holders(name, adapters)} replace {name}, and not all of {len(adapters)} adapters agree on it. What "
                "is trained whole cannot be routed: leave some out, or train them without it in modules_to_save"
            )
    return values[0].to(here.dtype)


def _holders(name: str, adapters: Sequence[Adapter]) -> str:
    return listed([adapter.name for adapter in adapters if name in adapter.whole])


def replace_whole(model: nn.Module, replaced: Mapping[str, Tensor]) -> None:
    """Copies what `agreed_whole` found into the model."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, value in replaced.items():
            own[name].copy_(value)
