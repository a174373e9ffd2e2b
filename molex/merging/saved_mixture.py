"""A saved mixture into a dense checkpoint or one adapter: experts are read, the base streams, no model is loaded.

memory = the experts + one tensor of the base
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from molex.io.checkpoint import read_record
from molex.io.exporting import trained_whole
from molex.io.loading import base_of, find_folder, load_experts
from molex.merging.adapters import Output, write_merged
from molex.merging.base import MergeRule
from molex.merging.checkpoint import Base, open_base
from molex.merging.merged import Merged
from molex.merging.of_mixture import merge_experts
from molex.merging.weights import Weights
from molex.mixture import Mixture


@dataclass(frozen=True)
class SavedMixture:
    """folder: of the mixture. base_name: of its base, a folder or hub id. mixture: its experts over `base.model`, which
    has no memory and cannot run."""

    folder: Path
    base_name: str
    base: Base
    mixture: Mixture


def open_mixture(path: str | Path) -> SavedMixture:
    """A folder or hub id. Raises CheckpointError where it, or the base it names, cannot be read."""
    folder = find_folder(path)
    record = read_record(folder)
    name = base_of(record, folder)
    base = open_base(name)
    dtype: Any = getattr(torch, record.base.dtype, torch.float32)
    base.model.to(dtype)  # experts of a float64 base are float64
    return SavedMixture(folder, name, base, load_experts(base.model, folder))


def merge_saved(
    saved: SavedMixture,
    rule: str | MergeRule | None,
    weights: Weights | None,
    out: Path,
    output: Output,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> Merged:
    """Merges experts and streams the result into the folder `out`; returns what the merge was.

    Raises ConfigError as `merge_mixture`, and as `molex.merge` does about files; the folder is then as it was.
    """
    merged = merge_experts(saved.mixture, rule, weights, rank=rank, energy=energy, on_layer=output.on_layer)
    whole = trained_whole(saved.mixture)
    saved.mixture.revert()  # the skeleton is compared with the files under its own names
    write_merged(saved.base, saved.base_name, merged, whole, out, output, companions=saved.folder)
    return merged
