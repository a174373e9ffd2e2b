"""Every published method as a preset: its paper's defaults, and how ours deviates, if it does.

    molex.preset("mixlora", num_experts=8, top_k=2, rank=16)

A preset is a function without arguments that returns the whole configuration; its docstring is the method and its
paper, the equation, and every deviation from paper or code. Overrides are the flat settings of molex.config.
"""

from collections.abc import Callable
from typing import Any

from molex.config import MixtureConfig
from molex.errors import ConfigError
from molex.experts.averaged import AveragedConfig
from molex.experts.lora import LoRAConfig
from molex.experts.shards import ShardsConfig
from molex.experts.shared_a import SharedAConfig
from molex.experts.sparse_a import SparseAConfig
from molex.losses import (
    Entropy,
    LoadBalance,
    LocalizedBalance,
    SpecialisationBalance,
    TaskCrossEntropy,
)
from molex.registry import Registry
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
from molex.routers.task import TaskConfig
from molex.routers.topk import TopKConfig

presets: Registry[Callable[[], MixtureConfig]] = Registry("preset")


def preset(name: str, **overrides: Any) -> MixtureConfig:
    """A method's configuration with its paper's defaults, changed where asked.

    Raises ConfigError on an unknown preset or setting; the message lists the known ones.
    """
    config = presets[name]()
    if config.rank == 1 and overrides.get("rank", 1) != 1:
        raise ConfigError(f"{name} has experts of rank 1: its total rank is num_experts, not rank")
    return config.override(overrides)


@presets.register("lora")
def lora() -> MixtureConfig:
    """LoRA (arXiv 2106.09685).

        y = base(x) + (α/r) B A x

    The degenerate mixture: one expert, weight 1; equals PEFT's LoRA.
    """
    return MixtureConfig(method="lora", rank=8, alpha=16, dropout=0.05)


@presets.register("mixlora")
def mixlora() -> MixtureConfig:
    """MixLoRA (arXiv 2404.15159).

        y = Σ_k w_k FFN_k(x), each expert's gate, up and down with LoRAs of its own

    Ordinary LoRA on attention. Weights are renormalised as in the paper's Algorithm 1 and its code (its Eq. 7 does not);
    the balance coefficient is the code's 1e-3 with top-k counts (the paper prints 1e-2). experts="dora" is MixDoRA.
    """
    return MixtureConfig(
        method="mixlora",
        targets=("ffn",),
        plain_targets=("attention",),
        scope="ffn",
        num_experts=8,
        rank=16,
        alpha=32,
        dropout=0.05,
        router=TopKConfig(top_k=2, gate_init=0.02),
        losses=(LoadBalance(balance_coefficient=1e-3, balance_over="model"),),
    )


@presets.register("mola")
def mola() -> MixtureConfig:
    """MoLA (arXiv 2402.08562).

        y = base(x) + Σ_k w_k s B_k A_k x per linear, 2-4-6-8 experts from low to high layers

    The released scripts leave the balance loss off (it cannot be turned on there); here it is on, as the paper says.
    """
    return MixtureConfig(
        method="mola",
        num_experts=5,
        allocation="inverted_triangle",
        rank=8,
        alpha=16,
        dropout=0.05,
        router=TopKConfig(top_k=2),
        losses=(LoadBalance(balance_coefficient=1e-3, balance_over="block", balance_counts="shares"),),
    )


@presets.register("loramoe")
def loramoe() -> MixtureConfig:
    """LoRAMoE (arXiv 2312.09979).

        y = base(x) + Σ_e softmax(W x)_e s B_e A_e x on the linears of the FFN

    The localized balancing constraint needs task types (0 or 1); localized_coefficient=0 turns it off, as the released
    script does. Var / mean² is the code's form; squared_mean=False is the paper's.
    """
    return MixtureConfig(
        method="loramoe",
        targets=("ffn",),
        num_experts=6,
        rank=4,
        alpha=32,
        dropout=0.05,
        router=SoftConfig(),
        losses=(LocalizedBalance(localized_coefficient=0.1, delta=0.1),),
    )


@presets.register("dynmole")
def dynmole() -> MixtureConfig:
    """DynMoLE (arXiv 2504.00661).

        y = base(x) + Σ_{e in S(x)} softmax(W x)_e s B_e A_e x, S all experts where the router is unsure, else the top-p

    As in the released code, the expert that crosses top_p is left out and weights are not renormalised. Padding is masked
    out of the entropy loss too (the code masks it in the balance loss only).
    """
    return MixtureConfig(
        method="dynmole",
        targets=("ffn",),
        num_experts=6,
        rank=24,
        alpha=48,
        dropout=0.05,
        router=DynamicConfig(),
        losses=(Entropy(), LoadBalance(balance_coefficient=1e-3, balance_counts="weights")),
    )


@presets.register("smora")
def smora() -> MixtureConfig:
    """SMoRA (arXiv 2501.15103).

        y = base(x) + α Σ_i p_i b_i (a_i x), 8 of 64 single ranks by sigmoid scores, Σ p = 1

    num_experts is the total rank. The balance bias sits inside the weight as in the code, but only the balance rule moves
    it (there AdamW does too); it moves once per step, without padding. The router reads x before dropout.
    """
    return MixtureConfig(
        method="smora", num_experts=64, rank=1, alpha=16, scaling="alpha", router=SigmoidConfig(top_k=8)
    )


