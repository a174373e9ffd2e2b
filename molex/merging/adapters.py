"""molex.merge: adapters into one, and where it goes.

molex.merge(model, adapters)                                into the weights of a model in memory
molex.merge("base/", adapters, out="merged/")               a dense checkpoint, streamed, no model loaded
molex.merge("base/", adapters, out="one/", kind="lora")     one PEFT LoRA
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from molex.checks import check_choice, listed
from molex.composing import as_adapter
from molex.errors import CheckpointError, ConfigError, StateError
from molex.io.adapter import Adapter
from molex.io.fitting import agreed_whole, replace_whole
from molex.io.hub import source_of
from molex.io.peft import write_adapter
from molex.library import Factors
from molex.merging.base import MergeRule, make_rule
from molex.merging.checkpoint import Base, open_base, write_dense
from molex.merging.folding import find_linears, fold, sizes_of
from molex.merging.merged import Merged, merge_factors
from molex.merging.weights import Weights

Source = str | Path | Adapter | Factors


def merge(
    model: nn.Module | str | Path,
    adapters: Mapping[str, Source],
    rule: str | MergeRule = "linear",
    weights: Weights | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    out: str | Path | None = None,
    kind: Literal["dense", "lora"] = "dense",
    dtype: torch.dtype | None = None,
    shard_size: int | str = "5GB",
) -> nn.Module | Path:
    """Merges adapters into a model in memory, which it returns, or from a base's folder into the folder `out`.

    adapters: folders or hub ids that PEFT wrote, `Adapter`s, or a LoRA for each linear, by name. rule, parameters: a
    rule's name and settings, or a MergeRule. weights: see `molex.merging.weights`. rank, energy: what of the result to
    keep, see `molex.merging.core.truncate`. kind: what `out` becomes. dtype, shard_size: of a dense `out`.

    Raises ConfigError on settings that do not fit together, TargetError where adapters do not fit the base,
    CheckpointError on damaged files and adapters that disagree on modules trained whole. The model, or the folder, is
    then as it was.
    """
    check_choice("kind", kind, ("dense", "lora"))
    read, ready = read_sources(adapters), make_rule(rule, parameters)
    output = Output(kind=kind, dtype=dtype, shard_size=shard_size)
    if isinstance(model, nn.Module):
        _check_in_memory(model, output, out)
        experts = {adapter.name: adapter.factors for adapter in read}
        names = (name for name, _ in model.named_modules())
        merged = merge_factors(experts, ready, weights, names=names, rank=rank, energy=energy)
        if out is None:
            return _into_model(model, read, merged)
        return _beside_model(model, read, merged, output, Path(out))
    if out is None:
        raise ConfigError(f"molex.merge({str(model)!r}, ...): say where the result goes, out=FOLDER")
    merge_folder(model, read, ready, weights, Path(out), output, rank=rank, energy=energy)
    return Path(out)


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a folder gets. texts: further files. on_layer, on_tensor: told of each linear merged and tensor written."""

    kind: Literal["dense", "lora"] = "dense"
    dtype: torch.dtype | None = None
    shard_size: int | str = "5GB"
    texts: Mapping[str, str] = field(default_factory=dict)
    on_layer: Callable[[str], None] = lambda layer: None
    on_tensor: Callable[[str], None] = lambda name: None


def merge_folder(
    base: str | Path,
    adapters: list[Adapter],
    rule: MergeRule,
    weights: Weights | None,
    out: Path,
    output: Output,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> Merged:
    """Merges adapters over a base's folder into the folder `out`; returns what the merge was. Raises as `merge`."""
    opened = open_base(base)
    experts, whole = {adapter.name: adapter.factors for adapter in adapters}, same_whole(adapters)
    opened.check({layer: size for adapter in adapters for layer, size in sizes_of(adapter.factors).items()}, whole)
    names = (name for name, _ in opened.model.named_modules())
    merged = merge_factors(experts, rule, weights, names=names, rank=rank, energy=energy, on_layer=output.on_layer)
    write_merged(opened, str(base), merged, whole, out, output)
    return merged


def write_merged(
    base: Base,
    base_name: str,
    merged: Merged,
    whole: Mapping[str, Tensor],
    out: Path,
    output: Output,
    companions: Path | None = None,
) -> None:
    """The folder `out`: one adapter of the base of this name, or a dense checkpoint. Raises as `write_dense`."""
    if output.kind == "lora":
        write_adapter(one_adapter(merged, whole, base_name, output.dtype), out, output.texts)
        return
    write_dense(
        base,
        merged.factors,
        whole,
        out,
        dtype=output.dtype,
        shard_size=output.shard_size,
        texts=output.texts,
        companions=companions,
        on_tensor=output.on_tensor,
    )


def read_sources(adapters: Mapping[str, Source]) -> list[Adapter]:
    """Every adapter under the caller's name for it. Raises ConfigError on what is no adapter."""
    if not isinstance(adapters, Mapping) or not adapters:
        raise ConfigError(f"adapters={adapters!r:.80}; give a mapping of names to folders that PEFT wrote")
    return [
        Adapter(name=name, factors=source) if isinstance(source, Mapping) else as_adapter(source, name)
        for name, source in adapters.items()
    ]


def same_whole(adapters: list[Adapter]) -> dict[str, Tensor]:
    """What the adapters replace whole. Raises CheckpointError where not all have the same."""
    names = sorted({name for adapter in adapters for name in adapter.whole})
    for name in names:
        values = [adapter.whole.get(name) for adapter in adapters]
        if any(value is None or not torch.equal(value, values[0]) for value in values):  # type: ignore[arg-type]
            raise CheckpointError(
                f"{listed([a.name for a in adapters if name in a.whole])} replace {name}, and not all of "
                f"{len(adapters)} adapters agree on it: there is no rule for what is trained whole; leave some out"
            )
    return {name: adapters[0].whole[name] for name in names}


def one_adapter(merged: Merged, whole: Mapping[str, Tensor], base: str, dtype: torch.dtype | None) -> Adapter:
    """The merged LoRAs as an adapter. Raises ConfigError where nothing is left."""
    if not merged.factors:
        raise ConfigError("the merged adapter is zero everywhere: its weights cancel, or its sources are zero")
    factors = merged.factors
    if dtype is not None:
        factors = {n: lora._replace(A=lora.A.to(dtype), B=lora.B.to(dtype)) for n, lora in factors.items()}
    return Adapter(name="merged", factors=factors, whole=whole, base=base)


def _check_in_memory(model: nn.Module, output: Output, out: str | Path | None) -> None:
    if hasattr(model, "molex_mixture"):
        raise StateError("this model is a mixture; call mixture.merge, or mixture.revert first")
    if output.kind == "dense" and out is not None:
        raise ConfigError("a model in memory is merged in place: call merge without out, then save_pretrained")
    if output.kind == "dense" and output.dtype is not None:
        raise ConfigError(f"dtype={output.dtype}: a model in memory keeps its own; call model.to first")
    if output.kind == "lora" and out is None:
        raise ConfigError("kind='lora' is written to a folder: say where, out=FOLDER")


def _into_model(model: nn.Module, adapters: list[Adapter], merged: Merged) -> nn.Module:
    whole = agreed_whole(model, adapters)
    fold(model, merged.factors)
    replace_whole(model, whole)
    return model


def _beside_model(model: nn.Module, adapters: list[Adapter], merged: Merged, output: Output, out: Path) -> Path:
    find_linears(model, sizes_of(merged.factors))
    write_adapter(one_adapter(merged, same_whole(adapters), source_of(model), output.dtype), out)
    return out
