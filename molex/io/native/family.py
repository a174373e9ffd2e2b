"""What a native architecture is: whose mixtures it can hold, for which programs, under which names.

A feed-forward block of molex with a renormalised top-k router is, expert by expert, a native mixture of experts:

    y = Σ_{e in top-k} w_e FFN_e(x),   w = softmax of the k chosen logits,   FFN_e of weights W + s B_e A_e

(The base's share h_0 of molex.ffn has weight 1 − Σ w = 0.) Each architecture is one small file: a `Family`.
Configurations become files by transformers; tensors are named here as checkpoints on the hub have them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, get_args

from transformers import PretrainedConfig

from molex.errors import ConfigError, TargetError
from molex.io.native.blocks import PROJECTIONS, Block, Experts
from molex.io.stream import Entry
from molex.registry import Registry

Target = Literal["transformers", "vllm", "llama.cpp"]
TARGETS: tuple[Target, ...] = get_args(Target)


class Family(ABC):
    """One native architecture of transformers.

    serves: the dense architectures whose mixtures it holds, and the programs it holds them for. keeps_dense: the
    programs for which a layer with nothing to choose stays dense; elsewhere it is E equal experts, which is exact
    because weights sum to 1. fallback: taken only where no other fits. condition: what `refusal` asks for, in words.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    serves: ClassVar[Mapping[str, tuple[Target, ...]]]
    keeps_dense: ClassVar[tuple[Target, ...]] = ()
    fallback: ClassVar[bool] = False
    condition: ClassVar[str]

    @abstractmethod
    def refusal(self, base: PretrainedConfig, target: Target) -> str | None:
        """Why this base's mixtures are not exactly this architecture under that program; None where they are."""

    @abstractmethod
    def config(self, base: PretrainedConfig, experts: Experts, target: Target) -> dict[str, Any]:
        """The fields of config.json that are not COPIED from the base."""

    @abstractmethod
    def entries(self, block: Block, base: PretrainedConfig) -> Iterator[Entry]:
        """The feed-forward block's tensors, and what else the architecture has in a decoder layer that the base has
        not."""

    def layer_entries(self, block: Block, base: PretrainedConfig, target: Target) -> Iterator[Entry]:
        """`entries`, or the dense block where it stays one."""
        if block.router is None and target in self.keeps_dense:
            for projection in PROJECTIONS:
                yield block.dense_entry(f"{block.name}.mlp.{projection}.weight", projection)
            return
        yield from self.entries(block, base)


families: Registry[type[Family]] = Registry("native family")

# fields that mean the same in every dense and native architecture here
COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def find_family(base: PretrainedConfig, target: Target, name: str | None) -> Family:
    """The family that holds this base's mixtures for that program, or the named one. Raises TargetError where none
    does, with each one's reason, and ConfigError on an unknown name."""
    kind = base.model_type
    known = sorted(families, key=lambda each: families[each].fallback)
    named = [families[each]() for each in (known if name is None else [name])]
    fitting = [family for family in named if target in family.serves.get(kind, ())]
    reasons = {family.model_type: family.refusal(base, target) for family in fitting}
    for family in fitting:
        if reasons[family.model_type] is None:
            return family
    if reasons:
        raise TargetError("; ".join(f"{each}: {reason}" for each, reason in reasons.items()))
    served = sorted({source for family in named for source, targets in family.serves.items() if target in targets})
    subject = f"{name} is not" if name else "no native architecture is"
    raise TargetError(
        f"{subject} exactly a mixture on a {kind!r} base under {target}; known bases: {', '.join(served) or 'none'}. "
        "Serve this mixture as mixture.save writes it"
    )


def activation_reason(base: PretrainedConfig, target: Target) -> str | None:
    """vLLM and llama.cpp compute silu in these architectures, whatever the configuration says."""
    if target == "transformers" or base.hidden_act in ("silu", "swish"):
        return None
    return f"{target} computes silu here and the base has hidden_act={base.hidden_act!r}; export for transformers"


def window_reason(base: PretrainedConfig, keeps: bool) -> str | None:
    """keeps: whether every layer of the target attends within `sliding_window`, as the base's layers must then do."""
    window = getattr(base, "sliding_window", None)
    layer_types = getattr(base, "layer_types", None) or ["sliding_attention"]
    if not window or set(layer_types) == {"full_attention"}:
        return None
    if keeps and set(layer_types) == {"sliding_attention"}:
        return None
    return (
        f"layers attend within sliding_window={window} in a way it has no field for; where texts stay shorter, "
        "set the base's sliding_window to None (layer_types to full_attention) and export again"
    )


def rope_reason(base: PretrainedConfig, target: Target, known: tuple[str, ...]) -> str | None:
    """known: the kinds of rotary embedding that the program computes in this architecture."""
    kind = (base.rope_parameters or {}).get("rope_type", "default")
    if kind in known:
        return None
    return f"{target} is known to be exact with rope_type {', '.join(known)}; the base has {kind!r}"


def head_dim_is_default(base: PretrainedConfig) -> bool:
    """Whether heads are as wide as hidden_size divided by their number."""
    head_dim = getattr(base, "head_dim", None)
    return head_dim is None or head_dim * base.num_attention_heads == base.hidden_size


def first_reason(*reasons: str | None) -> str | None:
    """The first that is one."""
    return next((reason for reason in reasons if reason is not None), None)


def check_target(target: str) -> Target:
    """Raises ConfigError unless it is a program that exports are made for."""
    for known in TARGETS:
        if known == target:
            return known
    raise ConfigError(f"target={target!r}; choose from {', '.join(TARGETS)}")
