"""mixture.save: molex_config.json, molex.safetensors and a model card, whole or not at all.

The tensors' file carries a digest of the configuration, so that two files of different saves are never read together.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from molex.checks import listed
from molex.errors import CheckpointError, StateError
from molex.io.card import write_card
from molex.io.files import read_json, staged, write_json
from molex.io.record import CONFIG_FILE, TENSOR_FILE, digest, record_of
from molex.mixture import Mixture


def save(
    mixture: Mixture,
    directory: str | Path,
    state_dict: Mapping[str, Tensor] | None = None,
    is_main_process: bool = True,
) -> None:
    """Writes the mixture into a folder. A crash while writing leaves what was there as it was; one between the last
    renamings is noticed when loading.

    state_dict: the model's gathered tensors under its own names, where a trainer has them. is_main_process: whether
    this process writes; where the model is sharded (ZeRO-3, FSDP2) every process must call. Raises StateError where
    tensors are missing or empty.
    """
    tensors = gather(mixture, state_dict)
    if not is_main_process:
        return
    with staged(Path(directory)) as scratch:
        write_mixture(mixture, tensors, scratch, Path(directory), included=holds_base(Path(directory)))


def write_mixture(
    mixture: Mixture, tensors: Mapping[str, Tensor], scratch: Path, directory: Path, included: bool = False
) -> None:
    """Writes the three files into `scratch`, on their way to `directory`; included: the base is written there too."""
    record = record_of(mixture, included)
    document = record.to_dict()
    # one metadata key: the format keeps several in no fixed order, and equal mixtures shall be equal files
    save_file(dict(tensors), scratch / TENSOR_FILE, metadata={"molex": digest(document)})
    write_json(scratch / CONFIG_FILE, document)
    write_card(record, scratch, directory)


def holds_base(directory: Path) -> bool:
    """Whether an earlier `model.save_pretrained` put the base there."""
    try:
        earlier = read_json(directory / CONFIG_FILE).get("base")
    except CheckpointError:  # nothing there, or nothing that can be read
        return False
    return isinstance(earlier, dict) and earlier.get("included") is True and (directory / "config.json").is_file()


def gather(mixture: Mixture, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The mixture's tensors, whole, contiguous, each with memory of its own, on the CPU."""
    named = mixture.state_dict()
    if state_dict is not None:
        absent = [name for name in named if name not in state_dict]
        if absent:
            raise StateError(f"the state_dict to save lacks the mixture's {listed(absent)}")
        named = {name: state_dict[name] for name in named}
    empty = [name for name, tensor in named.items() if tensor.numel() == 0 or tensor.is_meta]
    if empty:
        raise StateError(f"{listed(empty)} hold no values here (sharded or on the meta device); pass state_dict=")
    return _unshared({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()})


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors as copies: safetensors refuses shared memory."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return tensors
