"""mixture.export_native: a mixture of LoRA experts as a native mixture-of-experts checkpoint.

Every expert becomes a whole feed-forward block W + s B A, computed in float32 and then rounded to the base's dtype;
transformers, vLLM and llama.cpp load the result with no trace of molex. It is larger than the base by nearly the number
of experts, which is told before anything is written.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from molex.checks import check_range
from molex.errors import CheckpointError
from molex.io.companions import TOKENIZER_FILES, copy_files
from molex.io.files import staged, write_json
from molex.io.native.blocks import Experts, dense_weight
from molex.io.native.checking import Agreement, check_export
from molex.io.native.family import COPIED, Family, Target, check_target, find_family
from molex.io.native.reading import base_config, read_experts
from molex.io.native.sizes import Forecast, check_space
from molex.io.pretrained import original_names
from molex.io.shards import split, write_shards
from molex.io.stream import Entry
from molex.layer import MixtureLinear
from molex.mixture import Mixture

logger = logging.getLogger("molex")


class Tokenizer(Protocol):
    """What a tokenizer of transformers can do here."""

    def save_pretrained(self, save_directory: str) -> Any: ...


@dataclass(frozen=True)
class NativeExport:
    """What was, or in a dry run would be, written. agreement: None where it was not checked."""

    family: str
    target: Target
    num_experts: int
    top_k: int
    forecast: Forecast
    files: tuple[str, ...] = ()
    agreement: Agreement | None = None


def export_native(
    mixture: Mixture,
    directory: str | Path,
    target: str = "transformers",
    *,
    family: str | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 4_000_000_000,
    dry_run: bool = False,
    check: bool = True,
) -> NativeExport:
    """Writes the mixture as a checkpoint of a native architecture that `target` runs exactly: "transformers", "vllm" or
    "llama.cpp" (convert_hf_to_gguf.py takes the folder).

    family: the architecture, where several would do. tokenizer: written too; by default the base's folder gives its
    files. dry_run: nothing is written, the forecast returned. check: loads the result and compares it with the mixture,
    which takes memory for the whole exported model in float32, twice for one in 16 bits; see molex.io.native.checking.

    Raises ConfigError, TargetError and StateError, with the reason, on what cannot be expressed exactly, and
    CheckpointError where the folder holds a model already, the disk is too small, or the check fails. Then the folder
    is as it was; so it is after an interrupt.
    """
    Mixture.of(mixture.model)  # raises where it was reverted
    check_range("max_shard_bytes", max_shard_bytes, 1)
    chosen_target = check_target(target)
    base = base_config(mixture)
    experts = read_experts(mixture)
    native = find_family(base, chosen_target, family)
    entries = list(_entries(mixture, base, native, experts, chosen_target))
    shards = split(entries, max_shard_bytes)
    dense_bytes = sum(tensor.nbytes for tensor in _base_tensors(mixture).values())
    forecast = Forecast(dense_bytes, sum(entry.header.num_bytes for entry in entries), len(shards))
    report = NativeExport(native.model_type, chosen_target, experts.num_experts, experts.top_k, forecast)
    logger.info("export to %s for %s: %s", native.model_type, target, forecast)
    if dry_run:
        return report
    folder = Path(directory)
    _check_folder(folder)
    check_space(folder, forecast.exported_bytes)
    with staged(folder) as scratch:
        write_shards(shards, scratch)
        _write_config(mixture, base, native, experts, chosen_target, scratch)
        _write_tokenizer(base, tokenizer, scratch)
        agreement = check_export(mixture, shards, scratch) if check else None
        files = tuple(sorted(path.name for path in scratch.iterdir()))
    return replace(report, files=files, agreement=agreement)


def _base_tensors(mixture: Mixture) -> dict[str, Tensor]:
    """The base's tensors under its own names, a tied head only once."""
    named = original_names(mixture, mixture.model.state_dict())
    if _tied(named):
        del named["lm_head.weight"]
    return named


def _tied(named: dict[str, Tensor]) -> bool:
    head, embedding = named.get("lm_head.weight"), named.get("model.embed_tokens.weight")
    return head is not None and embedding is not None and head.data_ptr() == embedding.data_ptr()


def _entries(
    mixture: Mixture, base: PretrainedConfig, family: Family, experts: Experts, target: Target
) -> Iterator[Entry]:
    """The whole checkpoint in the model's order: what is not in a feed-forward block has its own name, and plain LoRAs
    folded in."""
    modules = dict(mixture.model.named_modules())
    waiting = {f"{block.name}.mlp": block for block in experts.blocks}
    for name, tensor in _base_tensors(mixture).items():
        module, _, kind = name.rpartition(".")
        mlp = module.rpartition(".")[0]
        linear = modules.get(module)
        if mlp in waiting:
            yield from family.layer_entries(waiting.pop(mlp), base, target)
        elif mlp.endswith(".mlp"):
            continue
        elif isinstance(linear, MixtureLinear) and kind == "weight":
            yield Entry.of(name, tuple(tensor.shape), tensor.dtype, partial(dense_weight, linear))
        else:
            yield Entry.of(name, tuple(tensor.shape), tensor.dtype, partial(_itself, tensor))


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _write_config(
    mixture: Mixture, base: PretrainedConfig, family: Family, experts: Experts, target: Target, scratch: Path
) -> None:
    """config.json and, where the base has one, generation_config.json."""
    model = mixture.model
    fields = {name: getattr(base, name) for name in COPIED}
    if getattr(base, "head_dim", None) is not None:
        fields["head_dim"] = base.head_dim
    fields |= family.config(base, experts, target)
    config = AutoConfig.for_model(
        family.model_type,
        **fields,
        architectures=[family.architecture],
        dtype=model.dtype,
        tie_word_embeddings=_tied(original_names(mixture, model.state_dict())),
    )
    config.save_pretrained(scratch)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        write_json(scratch / "generation_config.json", json.loads(generation.to_json_string()))


def _write_tokenizer(base: PretrainedConfig, tokenizer: Tokenizer | None, scratch: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(str(scratch))
        return
    source = getattr(base, "_name_or_path", "")
    if not source or not copy_files(Path(source), scratch, TOKENIZER_FILES):
        logger.warning("the base's folder has no tokenizer files; pass tokenizer= to have them beside the weights")


def _check_folder(folder: Path) -> None:
    """Raises CheckpointError on a folder with a model in it: loaders would mix up the two."""
    taken = [*folder.glob("*.safetensors*"), *folder.glob("*config.json")]
    if taken:
        raise CheckpointError(f"{folder} holds {taken[0].name} already; give an empty or a new folder")
