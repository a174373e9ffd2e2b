"""ESFT's folders: which experts, and their weights. Read strictly, written so that deepseek-ai/ESFT's loader finds all.

expert_cfg.json    {"experts": {"<layer>": [ids, the best first]}, "shared_experts": false, "non_expert_modules": false}
*.safetensors      model.layers.<layer>.mlp.experts.<id>.{gate_proj,up_proj,down_proj}.weight   (I, H), (I, H), (H, I)

Names may lack the `model.` in front, as in the first released ones. Every tensor is of a configured expert, and every
configured expert has its three: anything else is refused, since it would otherwise be left out in silence.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from molex.checks import listed
from molex.errors import CheckpointError, TargetError
from molex.esft.layers import ExpertLayer, ExpertWeights
from molex.io.files import check_numbers, read_json, read_tensors, staged, write_json

CONFIG_FILE, TENSOR_FILE = "expert_cfg.json", "model.safetensors"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_PREFIX = "model."
_TENSOR = re.compile(rf"(.+)\.(\d+)\.({'|'.join(PROJECTIONS)})\.weight")
_MORE = {
    "shared_experts": "shared experts, which all tokens pass through",
    "non_expert_modules": "attention, norms and embeddings",
}

Swaps = Mapping[int, Mapping[int, ExpertWeights]]  # layer -> expert -> weights


class Folder(NamedTuple):
    """names: of each layer's experts module, without `model.`."""

    path: Path
    names: Mapping[int, str]
    swaps: Swaps


def read_folder(path: str | Path) -> Folder:
    """Tensors are as they lie on disk, on the CPU. Raises CheckpointError on files that are missing, damaged or of
    another kind, on a tensor too many or too few, and on adapters that change more than routed experts."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give one that ESFT or molex.esft wrote")
    experts = _read_config(folder / CONFIG_FILE)
    names: dict[int, str] = {}
    found: dict[tuple[int, int], dict[str, Tensor]] = {(n, e): {} for n, own in experts.items() for e in own}
    for key, tensor in _read_all(folder).items():
        name, number, expert, projection = _parse(key, folder)
        if (number, expert) not in found:
            raise CheckpointError(f"{folder} holds {key}, which {CONFIG_FILE} does not list")
        if names.setdefault(number, name) != name:
            raise CheckpointError(f"{folder}: layer {number} is named both {names[number]} and {name}")
        found[number, expert][projection] = tensor
    swaps = {
        number: {
            expert: _expert(f"{folder}: expert {expert} of layer {number}", found.pop((number, expert)))
            for expert in own
        }
        for number, own in experts.items()
        if own
    }
    return Folder(folder, names, swaps)


def _read_config(path: Path) -> dict[int, tuple[int, ...]]:
    config = read_json(path)
    for flag, what in _MORE.items():
        value = config.get(flag, False)
        if value is not False:
            raise CheckpointError(
                f"{path} says {flag}: {value!r}. Such an adapter also rewrites {what}: it is no exchange of routed "
                f"experts, and can only be merged. Train with {flag} false"
            )
    experts = config.get("experts")
    if not isinstance(experts, dict) or not all(_is_layer(*item) for item in experts.items()):
        raise CheckpointError(f'{path} is damaged: "experts" is to map layers, "1", to different experts, [12, 40]')
    if not any(experts.values()):
        raise CheckpointError(f"{path} lists no expert: it changes nothing")
    return {int(number): tuple(own) for number, own in experts.items()}


def _is_layer(number: str, experts: Any) -> bool:
    if not re.fullmatch(r"0|[1-9]\d*", number) or not isinstance(experts, list):
        return False
    return all(type(expert) is int and expert >= 0 for expert in experts) and len(set(experts)) == len(experts)


def _read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every file, by its name without `model.`."""
    tensors: dict[str, Tensor] = {}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder} holds no *.safetensors: its experts are missing")
    for path in paths:
        for name, tensor in read_tensors(path).items():
            key = _bare(name)
            if key in tensors:
                raise CheckpointError(f"{folder} holds {key} twice: files of two adapters are mixed")
            tensors[key] = tensor
    return tensors


def _bare(name: str) -> str:
    return name.removeprefix(_PREFIX)


