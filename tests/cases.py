"""One row for everything that is registered: tiny settings that show what is special, and the equation it must equal.

A new router, expert kind, loss or preset needs one row here. The row alone puts it through the laws of
test_routers.py, test_experts.py, test_losses.py and test_presets.py; a registered name without a row fails there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from molex.experts import ExpertsConfig
from molex.experts.averaged import AveragedConfig
from molex.experts.dora import DoRAConfig
from molex.experts.lora import LoRAConfig
from molex.experts.shards import ShardsConfig
from molex.experts.shared_a import SharedAConfig
from molex.experts.sparse_a import SparseAConfig
from molex.losses import (
    Entropy,
    LoadBalance,
    LocalizedBalance,
    Loss,
    SpecialisationBalance,
    TaskCrossEntropy,
)
from molex.routers import RouterConfig
from molex.routers.arrow import ArrowConfig
from molex.routers.constant import ConstantConfig
from molex.routers.dynamic import DynamicConfig
from molex.routers.implicit import ImplicitConfig
from molex.routers.polytropon import PolytroponConfig
from molex.routers.scalings import ScalingsConfig
from molex.routers.self_activated import SelfActivatedConfig
from molex.routers.sigmoid import SigmoidConfig
from molex.routers.soft import SoftConfig
from molex.routers.staged import StagedConfig
from molex.routers.static import StaticConfig
from molex.routers.task import TaskConfig
from molex.routers.topk import TopKConfig
from tests import equations as eq


@dataclass(frozen=True)
class RouterCase:
    """gates: the paper's weights for one token, in evaluation. Tokens have tasks 0 and 1."""

    config: RouterConfig
    gates: Callable[[Any, eq.Token], Tensor]
    why: str
    num_experts: int = 4


@dataclass(frozen=True)
class ExpertsCase:
    """row: the paper's output for one token. heads: how many gates each expert has."""

    config: ExpertsConfig
    row: Callable[[Any, Any, Tensor, Tensor], Tensor]
    why: str
    ranks: tuple[int, ...] = (2, 2, 2)
    heads: int = 1


@dataclass(frozen=True)
class LossCase:
    """value: the paper's loss of a trace. uniform, collapsed: its closed forms at 4 experts, top_k of them a token, two
    blocks of two linears, 4 rows: even routing, and all tokens to the same experts with expert 0 sure."""

    config: Loss
    value: Callable[[Any, Any], Any]
    uniform: float
    collapsed: float
    why: str
    top_k: int = 2


@dataclass(frozen=True)
class PresetCase:
    """overrides: what makes the preset small enough for a model of width 32."""

    why: str
    overrides: dict[str, Any] = field(default_factory=dict)


ROUTERS: dict[str, RouterCase] = {
    "constant": RouterCase(ConstantConfig(), eq.all_at_one, "nothing to set"),
    "soft": RouterCase(SoftConfig(), eq.soft, "nothing is dropped"),
    "topk": RouterCase(TopKConfig(top_k=2, temperature=1.5), eq.top_k_renormalised, "a temperature that shows"),
    "dynamic": RouterCase(DynamicConfig(keep_top_k=1), eq.dynmole, "tokens on both sides of the threshold"),
    "sigmoid": RouterCase(SigmoidConfig(top_k=3, rank_partition=2), eq.smora, "shared scores, and a bias", 8),
    "implicit": RouterCase(ImplicitConfig(top_k=2), eq.flylora, "magnitudes, so that signs matter"),
    "self_activated": RouterCase(
        SelfActivatedConfig(top_k=3, temperature=0.5, threshold=0.4), eq.moram, "a threshold that some ranks miss"
    ),
    "arrow": RouterCase(ArrowConfig(top_k=2, temperature=0.7), eq.arrow, "fewer than all, a temperature that shows"),
    "task": RouterCase(TaskConfig(), eq.task_and_shared, "the sum of the shared and the own expert"),
    "staged": RouterCase(StagedConfig(top_k=3), eq.top_k_of_soft, "the soft stage in evaluation"),
    "static": RouterCase(StaticConfig(), eq.learned_constants, "nothing to set"),
    "polytropon": RouterCase(PolytroponConfig(num_tasks=2, num_heads=2), eq.poly, "heads and tasks differ"),
    "scalings": RouterCase(
        ScalingsConfig(depth=2, hidden_size=5, layerwise=True, temperature=0.8, global_weight=0.5),
        eq.xlora,
        "a deep head with dropout; several layers",
    ),
}

