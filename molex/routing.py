"""Routing: the only thing that travels from a router to the experts; what a router may know; what a forward records.

Every method of the field is the one equation

    y = base(x) + B ( G(x) * (A x) )        A (C, D)   B (O, C)   G (T, C)

and differs in G. A router does not build G itself: it names experts and weights, which is the same for
blocks of columns (LoRA experts) and for single columns (rank-1 experts).

Shapes, as suffixes of local names throughout molex:
    T tokens (B sequences x S positions)   D in-features   O out-features   E experts   R ranks of one expert
    C columns = ranks of all experts       K experts per token              L layers
Parameters and fields carry no suffix, because they become checkpoint keys.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from molex.errors import StateError


class Routing(NamedTuple):
    """Which experts serve each token, and how strongly.

    A NamedTuple because DeepSpeed's ZeRO-3 finds the tensors of a module's result only in tuples, lists and dicts.
    """

    expert_ids: Tensor  # (T, K) int64; -1 is nobody
    weights: Tensor  # (T, K) float32 or wider, differentiable; 0 where nobody
    logits: Tensor | None  # (T, E), what losses read; None where nothing was scored
    num_experts: int
    normalised: bool = False  # the router's weights sum to 1 for every token, and nobody is chosen nowhere
    dense: bool = False  # slot k is expert k for every token: the weights are the gates

    @property
    def base_streams(self) -> int:
        """How many streams of a feed-forward block are the base's own: none where weights leave it no share."""
        return 0 if self.normalised else 1

    def gates(self) -> Tensor:
        """The same decision as a dense (T, E) matrix; zero where an expert was not chosen."""
        if self.dense:
            return self.weights
        num_tokens = self.expert_ids.shape[0]
        if self.normalised:
            return self.weights.new_zeros(num_tokens, self.num_experts).scatter_add_(1, self.expert_ids, self.weights)
        slots_TK = self.expert_ids % (self.num_experts + 1)  # nobody has the last
        gates = self.weights.new_zeros(num_tokens, self.num_experts + 1)
        return gates.scatter_add_(1, slots_TK, self.weights)[:, : self.num_experts]

    def scaled(self, scale: Tensor) -> "Routing":
        """Folds the experts' scales (E,) into the weights."""
        scale_E = scale.to(self.weights.dtype)
        # nobody, -1, has the last expert's: 0 times it is 0
        return self._replace(weights=self.weights * (scale_E if self.dense else scale_E[self.expert_ids]))

    def to(self, device: torch.device) -> "Routing":
        """The same on another device, with gradient."""
        logits_TE = None if self.logits is None else self.logits.to(device)
        return self._replace(expert_ids=self.expert_ids.to(device), weights=self.weights.to(device), logits=logits_TE)

    def check(self) -> None:
        """States the invariants; raises AssertionError. Tests call it for every router."""
        ids_TK, weights_TK = self.expert_ids, self.weights
        assert ids_TK.dtype == torch.int64, f"expert_ids are {ids_TK.dtype}, not int64"
        assert ids_TK.dim() == 2, f"expert_ids are {tuple(ids_TK.shape)}, not (T, K)"
        assert ids_TK.shape == weights_TK.shape, "expert_ids and weights differ in shape"
        assert weights_TK.dtype in (torch.float32, torch.float64), f"weights are {weights_TK.dtype}"
        assert bool(((ids_TK >= -1) & (ids_TK < self.num_experts)).all()), "an expert id is out of range"
        assert bool(weights_TK.isfinite().all()), "a weight is not finite"
        assert bool((weights_TK[ids_TK < 0] == 0).all()), "nobody has a weight"
        if self.normalised:
            assert bool((ids_TK >= 0).all()), "nobody is chosen, and the weights are called normalised"
            sums_T = weights_TK.sum(1)
            assert bool(((sums_T - 1).abs() < 1e-5).all()), "normalised weights do not sum to 1"
        if self.dense:
            assert bool((ids_TK == torch.arange(self.num_experts, device=ids_TK.device)).all()), "slots are not experts"
        picks_TE = torch.zeros(ids_TK.shape[0], self.num_experts + 1, device=ids_TK.device)
        picks_TE.scatter_add_(1, ids_TK % (self.num_experts + 1), torch.ones_like(ids_TK, dtype=torch.float32))
        assert bool((picks_TE[:, : self.num_experts] <= 1).all()), "an expert is chosen twice for one token"
        if self.logits is not None:
            assert self.logits.shape == (ids_TK.shape[0], self.num_experts), "logits are not (T, E)"