def _parse(key: str, folder: Path) -> tuple[str, int, int, str]:
    """The experts module, its layer, the expert and the matrix that a tensor's name tells."""
    match = _TENSOR.fullmatch(key)
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", f".{match[1]}.") if match else []
    if match is None or len(numbers) != 1:
        raise CheckpointError(
            f"{folder} holds {key}, no matrix of a routed expert; their names are "
            f"layers.<layer>.<...>.<expert>.<matrix>.weight, with {listed([*PROJECTIONS])}"
        )
    return match[1], int(numbers[0]), int(match[2]), match[3]


def _expert(place: str, matrices: Mapping[str, Tensor]) -> ExpertWeights:
    """One expert of its three matrices. Raises CheckpointError where one is missing, misshapen or not finite."""
    missing = [name for name in PROJECTIONS if name not in matrices]
    if missing:
        raise CheckpointError(f"{place} has no {listed(missing)}: damaged")
    gate, up, down = (matrices[name] for name in PROJECTIONS)
    if gate.dim() != 2 or up.shape != gate.shape or down.shape != gate.T.shape:
        raise CheckpointError(
            f"{place} has gate_proj {tuple(gate.shape)}, up_proj {tuple(up.shape)}, down_proj {tuple(down.shape)}; "
            "give (I, H), (I, H), (H, I)"
        )
    if not gate.dtype == up.dtype == down.dtype:
        raise CheckpointError(f"{place} is {gate.dtype}, {up.dtype}, {down.dtype}; give one floating-point type")
    check_numbers(place, gate, up, down)
    return ExpertWeights(torch.cat([gate, up]), down)


def bound(folder: Folder, layers: Mapping[int, ExpertLayer]) -> Swaps:
    """A folder's experts in the dtype of the base that they replace some of. Raises TargetError where it is another
    base, CheckpointError where that dtype cannot hold their values."""
    return {number: _bound(folder, number, layers) for number in folder.swaps}


def _bound(folder: Folder, number: int, layers: Mapping[int, ExpertLayer]) -> dict[int, ExpertWeights]:
    place = f"{folder.path} changes experts of {folder.names[number]}"
    layer = layers.get(number)
    if layer is None or _bare(layer.name) != folder.names[number]:
        raise TargetError(
            f"{place}, not in this model: its experts are in {listed([own.name for own in layers.values()])}"
        )
    here = ExpertWeights(layer.gate_up[0], layer.down[0])
    cast = {}
    for expert, weights in folder.swaps[number].items():
        if expert >= layer.num_experts:
            raise TargetError(f"{place}, among them {expert}; this model has {layer.num_experts}: another base")
        if weights.gate_up.shape != here.gate_up.shape:
            inner, hidden = weights.down.T.shape
            raise TargetError(f"{place} from {hidden} to {inner}; here they are {tuple(here.down.shape)}: another base")
        cast[expert] = ExpertWeights(*(own.to(layer.gate_up.dtype) for own in weights))
        if not all(bool(own.isfinite().all()) for own in cast[expert]):
            raise CheckpointError(f"{place} with values that {layer.gate_up.dtype} cannot hold: load a wider base")
    return cast


def write_folder(path: str | Path, layers: Mapping[int, ExpertLayer], swaps: Swaps) -> None:
    """Raises CheckpointError where the folder holds other tensors already, which would count as this adapter's."""
    folder = Path(path)
    others = [file.name for file in folder.glob("*.safetensors") if file.name != TENSOR_FILE]
    if others:
        raise CheckpointError(
            f"{folder} holds {listed(others)}, which would be read with this adapter: give another folder"
        )
    tensors: dict[str, Tensor] = {}
    for number, own in swaps.items():
        for expert, weights in own.items():
            matrices = (*weights.gate_up.chunk(2), weights.down)
            for projection, matrix in zip(PROJECTIONS, matrices, strict=True):
                # a copy of its own: safetensors refuses shared memory
                tensors[f"{layers[number].name}.{expert}.{projection}.weight"] = matrix.to(
                    "cpu", copy=True
                ).contiguous()
    experts = {str(number): [*own] for number, own in swaps.items()}
    with staged(folder) as scratch:
        save_file(tensors, scratch / TENSOR_FILE, metadata={"format": "pt"})
        write_json(scratch / CONFIG_FILE, {"experts": experts, **dict.fromkeys(_MORE, False)})
