"""Methods whose experts are single ranks: num_experts is the total rank."""

from molex.config import MixtureConfig
from molex.experts.sparse_a import SparseAConfig
from molex.presets.base import presets
from molex.routers.implicit import ImplicitConfig
from molex.routers.self_activated import SelfActivatedConfig
from molex.routers.sigmoid import SigmoidConfig


@presets.register("smora")
def smora() -> MixtureConfig:
    """SMoRA (arXiv 2501.15103).

        y = base(x) + α Σ_i p_i b_i (a_i x), 8 of 64 single ranks by sigmoid scores, Σ p = 1

    num_experts is the total rank. The balance bias sits inside the weight as in the code, but only the balance rule
    moves it (there AdamW does too); it moves once per micro-batch, without padding. The router reads x before dropout.
    """
    return MixtureConfig(
        method="smora", num_experts=64, rank=1, alpha=16, scaling="alpha", router=SigmoidConfig(top_k=8)
    )


@presets.register("flylora")
def flylora() -> MixtureConfig:
    """FlyLoRA (arXiv 2510.08396).

        y = base(x) + (α/r) Σ_{i in topk |A x + d|} b_i (a_i x), A frozen and sparse

    num_experts is the total rank r; the paper's α is 2 r, so set alpha with it. A row of A has D · k / r non-zeros.
    Chooses by magnitude as in the paper; signed=True is the released code. Gradients
    reach x through the experts (the code's 16-bit path cuts them).
    """
    return MixtureConfig(
        method="flylora",
        num_experts=32,
        rank=1,
        alpha=64,
        scaling="alpha/num_experts",
        experts=SparseAConfig(top_k=8),
        router=ImplicitConfig(top_k=8),
    )


@presets.register("moram")
def moram() -> MixtureConfig:
    """MoRAM (arXiv 2506.21035).

        y = base(x) + s Σ_i softmax(topk(A x / ‖A x‖) / τ)_i b_i (a_i x)

    num_experts is the rank of one task, top_k the same number in the paper. In evaluation a memory that answers below
    threshold = 0.2 is left out. mixture.grow() freezes these memories and adds the next task's; the scale s stays
    with the old ones (the code drops it).
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