EXPERTS: dict[str, ExpertsCase] = {
    "lora": ExpertsCase(LoRAConfig(), eq.lora, "unequal ranks", ranks=(1, 3, 2)),
    "dora": ExpertsCase(DoRAConfig(), eq.dora, "unequal ranks, magnitudes off their start", ranks=(2, 1, 3)),
    "shared_a": ExpertsCase(SharedAConfig(), eq.hydra, "one A"),
    "sparse_a": ExpertsCase(SparseAConfig(top_k=2), eq.lora, "single ranks, A frozen", ranks=(1, 1, 1, 1)),
    "averaged": ExpertsCase(AveragedConfig(num_heads=2), eq.averaged, "two heads", heads=2),
    "shards": ExpertsCase(ShardsConfig(pool_rank=3, private_rank=1), eq.shards, "private and public", ranks=(3,)),
}

LOSSES: dict[str, LossCase] = {
    "load_balance": LossCase(
        LoadBalance(balance_coefficient=0.5, balance_over="block", balance_counts="shares"),
        eq.load_balance,
        uniform=0.5 * 2 * 1.0,
        collapsed=0.5 * 2 * 4 * 0.5,
        why="per block, shares: E Σ c P is 1 for even routing, E / k where one of k chosen has all probability",
    ),
    "entropy": LossCase(
        Entropy(entropy_coefficient=0.5, entropy_index=1.3),
        eq.entropy,
        uniform=0.5,
        collapsed=0.0,
        why="normalised entropy is 1 for even probabilities, 0 for certain ones (up to its eps of 1e-5)",
    ),
    "localized_balance": LossCase(
        LocalizedBalance(localized_coefficient=0.5, delta=0.0),
        eq.localized_balance,
        uniform=0.0,
        collapsed=0.5 * 4 * (4 - 1) * 16 / 15,
        why="δ = 0: CV² over 4 rows of 4 experts is 0, and (E - 1) n / (n - 1) where one has everything",
        top_k=4,
    ),
    "task_cross_entropy": LossCase(
        TaskCrossEntropy(task_coefficient=0.5),
        eq.task_cross_entropy,
        uniform=0.5 * 1.3862943611198906,
        collapsed=0.5 * 50 * 0.5,
        why="log E for even gates; sure gates are wrong by their margin of 50 on the half whose task is not expert 0",
    ),
    "specialisation_balance": LossCase(
        SpecialisationBalance(specialisation_coefficient=0.5, entropy_weight=0.1),
        eq.specialisation_balance,
        uniform=0.5 * (0.25 - 0.1 * 1.3862943611198906),
        collapsed=0.5,
        why="Σ P f is 1 / E or 1; the entropy log E or 0",
    ),
}

PRESETS: dict[str, PresetCase] = {
    "lora": PresetCase("as it is"),
    "mixlora": PresetCase("fewer experts", {"num_experts": 4, "rank": 3}),
    "mola": PresetCase("two layers cannot take a shape of four groups", {"allocation": [2, 3], "rank": 3}),
    "loramoe": PresetCase("a smaller rank", {"rank": 3}),
    "dynmole": PresetCase("a smaller rank", {"rank": 3}),
    "smora": PresetCase("fewer ranks", {"num_experts": 8, "top_k": 3}),
    "flylora": PresetCase("fewer ranks", {"num_experts": 8, "top_k": 3}),
    "moram": PresetCase("softer, so that the threshold cuts some ranks only", {"top_k": 5, "temperature": 0.5}),
    "meteora": PresetCase("adapters of several ranks", {"num_experts": 3, "rank": [1, 4, 2], "alpha": [2, 3, 7]}),
    "xlora": PresetCase("a small deep head", {"num_experts": 3, "depth": 2, "hidden_size": 5, "layerwise": True}),
    "lora-mixer": PresetCase("fewer experts", {"num_experts": 4, "rank": 3}),
    "arrow": PresetCase("fewer experts", {"num_experts": 4, "rank": 3}),
    "hydralora": PresetCase("a rank that is not the number of experts", {"rank": 3}),
    "poly": PresetCase("two tasks", {"num_tasks": 2, "rank": 3}),
    "mhr": PresetCase("two tasks", {"num_tasks": 2, "rank": 3}),
    "mos": PresetCase("a rank that is not the pool's", {"rank": 3}),
    "mtlora": PresetCase("two tasks and the shared expert", {"num_experts": 3, "rank": 3}),
}
