"""A base's folder and merged LoRAs into a new folder, tensor by tensor: no model is loaded.

Each tensor is read, changed in float32 where a LoRA belongs to it, cast, and written, so that memory holds one tensor.
What a linear is called in the files is found from its name in the model: prefixes such as "transformer." may be there
or not. The model itself is only built without memory (on the meta device), to tell what is transposed or tied.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from molex.errors import CheckpointError
from molex.experts import LoRA
from molex.io.companions import COMPANION_FILES, copy_files
from molex.io.files import Header, read_json, staged, write_json
from molex.io.shards import INDEX_FILE, WEIGHT_FILES, check_no_weights, num_bytes, split, write_shards
from molex.io.stream import CODES, DTYPES, Entry, Slot, read_slots
from molex.library import Factors
from molex.merging.folding import Sizes, add_to, find_linears, refuse_twins, sizes_of, transposed


@dataclass(frozen=True, kw_only=True)
class Base:
    """A checkpoint on disk. slots: every tensor by its name there. model: its architecture, without weights."""

    folder: Path
    config: Mapping[str, Any]
    slots: Mapping[str, Slot]
    model: PreTrainedModel

    def find(self, name: str) -> str:
        """What a parameter of the model is called in the files. Raises CheckpointError where it is not there."""
        if name in self.slots:
            return name
        found = [own for own in self.slots if name.endswith(f".{own}") or own.endswith(f".{name}")]
        if len(found) != 1:
            near = get_close_matches(name, self.slots, n=1)
            told = f"; the nearest is {near[0]}" if near else ""
            raise CheckpointError(f"{self.folder} holds no {name}: it is tied there, or called otherwise{told}")
        return found[0]

    def check(self, sizes: Sizes, whole: Mapping[str, Tensor]) -> None:
        """Raises TargetError or CheckpointError where linears, or parameters replaced whole, do not fit the files."""
        for layer, module in find_linears(self.model, sizes).items():
            header = self.slots[self.find(f"{layer}.weight")].header
            wanted = tuple(module.weight.shape)  # type: ignore[union-attr]
            if header.shape != wanted or header.dtype not in DTYPES:
                raise CheckpointError(f"{layer} is {header.dtype} {header.shape} in the files, the model has {wanted}")
        refuse_twins(self.model, whole)
        for name, tensor in whole.items():
            header = self.slots[self.find(name)].header
            if header.shape != tuple(tensor.shape) or header.dtype not in DTYPES:
                raise CheckpointError(f"adapters replace {name} by {tuple(tensor.shape)}, here it is {header.shape}")


def open_base(path: str | Path) -> Base:
    """Reads headers and configuration of a folder, or of a hub id. Raises CheckpointError on what cannot be merged."""
    folder = Path(path)
    if not folder.is_dir():
        folder = _download(path)
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise CheckpointError(f"{folder} is quantised; merge into the base that it was made from")
    slots: dict[str, Slot] = {}
    for name in _weight_files(folder):
        slots |= read_slots(folder / name)
    return Base(folder=folder, config=config, slots=slots, model=_skeleton(folder, config))


def write_dense(
    base: Base,
    factors: Factors,
    whole: Mapping[str, Tensor],
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_size: int | str = "5GB",
    texts: Mapping[str, str] | None = None,
    companions: Path | None = None,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> None:
    """Writes the base with merged LoRAs added, whole or not at all.

    whole: parameters to replace, by their names in the model. dtype: of all float tensors, otherwise each keeps its
    own. texts: further files to write beside. companions: a folder whose tokenizer and the like go before the base's.
    Raises as `Base.check` does, and CheckpointError on an `out` that holds
    weights already.
    """
    base.check(sizes_of(factors), whole)
    check_no_weights(out)
    updates = {base.find(f"{layer}.weight"): (lora, _transposed(base, layer)) for layer, lora in factors.items()}
    replaced = {base.find(name): tensor for name, tensor in whole.items()}
    shards = {
        file: [
            entry._replace(make=_Merged(entry, updates.get(entry.name), replaced.get(entry.name), on_tensor))
            for entry in shard
        ]
        for file, shard in plan(base, dtype, shard_size).items()
    }
    with staged(out) as scratch:
        write_shards(shards, scratch)
        for folder in (base.folder, companions):
            if folder is not None:
                copy_files(folder, scratch)
        _write_config(base, scratch, dtype)
        for name, text in (texts or {}).items():
            (scratch / name).write_text(text, encoding="utf-8")


def plan(base: Base, dtype: torch.dtype | None, shard_size: int | str) -> dict[str, list[Entry]]:
    """What each output file holds, in the base's order; nothing is merged yet."""
    entries = []
    for name, slot in base.slots.items():
        code = CODES[dtype] if dtype is not None and slot.header.dtype in DTYPES else slot.header.dtype
        entries.append(Entry(name, Header(slot.header.shape, code), slot.tensor))
    return split(entries, num_bytes(shard_size))


@dataclass(frozen=True)
class _Merged:
    """One tensor's values, made when asked for: the base's, replaced, or with a LoRA added."""

    base: Entry
    update: tuple[LoRA, bool] | None
    replaced: Tensor | None
    tell: Callable[[str], None]

    def __call__(self) -> Tensor:
        self.tell(self.base.name)
        if self.replaced is not None:
            return self.replaced
        tensor = self.base.make()
        if self.update is not None:
            # wide before the cast, so that a narrower dtype rounds once
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            add_to(tensor, *self.update)
        return tensor


def _transposed(base: Base, layer: str) -> bool:
    return transposed(base.model.get_submodule(layer))


def _write_config(base: Base, scratch: Path, dtype: torch.dtype | None) -> None:
    """The base's configuration, with the dtype as written."""
    config = dict(base.config)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(scratch / "config.json", config)


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX_FILE).is_file():
        placed = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise CheckpointError(f"{folder / INDEX_FILE} is damaged: it has no weight_map")
        return sorted(set(placed.values()))
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    raise CheckpointError(f"{folder} has no model.safetensors and no index of shards; give a base saved as safetensors")


def _skeleton(folder: Path, config: Mapping[str, Any]) -> PreTrainedModel:
    name = (config.get("architectures") or [""])[0]
    model_class = getattr(transformers, name, None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise CheckpointError(f"{folder / 'config.json'}: transformers has no model class {name!r}")
    try:
        with torch.device("meta"):
            return model_class(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} makes no {name}: {error}") from error


def _download(path: str | Path) -> Path:
    try:
        return Path(snapshot_download(str(path), allow_patterns=["config.json", *COMPANION_FILES, *WEIGHT_FILES]))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is no folder here, nor does the hub give it ({reason})") from error