@presets.register("flylora")
def flylora() -> MixtureConfig:
    """FlyLoRA (arXiv 2510.08396).

        y = base(x) + (α/r) Σ_{i in topk |A x + d|} b_i (a_i x), A frozen and sparse

    num_experts is the total rank r. Chooses by magnitude as in the paper; signed=True is the released code. Gradients
    reach x through the experts (the code's 16-bit path cuts them).
    """
    return MixtureConfig(
        method="flylora",
        num_experts=32,
        rank=1,
        alpha=64,
        scaling="alpha/num_experts",
        experts=SparseAConfig(density=0.25),
        router=ImplicitConfig(top_k=8),
    )


@presets.register("moram")
def moram() -> MixtureConfig:
    """MoRAM (arXiv 2506.21035).

        y = base(x) + s Σ_i softmax(topk(A x / ‖A x‖) / τ)_i b_i (a_i x)

    mixture.grow() freezes these memories and adds the next task's. The scale s stays with the old ones (the code drops
    it).
    """
    return MixtureConfig(
        method="moram",
        targets=("attention",),
        num_experts=8,
        rank=1,
        alpha=16,
        scaling="alpha/num_experts",
        dropout=0.1,
        router=SelfActivatedConfig(top_k=8),
    )


@presets.register("meteora")
def meteora() -> MixtureConfig:
    """MeteoRA (arXiv 2405.13053).

        y = base(x) + Σ_k w_k s_k B_k A_k x over loaded LoRAs, the top 2 of each linear's gate

    Only gates train, as the paper says; train_experts=True is the released script. The loss needs task ids: task i is
    expert i.
    """
    return MixtureConfig(
        method="meteora",
        num_experts=8,
        rank=8,
        alpha=16,
        router=TopKConfig(top_k=2, gate_init=1.0),
        losses=(TaskCrossEntropy(),),
        train_experts=False,
    )


@presets.register("xlora")
def xlora() -> MixtureConfig:
    """X-LoRA (arXiv 2402.07148).

        y = base(x) + Σ_e w_e s_e B_e A_e x, w from a head on the model's own last hidden states

    Experts are loaded LoRAs, frozen. The head's dropout acts in training only.
    """
    return MixtureConfig(method="xlora", num_experts=8, rank=8, alpha=16, router=ScalingsConfig(), train_experts=False)


@presets.register("lora-mixer")
def lora_mixer() -> MixtureConfig:
    """LoRA-Mixer (arXiv 2507.00029).

        y = base(x) + Σ_k w_k s B_k A_k x; stage "hard": the task's expert, "soft": softmax over all, top 3 in evaluation

    On attention (targets=("ssm",) for state-space models). No code or coefficients are public: those of the loss are ours.
    The paper's optional penalty that keeps experts near their start is not here; train_experts=False freezes them.
    """
    return MixtureConfig(
        method="lora-mixer",
        targets=("attention",),
        num_experts=8,
        rank=8,
        alpha=16,
        router=StagedConfig(),
        losses=(SpecialisationBalance(),),
    )


@presets.register("arrow")
def arrow() -> MixtureConfig:
    """Arrow (arXiv 2405.11157).

        y = base(x) + Σ_k w_k s_k B_k A_k x, the top 3 of |v_e x|, v_e the top right singular vector of B_e A_e

    Nothing is trained. Dropout would act on A's input here (PEFT's acts on the output).
    """
    return MixtureConfig(method="arrow", num_experts=8, rank=8, alpha=16, router=ArrowConfig(), train_experts=False)


@presets.register("hydralora")
def hydralora() -> MixtureConfig:
    """HydraLoRA (arXiv 2404.19245).

        y = base(x) + Σ_e softmax(W x)_e s B_e A x on the linears of the FFN, one A for all experts

    A x is computed once with one dropout mask (the code: once per expert).
    """
    return MixtureConfig(
        method="hydralora",
        targets=("ffn",),
        num_experts=4,
        rank=4,
        alpha=32,
        dropout=0.05,
        experts=SharedAConfig(),
        router=SoftConfig(),
    )


@presets.register("poly")
def poly() -> MixtureConfig:
    """Poly (arXiv 2202.13914).

        y = base(x) + (1/r) (Σ_j w_j B_j) (Σ_j w_j A_j) x, w learned per task

    relaxed=False is the released configurations' plain sigmoid in training.
    """
    return MixtureConfig(
        method="poly",
        num_experts=4,
        rank=8,
        alpha=1,
        experts=AveragedConfig(),
        router=PolytroponConfig(),
    )


@presets.register("mhr")
def mhr() -> MixtureConfig:
    """MHR, multi-head routing (arXiv 2211.03831).

        Poly with weights of its own for each of 4 slices of the in- and out-features

    num_heads must divide every target's sizes.
    """
    return poly().override({"method": "mhr", "num_heads": 4})


@presets.register("mos")
def mos() -> MixtureConfig:
    """MoS, mixture of shards (arXiv 2410.00938).

        y = base(x) + (α/r) B_l A_l x, both gathered by fixed random indices from pools that all layers share

    num_experts stays 1; rank, pool_rank, private_rank and shards_per_vector are its dials.
    """
    return MixtureConfig(
        method="mos",
        num_experts=1,
        rank=8,
        alpha=16,
        dropout=0.1,
        experts=ShardsConfig(),
        router=ConstantConfig(),
    )


@presets.register("mtlora")
def mtlora() -> MixtureConfig:
    """MTLoRA (CVPR 2024).

        y = base(x) + s B_0 A_0 x + s B_t A_t x, t the token's task

    num_experts is one shared expert and one per task. mode="matrix" is the released vision code's default: the task's
    expert alone.
    """
    return MixtureConfig(method="mtlora", num_experts=5, rank=8, alpha=16, experts=LoRAConfig(), router=TaskConfig())
