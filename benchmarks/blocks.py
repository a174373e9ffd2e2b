"""Ways of computing a MixLoRA feed-forward block, (block, x (T, D)) -> y (T, D).

base      the frozen block alone
shared    MoE-PEFT's code: the base's gate and up once for all tokens; then, expert by expert, act(gate + Δ) * (up + Δ)
          on its tokens and the base's down projection of these: K times over all tokens
textbook  every chosen expert is a whole block: gate, up and down of its tokens, all K times
and molex's, every base projection once: its widen and narrow through a backend, and "…, block", the backend's operation
for whole blocks.
In the former each expert has parameters of its own, in molex's all have one A and one B.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molex.kernels import Backend, Columns, backends, columns_of
from molex.kernels.block import Block as Whole
from molex.kernels.block import Projection
from molex.routing import Routing

NAMES = ("gate", "up", "down")


@dataclass(frozen=True)
class Routed:
    """A frozen SwiGLU block, and a routing whose weights (T, K) sum to 1."""

    base: Mapping[str, nn.Module]
    weights: Tensor
    expert_ids: Tensor


@dataclass(frozen=True)
class Block(Routed):
    """The factors of all experts together for each of NAMES: A (C, ·) and B (·, C)."""

    rank: int
    A: Mapping[str, Tensor]
    B: Mapping[str, Tensor]
    expert_of_column: Tensor

    @property
    def num_experts(self) -> int:
        return len(self.A["gate"]) // self.rank

    def columns(self, name: str, dtype: torch.dtype) -> Columns:
        return Columns(self.A[name], self.B[name], (self.rank,) * self.num_experts, self.expert_of_column).to(dtype)

    def routing(self) -> Routing:
        return Routing(self.expert_ids, self.weights, None, self.num_experts, normalised=True)


@dataclass(frozen=True)
class Apart(Routed):
    """The factors of each expert for each of NAMES: A_e (R, ·) and B_e (·, R)."""

    A: Mapping[str, Sequence[Tensor]]
    B: Mapping[str, Sequence[Tensor]]

    @property
    def num_experts(self) -> int:
        return len(self.A["gate"])

    def delta(self, name: str, expert_id: int, x: Tensor) -> Tensor:
        """What one expert adds to one projection."""
        return F.linear(F.linear(x, self.A[name][expert_id].to(x.dtype)), self.B[name][expert_id].to(x.dtype))


Method = Callable[[Any, Tensor], Tensor]  # of an Apart in THEIRS, of a Block in OURS


def base_alone(block: Routed, x: Tensor) -> Tensor:
    return block.base["down"](F.silu(block.base["gate"](x)) * block.base["up"](x))


def textbook(block: Apart, x: Tensor) -> Tensor:
    return _expert_by_expert(block, x, lambda name, tokens_N: block.base[name](x[tokens_N]))


def shared(block: Apart, x: Tensor) -> Tensor:
    of_all = {name: block.base[name](x) for name in ("gate", "up")}
    return _expert_by_expert(block, x, lambda name, tokens_N: of_all[name][tokens_N])


def _expert_by_expert(block: Apart, x: Tensor, base_of: Callable[[str, Tensor], Tensor]) -> Tensor:
    y_TD = torch.zeros_like(x)
    for expert_id in range(block.num_experts):
        tokens_N, slots_N = torch.where(block.expert_ids == expert_id)
        own_ND = x[tokens_N]
        gate_NI, up_NI = (base_of(name, tokens_N) + block.delta(name, expert_id, own_ND) for name in ("gate", "up"))
        inner_NI = F.silu(gate_NI) * up_NI
        out_ND = block.base["down"](inner_NI) + block.delta("down", expert_id, inner_NI)
        y_TD.index_add_(0, tokens_N, out_ND * block.weights[tokens_N, slots_N, None].to(out_ND.dtype))
    return y_TD


class Ours(NamedTuple):
    method: Method
    supports: Callable[[Block, Tensor], str | None]  # the reason why it cannot run this block here


def _supports(kernel: Backend) -> Callable[[Block, Tensor], str | None]:
    def supports(block: Block, x: Tensor) -> str | None:
        return kernel.supports(x, block.columns("gate", x.dtype), block.routing(), block.base["gate"])

    return supports


def through(backend: str) -> Ours:
    kernel = backends[backend]()

    def method(block: Block, x: Tensor) -> Tensor:
        routing, (gate, up, down) = block.routing(), (block.columns(name, x.dtype) for name in NAMES)
        everyone = routing._replace(weights=torch.ones_like(routing.weights))
        gate_KTI = kernel.widen(x, block.base["gate"], gate, everyone)
        up_KTI = kernel.widen(x, block.base["up"], up, everyone)
        return kernel.narrow(F.silu(gate_KTI) * up_KTI, block.base["down"], down, routing, routing.weights)

    return Ours(method, _supports(kernel))


def as_one(backend: str) -> Ours:
    kernel = backends[backend]()

    def method(block: Block, x: Tensor) -> Tensor:
        routing = block.routing()
        everyone = routing._replace(weights=torch.ones_like(routing.weights))
        gate, up, down = (
            Projection(block.base[name], block.columns(name, x.dtype), routing if name == "down" else everyone)
            for name in NAMES
        )
        return kernel.ffn(x, Whole(gate, up, down, "silu", routing))

    return Ours(method, _supports(kernel))


THEIRS: dict[str, Method] = {"shared": shared, "textbook": textbook}
OURS: dict[str, Ours] = {
    "dense": through("dense"),
    "preload": through("preload"),
    "triton": through("triton"),
    "dense, block": as_one("dense"),
    "preload, block": as_one("preload"),
    "triton, block": as_one("triton"),
}


def contestants(block: Block, x: Tensor) -> dict[str, Method]:
    """All that can run here; of every other the reason is printed."""
    found = {"base": base_alone, **THEIRS}
    for name, ours in OURS.items():
        reason = ours.supports(block, x)
        if reason is None:
            found[name] = ours.method
        else:
            print(f"without {name}: {reason}", flush=True)
    return found


def owners(num_experts: int, rank: int) -> Tensor:
    """expert_of_column (C,)."""
    return columns_of((rank,) * num_experts)
