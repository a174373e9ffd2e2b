"""Methods that train LoRA experts together: blocks of ranks behind a learned gate, in every layer."""

from molex.config import MixtureConfig
from molex.losses import Entropy, LoadBalance, LocalizedBalance
from molex.presets.base import presets
from molex.routers.dynamic import DynamicConfig
from molex.routers.soft import SoftConfig
from molex.routers.topk import TopKConfig


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

    Ordinary LoRA on attention. Weights are renormalised as in the paper's Algorithm 1 and its code (not its Eq. 7); the
    balance coefficient is the code's 1e-3 with top-k counts (the paper prints 1e-2). Experts share one dropout mask
    (the code: one each). experts="dora" is MixDoRA.
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

    The released scripts leave the balance loss off (it cannot be turned on there); here it is on, as the paper says,
    without padding. A starts as in the code (kaiming; the paper says Gaussian: init="gaussian"). Experts share one
    dropout mask (the code: one each).
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
    script does. Var / mean² is the code's form; squared_mean=False is the paper's. Padding is masked out of it (the
    code counts it). It evens Q ⊙ I, so the half that matches a task's type gets less, as in the code. Experts share
    one dropout mask (the code: one each).
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

    As in the released code, the expert that crosses top_p is left out and weights are not renormalised. Padding is
    masked out of the entropy loss too (the code masks it in the balance loss only). Experts share one dropout mask.
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
