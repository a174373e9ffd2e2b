"""describe: what is in a folder, from its JSON and the headers of its tensors. No base, no model, no numbers read.

Understands mixtures, and LoRA adapters in PEFT's format.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from molex.errors import CheckpointError
from molex.io.checkpoint import read_record
from molex.io.files import Header, read_headers, read_json
from molex.io.record import CONFIG_FILE, TENSOR_FILE, LayerRecord, MixtureRecord
from molex.routers import routers

_ADAPTER_CONFIG, _ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
_IMPORTED = {
    "XLORA": "a PEFT X-LoRA, a router over adapters that lie elsewhere: molex.from_peft_xlora(model, path)",
    "MIXLORA": "a MixLoRA of MoE-PEFT: molex.from_moe_peft(model, path, allow_bin=True)",
}


@dataclass(frozen=True, kw_only=True)
class LayerDescription:
    """One converted linear. rank: one number, or one for each expert where they differ."""

    name: str
    in_features: int
    out_features: int
    num_experts: int
    rank: int | tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a folder holds, as plain values. kind: "mixture" or "peft". base: the name in its files, if any.

    num_parameters: of experts and routers, or of the adapter. num_bytes: of all tensors, also of modules trained whole.
    num_experts: fewest and most in a layer.
    rank, alpha: one number, or one for each expert of a mixture, or all that occur in a PEFT adapter.
    """

    kind: str
    method: str
    base: str
    base_class: str
    router: str
    num_layers: int
    num_experts: tuple[int, int]
    rank: int | tuple[int, ...]
    alpha: float | tuple[float, ...]
    targets: tuple[str, ...]
    also_trained: tuple[str, ...]
    num_parameters: int
    num_bytes: int
    experts: tuple[str, ...]
    layers: tuple[LayerDescription, ...]


def describe(path: str | Path) -> Description:
    """Reads a mixture's folder or a PEFT LoRA adapter's. Raises CheckpointError on anything else."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{path} is no folder; give one written by mixture.save, or a PEFT adapter")
    if (folder / _ADAPTER_CONFIG).is_file() and not (folder / CONFIG_FILE).is_file():
        try:
            return _describe_adapter(folder)
        except CheckpointError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder / _ADAPTER_CONFIG} has a value of a wrong kind: {error}") from error
    record = read_record(folder)
    headers, _ = read_headers(folder / TENSOR_FILE)
    return _describe_mixture(record, headers)


def _describe_mixture(record: MixtureRecord, headers: Mapping[str, Header]) -> Description:
    config, layers = record.config, record.layers
    counts = [layer.num_experts for layer in layers.values()]
    return Description(
        kind="mixture",
        method=config.method,
        base=record.base.name_or_path,
        base_class=record.base.class_name,
        router=routers.name_of(type(config.router)),
        num_layers=len(layers),
        num_experts=(min(counts), max(counts)),
        rank=config.rank,
        alpha=config.alpha,
        targets=config.targets + config.plain_targets,
        also_trained=record.also_trained,
        num_parameters=record.num_parameters["stored"],
        num_bytes=sum(header.num_bytes for header in headers.values()),
        experts=record.experts,
        layers=tuple(_describe_layer(name, layer, record, headers) for name, layer in layers.items()),
    )


def _describe_layer(
    name: str, layer: LayerRecord, record: MixtureRecord, headers: Mapping[str, Header]
) -> LayerDescription:
    own = (f"{name}.experts.", f"{name}.router.")
    return LayerDescription(
        name=name,
        in_features=layer.in_features,
        out_features=layer.out_features,
        num_experts=layer.num_experts,
        rank=_compact(record.ranks(layer)),
        num_bytes=sum(header.num_bytes for tensor, header in headers.items() if tensor.startswith(own)),
    )


def _describe_adapter(folder: Path) -> Description:
    config = read_json(folder / _ADAPTER_CONFIG)
    kind = str(config.get("peft_type"))
    if kind in _IMPORTED:
        raise CheckpointError(f"{folder} is {_IMPORTED[kind]} makes it a mixture; save that, and inspect it")
    if kind != "LORA":
        raise CheckpointError(f"{folder} is a PEFT adapter of type {kind!r}; only LORA is known here")
    headers = _adapter_headers(folder)
    layers = tuple(_describe_pair(name, headers) for name in headers if name.endswith(".lora_A.weight"))
    if not layers:
        raise CheckpointError(f"{folder / _ADAPTER_TENSORS} holds no lora_A of a linear: it adds nothing")
    ranks = tuple(sorted({layer.rank for layer in layers if isinstance(layer.rank, int)}))
    targets = config.get("target_modules") or ()
    return Description(
        kind="peft",
        method="dora" if config.get("use_dora") else "lora",
        base=config.get("base_model_name_or_path") or "",
        base_class=(config.get("auto_mapping") or {}).get("base_model_class", ""),
        router="",
        num_layers=len(layers),
        num_experts=(1, 1),
        rank=_compact(ranks),
        alpha=_alphas(config),
        targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        also_trained=tuple(config.get("modules_to_save") or ()),
        num_parameters=sum(header.num_values for header in headers.values()),
        num_bytes=sum(header.num_bytes for header in headers.values()),
        experts=(folder.resolve().name,),
        layers=layers,
    )


def _adapter_headers(folder: Path) -> dict[str, Header]:
    if not (folder / _ADAPTER_TENSORS).is_file() and (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{folder} holds adapter_model.bin, which can run code when read; save it as safetensors first"
        )
    return read_headers(folder / _ADAPTER_TENSORS)[0]


def _describe_pair(name: str, headers: Mapping[str, Header]) -> LayerDescription:
    """One linear of an adapter, from lora_A (R, D) and lora_B (O, R)."""
    other = name.removesuffix("lora_A.weight") + "lora_B.weight"
    if other not in headers:
        raise CheckpointError(f"the adapter has {name} without {other}")
    A, B = headers[name], headers[other]
    return LayerDescription(
        name=name.removesuffix(".lora_A.weight").removeprefix("base_model.model."),
        in_features=prod(A.shape[1:]),
        out_features=B.shape[0],
        num_experts=1,
        rank=A.shape[0],
        num_bytes=A.num_bytes + B.num_bytes,
    )


def _alphas(config: Mapping[str, Any]) -> float | tuple[float, ...]:
    pattern = config.get("alpha_pattern") or {}
    return _compact(tuple(sorted({float(config.get("lora_alpha", 0)), *map(float, pattern.values())})))


def _compact(values: tuple[Any, ...]) -> Any:
    return values[0] if len(set(values)) == 1 else values
