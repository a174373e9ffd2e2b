"""MoS, mixture of shards: a layer's A and B are gathered from pools that all layers share (arXiv 2410.00938).

    A_l = rows pool_A[index_A[l]], c shards joined along D per row;   B_l likewise;   y = base(x) + s · B_l A_l x

There is one A-pool and one B-pool per module type (all q_proj, all down_proj, ...). The "routing" is a frozen random
index, drawn once: subset selection (each layer takes r of the pool's vectors), pair dissociation (A and B are drawn
apart), vector sharding (each vector is c shards), privatisation (some shards belong to one layer alone).
Pools are parameters of one module on the model; layers hold their indices only.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molex.errors import ConfigError
from molex.experts.base import ExpertBank, ExpertsConfig, LayerShape, LoRA, Route, expert_kinds
from molex.kernels import Columns, Form, Planner, columns_of


@expert_kinds.register("shards")
@dataclass(frozen=True, kw_only=True)
class ShardsConfig(ExpertsConfig):
    """pool_rank: trained vectors per layer and side (the budget: an ordinary LoRA of that rank); private_rank: how
    many of them only their own layer sees; shards_per_vector: c, which must divide in- and out-features."""

    pool_rank: int = 2
    private_rank: int = 1
    shards_per_vector: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.private_rank <= self.pool_rank or self.pool_rank < 1 or self.shards_per_vector < 1:
            raise ConfigError(
                f"pool_rank={self.pool_rank}, private_rank={self.private_rank}, "
                f"shards_per_vector={self.shards_per_vector}: need 0 <= private_rank <= pool_rank, the others >= 1"
            )

    def build(self, shape: LayerShape) -> ExpertBank:
        return ShardBank(shape, self)


class ShardPool(nn.Module):
    """The pools of one module type: pool_A (P, D/c), pool_B (P, O/c), P = layers · pool_rank · c.

    The first layers · private_rank · c rows are private, layer by layer. Calling it gathers a layer's factors; it
    is a module so that sharded training gathers its parameters when they are read.
    """

    def __init__(self, config: ShardsConfig, num_layers: int, shape: LayerShape):
        super().__init__()
        c = config.shards_per_vector
        if shape.in_features % c or shape.out_features % c:
            raise ConfigError(
                f"{shape.name} is {shape.in_features} -> {shape.out_features}: shards_per_vector={c} must divide both"
            )
        num_rows = num_layers * config.pool_rank * c
        like = {"device": shape.device, "dtype": shape.dtype}
        self.num_private = num_layers * config.private_rank * c
        self.pool_A = nn.Parameter(torch.empty(num_rows, shape.in_features // c, **like))
        self.pool_B = nn.Parameter(torch.zeros(num_rows, shape.out_features // c, **like))
        bound = 1 / math.sqrt(shape.in_features)
        nn.init.uniform_(self.pool_A, -bound, bound)

    def draw(self, layer: int, rank: int, config: ShardsConfig) -> Tensor:
        """A frozen random index (r·c,) of shards for one side of a layer: public ones, then the layer's own."""
        c = config.shards_per_vector
        num_own = config.private_rank * c
        num_drawn = rank * c - num_own
        num_public = self.pool_A.shape[0] - self.num_private
        if not 0 <= num_drawn <= num_public:
            raise ConfigError(
                f"rank={rank} needs {num_drawn} public shards, the pool has {num_public}: "
                f"choose private_rank <= rank, and pool_rank high enough"
            )
        device = self.pool_A.device
        drawn = self.num_private + torch.randperm(num_public, device=device)[:num_drawn]
        return torch.cat([drawn, layer * num_own + torch.arange(num_own, device=device)])

    def forward(self, index_A: Tensor, index_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """(r·c,) twice -> A (R, D), B (O, R)."""
        return self.pool_A[index_A].view(rank, -1), self.pool_B[index_B].view(rank, -1).T


class ShardBank(ExpertBank):
    """index_A, index_B (R·c,); the factors are in `pool`, which surgery shares between the layers of a type."""

    expert_of_column: Tensor

    def __init__(self, shape: LayerShape, config: ShardsConfig):
        super().__init__(shape)
        if len(shape.ranks) > 1:
            raise ConfigError(f"MoS has one update per layer, got num_experts={len(shape.ranks)}; set rank instead")
        self.config = config
        self.register_buffer("expert_of_column", columns_of(self.ranks).to(shape.device))

    def join_pool(self, pool: ShardPool, layer: int) -> None:
        """Takes this layer's indices from a pool; the pool stays registered on the model, not here."""
        self._pool = (pool,)  # in a tuple: not a submodule of this one
        self.register_buffer("index_A", pool.draw(layer, self.ranks[0], self.config))
        self.register_buffer("index_B", pool.draw(layer, self.ranks[0], self.config))

    @property
    def pool(self) -> ShardPool:
        return self._pool[0]

    def columns(self) -> Columns:
        A_RD, B_OR = self.pool(self.index_A, self.index_B, self.ranks[0])
        return Columns(A_RD, B_OR, self.ranks, self.expert_of_column)

    def forward(self, x: Tensor, base: nn.Module, route: Route, planner: Planner, form: Form = "linear") -> Tensor:
        columns = self.columns().to(x.dtype)
        dropped = self.dropout(x) if self.training and self.dropout.p > 0 else None
        routing = route(None).scaled(self.scale)
        return planner.pick(x, columns, routing, base).linear(x, base, columns, routing, dropped=dropped)

    def expert(self, expert_id: int) -> LoRA:
        self.check_id(expert_id)
        return LoRA(*self.columns().expert(expert_id), float(self.scale[expert_id]))

    def num_parameters(self) -> int:
        return self.ranks[0] * (self.in_features + self.out_features)

    def check_expert(self, expert_id: int, lora: LoRA) -> None:
        self.store(expert_id, lora.A, lora.B)

    def store(self, expert_id: int, A: Tensor, B: Tensor) -> None:
        raise ConfigError("a MoS layer is made of shared shards; a pretrained LoRA cannot be loaded into it")


def share_pools(
    config: ShardsConfig, shapes: Mapping[str, LayerShape], banks: Mapping[str, ShardBank]
) -> nn.ModuleDict:
    """One pool for each module type: the layers whose names end alike and whose shapes agree. Both by layer name."""
    types: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        types.setdefault(f"{name.split('.')[-1]}_{shape.in_features}_{shape.out_features}", []).append(name)
    pools = nn.ModuleDict()
    for kind, members in types.items():
        pool = ShardPool(config, len(members), shapes[members[0]])
        for position, name in enumerate(members):
            banks[name].join_pool(pool, position)
        pools[kind] = pool
    return pools