class SoftmaxTopK(NamedTuple):
    """l = W x;  the k largest, at their softmax over themselves (renormalised) or over all."""

    weight: Tensor  # (E, D)
    top_k: int
    renormalise: bool

    def decide(self, x: Tensor, hidden: Tensor) -> Routing:
        """For x (T, D), in plain torch: what a kernel must do."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits_TE = x.to(wide) @ self.weight.to(wide).T
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(self.top_k, dim=-1)
        if self.renormalise:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return Routing(ids_TK, weights_TK, logits_TE, len(self.weight), self.renormalise)


class SelfTopK(NamedTuple):
    """Of rank-1 experts: the k largest of A x + bias, or of its magnitude, at weight 1."""

    bias: Tensor  # (E,) float32
    top_k: int
    signed: bool

    def decide(self, x: Tensor, hidden: Tensor) -> Routing:
        """For hidden (T, E), A x: what a kernel must do."""
        scores_TE = hidden.to(torch.promote_types(hidden.dtype, torch.float32)) + self.bias
        scores_TE = scores_TE if self.signed else scores_TE.abs()
        ids_TK = scores_TE.topk(self.top_k, dim=-1).indices
        return Routing(ids_TK, torch.ones_like(ids_TK, dtype=scores_TE.dtype), scores_TE, len(self.bias))


Rule = SoftmaxTopK | SelfTopK  # how a kernel can route in evaluation


@dataclass(frozen=True)
class RouteContext:
    """What a router or a loss may know besides the tokens themselves. All per-token fields are flat, (T,)."""

    shape: tuple[int, int]  # B, S
    token_mask: Tensor | None = None  # bool, True = a real token; None = all are
    task_ids: Tensor | None = None  # int64
    segment_ids: Tensor | None = None  # int64, counts sequences through a packed batch
    request_ids: Tensor | None = None  # int64, the expert asked for by name; -1 = the base alone
    layer: str = ""
    training: bool = False
    activations: Tensor | None = None  # (T, C) = A x, only for routers that route on it

    def sequence_of_token(self, device: torch.device) -> Tensor:
        """(T,): which sequence each token belongs to, a packed row holding several."""
        if self.segment_ids is not None:
            return self.segment_ids
        return torch.arange(self.shape[0], device=device).repeat_interleave(self.shape[1])


class Decision(NamedTuple):
    """One layer's routing and what it was made from."""

    routing: Routing
    context: RouteContext

    def mask(self) -> Tensor:
        """(T,) float, 1 for real tokens."""
        mask_T = self.context.token_mask
        weights_TK = self.routing.weights
        return weights_TK.new_ones(weights_TK.shape[0]) if mask_T is None else mask_T.to(weights_TK.dtype)

    def scored(self) -> Tensor:
        """The logits (T, E). Raises StateError where the router scored nothing."""
        if self.routing.logits is None:
            raise StateError(f"{self.context.layer}: this loss reads router logits, and this router has none")
        return self.routing.logits

    def to(self, device: torch.device) -> "Decision":
        """The same on another device, with gradient."""
        names = ("token_mask", "task_ids", "segment_ids", "request_ids")
        moved = {n: field.to(device) for n in names if (field := getattr(self.context, n)) is not None}
        return Decision(self.routing.to(device), dataclasses.replace(self.context, **moved))


Trace = Mapping[str, Decision]  # layer name -> what was decided there in one forward


def dense_routing(weights: Tensor, logits: Tensor | None, normalised: bool = False) -> Routing:
    """Every expert serves every token: K == E, weights (T, E)."""
    num_tokens, num_experts = weights.shape
    ids_TE = torch.arange(num_experts, device=weights.device).expand(num_tokens, num_experts)
    return Routing(ids_TE, weights, logits, num_experts, normalised, dense=True)
