"""Methods over loaded adapters: pretrained LoRAs become experts, and what is trained, if anything, is who chooses."""

from molex.config import MixtureConfig
from molex.losses import SpecialisationBalance, TaskCrossEntropy
from molex.presets.base import presets
from molex.routers.arrow import ArrowConfig
from molex.routers.scalings import ScalingsConfig
from molex.routers.staged import StagedConfig
from molex.routers.topk import TopKConfig


@presets.register("meteora")
def meteora() -> MixtureConfig:
    """MeteoRA (arXiv 2405.13053).

        y = base(x) + Σ_k w_k s_k B_k A_k x over loaded LoRAs, the top 2 of each linear's gate

    Only gates train, as the paper says; train_experts=True is the released script, which forces dropout 0.1. The loss
    needs task ids: task i is expert i. For composite prompts the code evaluates at temperature 15 to 30.
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

        y = base(x) + Σ_k w_k s B_k A_k x; stage "hard": the task's expert; "soft": softmax over all, evaluation top 3

    On attention (targets=("ssm",) for state-space models). No code or coefficients are public: the loss's are ours.
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
