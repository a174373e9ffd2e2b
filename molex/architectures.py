"""What module names say: which linears are a model's attention, feed-forward block and state-space mixer, and which
transformer block they lie in.

Presets name roles ("attention", "ffn", "ssm", "all"); this table says what they are called in each architecture.
A pattern is a dotted suffix of a module name, each component a shell pattern: "q_proj", "layer.*.output.dense".
In an architecture that is not listed, "all" goes by shape and other targets are spelled out; nothing else depends on
this table.
"""

from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple


class Roles(NamedTuple):
    attention: tuple[str, ...] = ()
    ffn: tuple[str, ...] = ()
    ssm: tuple[str, ...] = ()


_LLAMA = Roles(
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    ffn=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)

ROLES: dict[str, Roles] = {
    **dict.fromkeys(
        ("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text"), _LLAMA
    ),
    **dict.fromkeys(("olmo", "olmo2", "granite", "smollm3", "cohere", "cohere2", "helium", "stablelm"), _LLAMA),
    "phi3": Roles(("qkv_proj", "o_proj"), ("mlp.gate_up_proj", "mlp.down_proj")),
    "phi": Roles(("q_proj", "k_proj", "v_proj", "self_attn.dense"), ("mlp.fc1", "mlp.fc2")),
    "gpt2": Roles(("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj")),
    "gpt_neox": Roles(("attention.query_key_value", "attention.dense"), ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
    "opt": Roles(("q_proj", "k_proj", "v_proj", "self_attn.out_proj"), ("fc1", "fc2")),
    "bert": Roles(
        ("self.query", "self.key", "self.value", "attention.output.dense"),
        ("intermediate.dense", "layer.*.output.dense"),
    ),
    "t5": Roles(
        ("*Attention.q", "*Attention.k", "*Attention.v", "*Attention.o"), ("DenseReluDense.wi*", "DenseReluDense.wo")
    ),
    "mamba": Roles(ssm=("mixer.in_proj", "mixer.x_proj", "mixer.out_proj")),
    "mamba2": Roles(ssm=("mixer.in_proj", "mixer.out_proj")),
}
ROLE_NAMES = (*Roles._fields, "all")


def block_of(name: str) -> str:
    """The transformer block a module name lies in: "model.layers.3.mlp.up_proj" -> "model.layers.3"."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), "")


def by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """Module names by the block they lie in, in order."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in names:
        blocks[block_of(name)].append(name)
    return dict(blocks)


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted module name ends in the pattern, component by component."""
    wanted = pattern.split(".")
    given = name.split(".")[-len(wanted) :]
    return len(given) == len(wanted) and all(fnmatchcase(g, w) for g, w in zip(given, wanted, strict=True))
