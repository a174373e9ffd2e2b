"""A mixture's decoder layers as native experts, and a checkpoint as a list of tensors that do not exist yet.

Names, shapes and dtypes are known before any expert is computed, so sizes are told first, and writing needs memory
for one tensor only.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molex.io.stream import Entry
from molex.layer import MixtureLinear

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Block:
    """One decoder layer. `router` (E, D) has the temperature folded in; None where there is nothing to choose.
    slots: which of the layer's experts stands in each of the exported model's places."""

    name: str
    module: nn.Module
    router: Tensor | None
    slots: tuple[int, ...]

    def linear(self, projection: str) -> nn.Module:
        return self.module.get_submodule(f"mlp.{projection}")

    def dense(self, projection: str, expert_id: int) -> Tensor:
        """One expert's weight (O, D), in float32 or wider."""
        return dense_weight(self.linear(projection), expert_id)

    def shape(self, projection: str) -> tuple[int, int]:
        weight = self.linear(projection).weight
        assert isinstance(weight, Tensor)
        return weight.shape[0], weight.shape[1]

    def dtype(self) -> torch.dtype:
        weight = self.linear("down_proj").weight
        assert isinstance(weight, Tensor)
        return weight.dtype

    def gate_entry(self, name: str) -> Entry:
        """The router's tensor, (E, D) in its own precision, so that no token's choice is rounded away in the file."""
        width = self.shape("up_proj")[1]
        if self.router is None:
            return Entry.of(name, (len(self.slots), width), torch.float32, lambda: torch.zeros(len(self.slots), width))
        router, places = self.router, torch.tensor(self.slots)
        return Entry.of(name, (len(self.slots), width), router.dtype, lambda: router[places.to(router.device)])

    def expert_entries(self, prefix: str, names: tuple[str, str, str] = PROJECTIONS) -> Iterator[Entry]:
        """Every place's gate, up and down projection: prefix.place.name.weight."""
        for place, expert_id in enumerate(self.slots):
            for projection, name in zip(PROJECTIONS, names, strict=True):
                yield self.dense_entry(f"{prefix}.{place}.{name}.weight", projection, expert_id)

    def dense_entry(self, name: str, projection: str, expert_id: int = 0) -> Entry:
        return Entry.of(name, self.shape(projection), self.dtype(), lambda: self.dense(projection, expert_id))


@dataclass(frozen=True)
class Experts:
    """A mixture read for export: its decoder layers, and the experts and choices each has in the exported model."""

    blocks: tuple[Block, ...]
    num_experts: int
    top_k: int

    @property
    def dense_layers(self) -> list[int]:
        """Numbers of the layers with nothing to choose: not converted, or with one expert."""
        return [number for number, block in enumerate(self.blocks) if block.router is None]


@torch.no_grad()
def dense_weight(linear: nn.Module, expert_id: int = 0) -> Tensor:
    """The weight (O, D) of a linear, with one expert added where it has experts."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if not isinstance(linear, MixtureLinear):
        return weight
    return linear.experts.weight(0 if linear.plain else expert_id, weight)
