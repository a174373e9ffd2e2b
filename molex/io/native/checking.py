"""The proof that an export is the mixture: transformers loads it, and in float32 it says what the mixture says.

The truth is the mixture in float64. The exported model may be as far from it as 1e-4 of the largest logit, or 100 times
as far as the mixture's own float32 logits: a few tokens, near ties of a router above all, magnify rounding that much.

Weights in 16 bits are rounded once, expert by expert, and no float32 mixture has just those: W + s B A rounded is no
W + s B A. So for a 16-bit export three things are compared: the stock loader finds every tensor of the folder; the
tensors before that rounding, in the same architecture and configuration, give the mixture's logits; and the files
hold exactly these tensors, rounded. What the rounding itself does to the logits is measured, not judged.
"""

import copy
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from molex.checks import listed
from molex.errors import CheckpointError
from molex.io.native.reading import base_config
from molex.io.stream import DTYPES, Entry, read_slots
from molex.mixture import Mixture

TOLERANCE = 1e-4  # of the largest logit, at least of 1
OWN_ERRORS = 100  # times the mixture's own error in float32
_TOKENS = (2, 48)


class Agreement(NamedTuple):
    """The largest error of a logit, over random tokens, in float32 against the mixture in float64: of the tensors
    before they were rounded for the file, of the file's (equal where nothing was rounded), of the mixture itself."""

    difference: float
    after_rounding: float
    own_error: float


def check_export(mixture: Mixture, shards: dict[str, list[Entry]], folder: Path) -> Agreement:
    """Raises CheckpointError where the folder is not the mixture."""
    ids_BS = _random_ids(base_config(mixture).vocab_size)
    truth = _logits(copy_of(mixture.model, torch.float64), ids_BS)
    own_error = _distance(_logits(copy_of(mixture.model, torch.float32), ids_BS), truth)
    exported = _distance(_logits(_load(folder), ids_BS), truth)
    entries = [entry for shard in shards.values() for entry in shard]
    rounded = any(DTYPES[entry.header.dtype].itemsize < 4 for entry in entries)
    difference = exported
    if rounded:
        _check_files(shards, folder)
        difference = _distance(_logits(_load(folder, entries), ids_BS), truth)
    limit = max(TOLERANCE * max(1.0, float(truth.abs().max())), OWN_ERRORS * own_error)
    if not difference < limit:
        raise CheckpointError(
            f"the exported model's logits are {difference:.2g} from the mixture's, more than {limit:.2g}, on random "
            "tokens in float32; nothing was written. Please report the base's architecture and its config.json"
        )
    return Agreement(difference, exported, own_error)


def copy_of(model: torch.nn.Module, dtype: torch.dtype) -> PreTrainedModel:
    """A copy to evaluate on the CPU, so that the user's model keeps its mode, device, dtype and recorded routing."""
    twin: Any = copy.deepcopy(model).to("cpu", dtype).eval()
    # `model.to(bfloat16)` rounds these too, and no checkpoint has them
    twin.model.rotary_emb = type(twin.model.rotary_emb)(twin.config)
    twin.set_attn_implementation("eager")
    return twin


def _load(folder: Path, entries: Iterable[Entry] | None = None) -> PreTrainedModel:
    """The folder as any user loads it, or these tensors in its architecture. Raises CheckpointError where a tensor is
    missing or has no place."""
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    loaded: Any
    if entries is None:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options)
    else:
        tensors = {entry.name: entry.make().to("cpu", torch.float32) for entry in entries}
        config: Any = AutoConfig.from_pretrained(folder)
        model_class = getattr(transformers, config.architectures[0])
        loaded = model_class.from_pretrained(None, config=config, state_dict=tensors, **options)
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise CheckpointError(
                f"loading the export, transformers reports {kind} {listed(sorted(map(str, report[kind])))}"
            )
    return model.eval()


def _check_files(shards: dict[str, list[Entry]], folder: Path) -> None:
    """Raises CheckpointError where a file does not hold the tensors as they were computed."""
    for name, shard in shards.items():
        slots = read_slots(folder / name)
        for entry in shard:
            slot = slots[entry.name]
            if slot.header != entry.header or slot.read() != entry.data():
                raise CheckpointError(f"{name} was not written as computed: {entry.name} differs; is the disk sound?")


def _random_ids(vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, _TOKENS, generator=generator)


def _logits(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=ids_BS, use_cache=False).logits.double()
    del model
    gc.collect()  # models are cycles, and the next one needs the room
    return logits


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())
