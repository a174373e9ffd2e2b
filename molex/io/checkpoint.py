"""Filling a living mixture from a folder, strictly: every tensor is there, none is left over, shapes agree, nothing is
rounded. All of it is checked before the first number is copied.
"""

from pathlib import Path

import torch
from torch import Tensor

from molex.checks import listed
from molex.distributed import put
from molex.errors import CheckpointError
from molex.experts.shards import ShardBank
from molex.io.files import FLOATS, Header, check_numbers, read_headers, read_json, read_tensors
from molex.io.record import CONFIG_FILE, TENSOR_FILE, LayerRecord, MixtureRecord, check_version, digest, frozen_experts
from molex.layer import MixtureLinear
from molex.mixture import Mixture
from molex.routers.staged import StagedRouter

_BY_RANKS = (".expert_of_column", ".row_of_column")  # buffers that follow from the ranks


def load_into(mixture: Mixture, path: str | Path) -> None:
    """Fills a living mixture with the tensors of a folder saved from one of the same make: resuming, keeping the best.

    Raises CheckpointError, with the mixture as it was, where a tensor is missing, unexpected or of another shape.
    """
    folder = Path(path)
    record = read_record(folder)
    odd = sorted(mixture.layers.keys() ^ record.layers.keys())
    if odd:
        raise CheckpointError(f"{folder} and this mixture have different layers converted: {listed(odd)}")
    for name, layer in mixture.layers.items():
        check_layer(layer, record.layers[name], record)
    fill(mixture, folder)
    set_names_and_stages(mixture, record)


def read_record(folder: Path) -> MixtureRecord:
    """Reads molex_config.json, and checks that the tensors beside it are of the same save."""
    refuse_foreign(folder)
    document = read_json(folder / CONFIG_FILE)
    check_version(document)
    _, metadata = read_headers(folder / TENSOR_FILE)
    if metadata.get("molex") != digest(document):
        raise CheckpointError(
            f"{folder / CONFIG_FILE} and {TENSOR_FILE} are not of one save: one was edited or replaced; save again"
        )
    return MixtureRecord.from_dict(document)


def refuse_foreign(folder: Path) -> None:
    """Raises CheckpointError, saying what it seems to be, on a folder that is no mixture's."""
    if (folder / CONFIG_FILE).is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} is a PEFT adapter, no mixture; mixture.load_expert takes its A and B")
    raise CheckpointError(f"{folder} has no {CONFIG_FILE}: it was not written by mixture.save")


def check_layer(layer: MixtureLinear, saved: LayerRecord, record: MixtureRecord) -> None:
    """Raises CheckpointError unless a layer has the recorded experts, by rank."""
    given = layer.experts.ranks, frozen_experts(layer)
    wanted = record.ranks(saved), saved.frozen
    if given != wanted:
        raise CheckpointError(
            f"{layer.name}: saved with experts of ranks {wanted[0]}, {wanted[1]} of them frozen; "
            f"here they are {given[0]}, {given[1]} of them frozen"
        )


def fill(mixture: Mixture, folder: Path) -> None:
    """Copies every tensor into place, after all of them have been compared with what is there."""
    own = mixture.state_dict()
    headers, _ = read_headers(folder / TENSOR_FILE)
    _check_tensors(own, headers, folder)
    tensors = read_tensors(folder / TENSOR_FILE)
    _check_values(own, tensors)
    _check_indices(mixture, tensors)
    places = mixture.model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        put(places[name], tensor)


def _check_tensors(own: dict[str, Tensor], headers: dict[str, Header], folder: Path) -> None:
    missing, unexpected = sorted(own.keys() - headers.keys()), sorted(headers.keys() - own.keys())
    if missing or unexpected:
        parts = [f"lacks {listed(missing)}"] * bool(missing) + [f"has unexpected {listed(unexpected)}"] * bool(
            unexpected
        )
        raise CheckpointError(f"{folder / TENSOR_FILE} {' and '.join(parts)}")
    for name, tensor in own.items():
        if tuple(tensor.shape) != headers[name].shape:
            raise CheckpointError(
                f"{folder / TENSOR_FILE}: {name} has shape {headers[name].shape}, here it is {tuple(tensor.shape)}"
            )
        if tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device here: give the base its weights before molex.load")


def _check_values(own: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Before anything is copied: nothing may be rounded, and what is one tensor here must be one there."""
    first_at: dict[int, str] = {}
    for name, tensor in tensors.items():
        if own[name].dtype in FLOATS:
            check_numbers(name, tensor)
        elif tensor.dtype != own[name].dtype:
            raise CheckpointError(f"{name} is {tensor.dtype} in the file and {own[name].dtype} in this model: damaged")
        if name.endswith(_BY_RANKS) and not torch.equal(own[name].cpu(), tensor):
            raise CheckpointError(f"{name} is not what the experts' ranks say: damaged")
        if torch.promote_types(tensor.dtype, own[name].dtype) != own[name].dtype:
            raise CheckpointError(
                f"{name} is {tensor.dtype} in the file and {own[name].dtype} in this model, which would round it: "
                "load the base in the wider dtype"
            )
        first = first_at.setdefault(own[name].data_ptr(), name)
        if first != name and not torch.equal(tensors[first], tensor):
            raise CheckpointError(f"{first} and {name} are one tensor in this model, but two in the file")


def _check_indices(mixture: Mixture, tensors: dict[str, Tensor]) -> None:
    """Of shards: what points outside of their pool would end whatever runs the model."""
    for layer, bank in ((name, layer.experts) for name, layer in mixture.layers.items()):
        if isinstance(bank, ShardBank):
            for name in (f"{layer}.experts.index_A", f"{layer}.experts.index_B"):
                if not 0 <= int(tensors[name].min()) <= int(tensors[name].max()) < len(bank.pool.pool_A):
                    raise CheckpointError(f"{name} points outside of its pool: damaged")


def set_names_and_stages(mixture: Mixture, record: MixtureRecord) -> None:
    """Experts' names and LoRA-Mixer's stage: what a mixture remembers besides tensors."""
    mixture.origins = dict(record.origins)
    for name, saved in record.layers.items():
        layer = mixture.layers[name]
        layer.experts.names = list(saved.names or record.experts[: saved.num_experts])
        if isinstance(layer.router, StagedRouter):
            layer.router.stage = saved.stage or record.config.router.stage  # type: ignore[attr-defined, assignment]
