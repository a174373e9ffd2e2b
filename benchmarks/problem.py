"""One linear with its experts as a benchmark has it: tensors on one device, and who serves whom.

Experts' parameters lie as the code that is measured keeps them, made before it is: what a forward lays out anew, or a
backward adds up over slices, is the code's own. `Layer` has those of all experts in one A and one B, `Apart` a pair for
each, `Transposed` one array of all for products in batches.

Routing patterns: `uniform`; `zipf`, expert e as popular as 1 / e; `hot`, one expert serves every token; `empty`, one
serves none; `one_set`, all tokens have the same experts.
"""

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from molex.kernels import Columns, columns_of
from molex.routing import Routing

ALWAYS = 100.0  # added to a score, it decides

# (1-based numbers of the experts, K) -> log popularity (E,)
PATTERNS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "uniform": lambda numbers_E, top_k: torch.zeros_like(numbers_E),
    "zipf": lambda numbers_E, top_k: -numbers_E.log(),
    "hot": lambda numbers_E, top_k: ALWAYS * (numbers_E == 1),
    "empty": lambda numbers_E, top_k: -ALWAYS * (numbers_E == 1),
    "one_set": lambda numbers_E, top_k: ALWAYS * (numbers_E <= top_k),
}


@dataclass(frozen=True)
class Routed(ABC):
    """x (T, D), W (O, D), the gates' weights and ids (T, K), and the gradient of y (T, O)."""

    x: Tensor
    base: nn.Module
    weights: Tensor
    expert_ids: Tensor
    grad: Tensor | None

    @property
    @abstractmethod
    def num_experts(self) -> int: ...

    @abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """The experts' parameters."""

    @abstractmethod
    def joined(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The gradients of `factors` as those of A (C, D) and B (O, C)."""

    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, *self.factors(), self.weights

    def routing(self) -> Routing:
        return Routing(self.expert_ids, self.weights, None, self.num_experts, normalised=True)


@dataclass(frozen=True)
class Layer(Routed):
    """A (C, D) and B (O, C)."""

    A: Tensor
    B: Tensor
    rank: int

    @staticmethod
    def draw(
        shape: tuple[int, int, int],
        experts: tuple[int, int, int],
        device: str,
        dtype: torch.dtype,
        pattern: str = "uniform",
        seed: int = 0,
    ) -> "Layer":
        """shape (T, D, O), experts (E, R, K)."""
        (num_tokens, num_in, num_out), (num_experts, rank, top_k) = shape, experts
        random = torch.Generator(device).manual_seed(seed)

        def normal(*sizes: int, deviation: float = 1.0) -> Tensor:
            return torch.randn(*sizes, generator=random, device=device).mul_(deviation).to(dtype)

        base = nn.Linear(num_in, num_out, bias=False, device=device, dtype=dtype).requires_grad_(False)
        base.weight.copy_(normal(num_out, num_in, deviation=num_in**-0.5))
        shares = 0.1 + torch.rand(num_tokens, top_k, generator=random, device=device)
        leaves = (
            normal(num_tokens, num_in),
            normal(num_experts * rank, num_in, deviation=num_in**-0.5),
            normal(num_out, num_experts * rank, deviation=rank**-0.5),
            shares / shares.sum(-1, keepdim=True),
        )
        x, A, B, weights = (leaf.requires_grad_() for leaf in leaves)
        ids = choose(pattern, num_tokens, num_experts, top_k, random)
        return Layer(x, base, weights, ids, normal(num_tokens, num_out), A, B, rank)

    def double(self) -> "Layer":
        """The same numbers in float64."""
        assert isinstance(self.base, nn.Linear)
        assert self.grad is not None
        base = nn.Linear(*self.base.weight.T.shape, bias=False, device="meta")
        base.weight = nn.Parameter(self.base.weight.double(), requires_grad=False)
        x, A, B, weights = (leaf.detach().double().requires_grad_() for leaf in self.leaves())
        return Layer(x, base, weights, self.expert_ids, self.grad.double(), A, B, self.rank)

    def first(self, num_ranks: int) -> "Layer":
        """One LoRA of the first ranks, with parameters of its own."""
        A, B = _leaf(self.A[:num_ranks]), _leaf(self.B[:, :num_ranks])
        return Layer(self.x, self.base, self.weights, self.expert_ids, self.grad, A, B, num_ranks)

    @property
    def num_experts(self) -> int:
        return len(self.A) // self.rank

    @cached_property
    def expert_of_column(self) -> Tensor:
        """A bank of experts has it as a buffer, so making it is not timed."""
        return columns_of((self.rank,) * self.num_experts).to(self.x.device)

    def columns(self) -> Columns:
        return Columns(self.A, self.B, (self.rank,) * self.num_experts, self.expert_of_column)

    def expert(self, expert_id: int) -> tuple[Tensor, Tensor]:
        """(R, D) and (O, R)."""
        own = slice(expert_id * self.rank, (expert_id + 1) * self.rank)
        return self.A[own], self.B[:, own]

    def factors(self) -> tuple[Tensor, ...]:
        return self.A, self.B

    def joined(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return grads[0], grads[1]

    def num_bytes(self) -> int:
        """Of its tensors and its output."""
        tensors = [*self.leaves(), self.expert_ids, *self.base.parameters()]
        return sum(tensor.nbytes for tensor in tensors) + (0 if self.grad is None else self.grad.nbytes)


@dataclass(frozen=True)
class Apart(Routed):
    """A_e (R, D) and B_e (O, R), each a parameter, as codes have them whose experts are modules."""

    A: Sequence[Tensor]
    B: Sequence[Tensor]

    @staticmethod
    def of(layer: Layer) -> "Apart":
        A, B = split(layer.A, layer.B, layer.rank)
        return Apart(layer.x, layer.base, layer.weights, layer.expert_ids, layer.grad, A, B)

    @property
    def num_experts(self) -> int:
        return len(self.A)

    def expert(self, expert_id: int) -> tuple[Tensor, Tensor]:
        return self.A[expert_id], self.B[expert_id]

    def factors(self) -> tuple[Tensor, ...]:
        return *self.A, *self.B

    def joined(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return torch.cat([*grads[: self.num_experts]]), torch.cat([*grads[self.num_experts :]], 1)


@dataclass(frozen=True)
class Transposed(Routed):
    """A (E, D, R), a view, and B (E, R, O), contiguous: what MeteoRA's code prepares before its first forward."""

    A: Tensor
    B: Tensor

    @staticmethod
    def of(layer: Layer) -> "Transposed":
        A, B = (factor.detach().requires_grad_() for factor in transposed(layer.A, layer.B, layer.rank))
        return Transposed(layer.x, layer.base, layer.weights, layer.expert_ids, layer.grad, A, B)

    @property
    def num_experts(self) -> int:
        return len(self.A)

    def factors(self) -> tuple[Tensor, ...]:
        return self.A, self.B

    def joined(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return grads[0].transpose(1, 2).flatten(0, 1), grads[1].permute(2, 0, 1).flatten(1)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_()


def split(A: Tensor, B: Tensor, rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves with the numbers of A (C, ·) and B (·, C): of each expert A_e (R, ·) and B_e (·, R)."""
    return [_leaf(own) for own in A.split(rank)], [_leaf(own) for own in B.split(rank, 1)]


def transposed(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (E, D, R) and B (E, R, O) as `Transposed` has them."""
    A_EDR = A.unflatten(0, (-1, rank)).transpose(1, 2)
    return A_EDR, B.unflatten(1, (-1, rank)).permute(1, 2, 0).contiguous()


def side_by_side(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by name, of experts with parameters of their own, `A.0`, `A.1`, as one `A`, as others have it."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, grad in named.items():
        parts[re.sub(r"\.\d+$", "", name)].append(grad)
    return {name: torch.cat(own, 1 if re.search(r"(\b|_)B\b", name) else 0) for name, own in parts.items()}


def choose(pattern: str, num_tokens: int, num_experts: int, top_k: int, random: torch.Generator) -> Tensor:
    """Expert ids (T, K), drawn without replacement by popularity (Gumbel's trick)."""
    numbers_E = torch.arange(1, num_experts + 1, device=random.device, dtype=torch.float32)
    exponential_TE = torch.empty(num_tokens, num_experts, device=random.device).exponential_(generator=random)
    return (PATTERNS[pattern](numbers_E, top_k) - exponential_TE.log()).topk(top_k).indices
