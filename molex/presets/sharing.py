"""Methods that share: factors between experts, layers or tasks."""

from molex.config import MixtureConfig
from molex.experts.averaged import AveragedConfig
from molex.experts.lora import LoRAConfig
from molex.experts.shards import ShardsConfig
from molex.experts.shared_a import SharedAConfig
from molex.presets.base import presets
from molex.routers.constant import ConstantConfig
from molex.routers.polytropon import PolytroponConfig
from molex.routers.soft import SoftConfig
from molex.routers.task import TaskConfig


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

    relaxed=False is the released configurations' plain sigmoid in training. A starts in U(±1/√D), as LoRA's does.
    """
    return MixtureConfig(
        method="poly", num_experts=4, rank=8, alpha=1, experts=AveragedConfig(), router=PolytroponConfig()
    )


@presets.register("mhr")
def mhr() -> MixtureConfig:
    """MHR, multi-head routing (arXiv 2211.03831).

        Poly with weights of its own for each of 4 slices of the in- and out-features

    num_heads must divide every target's sizes. A starts in U(±1/√D) (PEFT: U(±1/√(D/H))).
    """
    return poly().override({"method": "mhr", "num_heads": 4})


@presets.register("mos")
def mos() -> MixtureConfig:
    """MoS, mixture of shards (arXiv 2410.00938).

        y = base(x) + (α/r) B_l A_l x, both gathered by fixed random indices from pools that all layers share

    num_experts stays 1; rank, pool_rank, private_rank and shards_per_vector are its dials. A layer draws
    rank − private_rank public vectors; each layer of its type gives pool_rank − private_rank, so the defaults need 7.
    """
    return MixtureConfig(
        method="mos", num_experts=1, rank=8, alpha=16, dropout=0.1, experts=ShardsConfig(), router=ConstantConfig()
    )


@presets.register("mtlora")
def mtlora() -> MixtureConfig:
    """MTLoRA (CVPR 2024).

        y = base(x) + s B_0 A_0 x + s B_t A_t x, t the token's task

    num_experts is one shared expert and one per task, so task t has expert 1 + t. mode="matrix" is the released vision
    code's default: the task's expert alone, and there task t has expert t, 0 the shared one.
    """
    return MixtureConfig(method="mtlora", num_experts=5, rank=8, alpha=16, experts=LoRAConfig(), router=TaskConfig())
