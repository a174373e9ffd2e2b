"""One linear with its experts as a benchmark has it: tensors on one device, and who serves whom.

Routing patterns: `uniform`; `zipf`, expert e as popular as 1 / e; `hot`, one expert serves every token; `empty`, one
serves none; `one_set`, all tokens have the same experts.
"""

from collections.abc import Callable
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
class Layer:
    """x (T, D), W (O, D), A (C, D), B (O, C), the gates' weights and ids (T, K), and the gradient of y (T, O)."""

    rank: int
    x: Tensor
    base: nn.Module
    A: Tensor
    B: Tensor
    weights: Tensor
    expert_ids: Tensor
    grad: Tensor | None = None

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
        return Layer(rank, x, base, A, B, weights, ids, normal(num_tokens, num_out))

    def double(self) -> "Layer":
        """The same numbers in float64."""
        assert isinstance(self.base, nn.Linear)
        assert self.grad is not None
        base = nn.Linear(*self.base.weight.T.shape, bias=False, device="meta")
        base.weight = nn.Parameter(self.base.weight.double(), requires_grad=False)
        x, A, B, weights = (leaf.detach().double().requires_grad_() for leaf in self.leaves())
        return Layer(self.rank, x, base, A, B, weights, self.expert_ids, self.grad.double())

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

    def routing(self) -> Routing:
        return Routing(self.expert_ids, self.weights, None, self.num_experts, normalised=True)

    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.A, self.B, self.weights

    def num_bytes(self) -> int:
        """Of its tensors and its output."""
        tensors = [*self.leaves(), self.expert_ids, *self.base.parameters()]
        return sum(tensor.nbytes for tensor in tensors) + (0 if self.grad is None else self.grad.nbytes)


def choose(pattern: str, num_tokens: int, num_experts: int, top_k: int, random: torch.Generator) -> Tensor:
    """Expert ids (T, K), drawn without replacement by popularity (Gumbel's trick)."""
    numbers_E = torch.arange(1, num_experts + 1, device=random.device, dtype=torch.float32)
    exponential_TE = torch.empty(num_tokens, num_experts, device=random.device).exponential_(generator=random)
    return (PATTERNS[pattern](numbers_E, top_k) - exponential_TE.log()).topk(top_k).indices
