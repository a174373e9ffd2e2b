"""Auxiliary losses: pure functions of what was routed, with padding masked out.

A loss sees every layer's (Routing, RouteContext) of one forward and returns a scalar. Token means run over all ranks
of one micro-batch (a differentiable all-reduce), so data parallelism does not change them; gradient accumulation
does slightly, since each micro-batch has its own means.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from molex.architectures import by_block
from molex.checks import check_choice, check_range
from molex.distributed import all_ranks
from molex.entropy import check_entropy_index, normalised_entropy
from molex.errors import ConfigError, StateError
from molex.registry import Registry
from molex.routing import Decision, Trace


@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """A configured loss; call it with the trace of a forward."""

    @abstractmethod
    def __call__(self, trace: Trace) -> Tensor: ...


losses: Registry[type[Loss]] = Registry("loss")


def total_loss(parts: Sequence[Loss], trace: Trace) -> Tensor | None:
    """The sum of a method's losses over the layers that had a choice; None where none had. A model spread over several
    devices leaves its decisions on them."""
    scored = {name: decision for name, decision in trace.items() if decision.routing.num_experts > 1}
    if not parts or not scored:
        return None
    device = next(iter(scored.values())).routing.weights.device
    together = {name: d if d.routing.weights.device == device else d.to(device) for name, d in scored.items()}
    return add_up([loss(together) for loss in parts])


@losses.register("load_balance")
@dataclass(frozen=True, kw_only=True)
class LoadBalance(Loss):
    """E Σ_e f_e P_e: f the share of tokens that chose e, P the mean softmax probability of e.

    over "model": tokens of all layers are one population (MixLoRA; k at uniform routing). over "block": one loss for
    each transformer block over its linears, summed (MoLA; 1 per block at uniform). counts "slots": f sums to k.
    "shares": f sums to 1. "weights": f is the mean routed weight, with gradient (DynMoLE). Layers with unlike E form
    groups of their own, weighted by their number.
    """

    balance_coefficient: float = 1e-3
    balance_over: Literal["model", "block"] = "model"
    balance_counts: Literal["slots", "shares", "weights"] = "slots"

    def __post_init__(self) -> None:
        check_range("balance_coefficient", self.balance_coefficient, 0)
        check_choice("balance_over", self.balance_over, ("model", "block"))
        check_choice("balance_counts", self.balance_counts, ("slots", "shares", "weights"))

    def __call__(self, trace: Trace) -> Tensor:
        if self.balance_over == "block":
            terms = [self._one([trace[name] for name in names]) for names in by_block(trace).values()]
        else:
            groups = _by_num_experts(trace)
            total = sum(len(group) for group in groups)
            terms = [self._one(group) * (len(group) / total) for group in groups]
        return self.balance_coefficient * add_up(terms)

    def _one(self, group: list[Decision]) -> Tensor:
        num_experts = group[0].routing.num_experts
        frequency_E = masked_mean([(self._frequency(d), d.mask()) for d in group])
        if self.balance_counts == "shares":
            frequency_E = frequency_E / frequency_E.sum().clamp(min=1e-12)
        probability_E = masked_mean([(d.scored().softmax(-1), d.mask()) for d in group])
        return num_experts * (frequency_E * probability_E).sum()

    def _frequency(self, decision: Decision) -> Tensor:
        routing = decision.routing
        if self.balance_counts == "weights":
            return routing.gates()
        chosen_TK = (routing.expert_ids >= 0).to(routing.weights.dtype)
        return routing._replace(weights=chosen_TK).gates()


@losses.register("entropy")
@dataclass(frozen=True, kw_only=True)
class Entropy(Loss):
    """DynMoLE's certainty term: the mean normalised Tsallis entropy of softmax(logits), over tokens and layers.
    entropy_index is its q, which the router's setting of that name shares, as in the authors' code."""

    entropy_coefficient: float = 1e-2
    entropy_index: float = 1.1

    def __post_init__(self) -> None:
        check_entropy_index("entropy_index", self.entropy_index)
        check_range("entropy_coefficient", self.entropy_coefficient, 0)

    def __call__(self, trace: Trace) -> Tensor:
        q = self.entropy_index
        rows = [(normalised_entropy(d.scored().softmax(-1), q)[:, None], d.mask()) for d in trace.values()]
        return self.entropy_coefficient * masked_mean(rows)[0]


@losses.register("localized_balance")
@dataclass(frozen=True, kw_only=True)
class LocalizedBalance(Loss):
    """LoRAMoE's constraint: two halves of the experts for two types of task (arXiv 2312.09979).

    Q[b, e] = Σ_s gate[b, s, e];   Z = Q ⊙ I,  I = 1 + δ where the sample's type matches the expert's half, else 1 − δ
    loss = β · Σ_linears Var(Z) / mean(Z)²      (squared_mean=False: the paper's Var / mean)

    Task type 1 (world knowledge) matches experts 0..E/2−1, type 0 the others.
    """

    localized_coefficient: float = 0.1
    delta: float = 0.1
    squared_mean: bool = True

    def __post_init__(self) -> None:
        check_range("localized_coefficient", self.localized_coefficient, 0)
        check_range("delta", self.delta, 0, 1)

    def __call__(self, trace: Trace) -> Tensor:
        if self.localized_coefficient == 0:
            return _zero(trace)
        return self.localized_coefficient * add_up([self._one(d) for d in trace.values()])

    def _one(self, decision: Decision) -> Tensor:
        routing, ctx = decision
        if ctx.task_ids is None:
            raise StateError("localized balancing needs task types (0 or 1); call mixture.set_tasks(ids)")
        if routing.num_experts % 2:
            raise ConfigError(f"localized balancing halves the experts; num_experts={routing.num_experts} is odd")
        if bool(((ctx.task_ids < 0) | (ctx.task_ids > 1)).any()):
            raise ConfigError("localized balancing knows task types 0 and 1; map your tasks to those two")
        mask_T = decision.mask()
        sequence_T = ctx.sequence_of_token(mask_T.device)
        num_sequences = ctx.shape[0] if ctx.segment_ids is None else len(mask_T)
        parts_TF = torch.cat([routing.gates(), ctx.task_ids[:, None], torch.ones_like(mask_T)[:, None]], dim=1)
        sums_BF = parts_TF.new_zeros(num_sequences, parts_TF.shape[1]).index_add(
            0, sequence_T, parts_TF * mask_T[:, None]
        )
        mass_BE, type_B, real_B = sums_BF[:, :-2].double(), sums_BF[:, -2] > 0, sums_BF[:, -1] > 0
        first_half_E = torch.arange(routing.num_experts, device=mask_T.device) < routing.num_experts // 2
        matches_BE = (type_B[:, None] == first_half_E).double()
        importance_BE = 1 - self.delta + 2 * self.delta * matches_BE
        return self._spread((mass_BE * importance_BE)[real_B]).to(mask_T.dtype)

    def _spread(self, z: Tensor) -> Tensor:
        """Unbiased variance over (squared) mean, from moments that add up over ranks."""
        count, total, squares = all_ranks(torch.stack([z.new_tensor(z.numel()), z.sum(), z.square().sum()]))
        mean = total / count.clamp(min=1)
        variance = (squares - count * mean**2) / (count - 1).clamp(min=1)
        return variance / (mean**2 + 1e-10 if self.squared_mean else mean + 1e-10)


@losses.register("task_cross_entropy")
@dataclass(frozen=True, kw_only=True)
class TaskCrossEntropy(Loss):
    """MeteoRA's gate supervision: the gate of every linear should name the token's task (arXiv 2405.13053).

    Mean cross-entropy over linears and tokens of logits at s against the task of token s + 1, as the language
    modelling loss shifts; the coefficient 50 is the released code's.
    """

    task_coefficient: float = 50.0

    def __post_init__(self) -> None:
        check_range("task_coefficient", self.task_coefficient, 0)

    def __call__(self, trace: Trace) -> Tensor:
        if self.task_coefficient == 0:
            return _zero(trace)
        return self.task_coefficient * masked_mean([self._one(d) for d in trace.values()])[0]

    def _one(self, decision: Decision) -> tuple[Tensor, Tensor]:
        ctx, logits_TE = decision.context, decision.scored()
        if ctx.task_ids is None:
            raise StateError("MeteoRA's gate loss needs task ids; call mixture.set_tasks(ids)")
        if bool((ctx.task_ids >= logits_TE.shape[1]).any()):
            raise ConfigError(f"a task id is not below num_experts={logits_TE.shape[1]}; task i names expert i")
        mask_BS = decision.mask().view(ctx.shape)
        segments_BS = None if ctx.segment_ids is None else ctx.segment_ids.view(ctx.shape)
        tasks_BS = ctx.task_ids.view(ctx.shape)
        valid = mask_BS[:, :-1] * mask_BS[:, 1:] * (tasks_BS[:, 1:] >= 0)
        if segments_BS is not None:
            valid = valid * (segments_BS[:, :-1] == segments_BS[:, 1:])
        shifted = logits_TE.unflatten(0, ctx.shape)[:, :-1].flatten(0, 1)
        wrong_T = F.cross_entropy(shifted, tasks_BS[:, 1:].flatten().clamp(min=0), reduction="none")
        return wrong_T[:, None], valid.flatten()


@losses.register("specialisation_balance")
@dataclass(frozen=True, kw_only=True)
class SpecialisationBalance(Loss):
    """LoRA-Mixer's RSL (arXiv 2507.00029):  c · ( Σ_e P_e f_e − λ E_x[H(p(x))] ), per linear, averaged over linears.

    P mean probability, f share of top-1 choices. The paper's text wants specialisation, its formula raises the
    entropy; entropy_sign "paper" is the formula, "specialise" the text. No official coefficients exist: these are ours.
    """

    specialisation_coefficient: float = 0.01
    entropy_weight: float = 0.1
    entropy_sign: Literal["paper", "specialise"] = "paper"

    def __post_init__(self) -> None:
        check_range("specialisation_coefficient", self.specialisation_coefficient, 0)
        check_choice("entropy_sign", self.entropy_sign, ("paper", "specialise"))

    def __call__(self, trace: Trace) -> Tensor:
        terms = [self._one(d) for d in trace.values() if d.routing.logits is not None]
        if not terms:
            return _zero(trace)
        return self.specialisation_coefficient * add_up(terms) / len(terms)

    def _one(self, decision: Decision) -> Tensor:
        log_p_TE = decision.scored().log_softmax(-1)
        p_TE, num_experts = log_p_TE.exp(), decision.routing.num_experts
        entropy_T1 = -(p_TE * log_p_TE).sum(-1, keepdim=True)
        first_TE = F.one_hot(p_TE.argmax(-1), num_experts).to(p_TE.dtype)
        means = masked_mean([(torch.cat([p_TE, first_TE, entropy_T1], dim=1), decision.mask())])
        probability_E, frequency_E, entropy = means.split([num_experts, num_experts, 1])
        sign = -1 if self.entropy_sign == "paper" else 1
        return (probability_E * frequency_E).sum() + sign * self.entropy_weight * entropy[0]


def _zero(trace: Trace) -> Tensor:
    return next(iter(trace.values())).routing.weights.new_zeros(())


def _by_num_experts(trace: Trace) -> list[list[Decision]]:
    groups: dict[int, list[Decision]] = defaultdict(list)
    for decision in trace.values():
        groups[decision.routing.num_experts].append(decision)
    return list(groups.values())


def masked_mean(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean of values (T_i, F) under masks (T_i,), over all parts and all ranks -> (F,); 0 where nothing is real."""
    sums_F = add_up([(values * mask[:, None]).sum(0) for values, mask in rows])
    count = add_up([mask.sum() for _, mask in rows]).to(sums_F.dtype)
    both = all_ranks(torch.cat([sums_F, count[None]]))
    return both[:-1] / both[-1].clamp(min=1)


def add_up(terms: list[Tensor]) -> Tensor:
    """The sum of equally shaped terms, which may lie on different devices; on the first one's."""
    return torch.stack([term.to(terms[0].device) for term in terms]).sum(0)
