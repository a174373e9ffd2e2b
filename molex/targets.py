"""Which modules a configuration means: patterns and roles to module names, with every mismatch an error.

Heads, Mamba's dt_proj and modules that are not linears are refused by name; a pattern that matches nothing is an error
that lists the nearest names; converting the same module twice is an error too.
"""

from collections import defaultdict
from difflib import get_close_matches

from torch import nn

from molex.architectures import ROLE_NAMES, ROLES, Roles, matches
from molex.errors import TargetError
from molex.layer import features
from molex.losses import block_of


def find_targets(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Module]:
    """The linears that roles and patterns name, in the model's order. Raises TargetError as the module says."""
    wanted = [pattern for entry in patterns for pattern in _spelled_out(model, entry)]
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if name and features(module)}
    for pattern in wanted:
        if not any(matches(name, pattern) for name in linears):
            raise TargetError(_no_match(pattern, list(linears), list(modules)))
    found = {name: m for name, m in linears.items() if any(matches(name, pattern) for pattern in wanted)}
    for name in found:
        _refuse(model, name)
    return found


def find_modules(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Names of the modules `also_train` patterns mean. Raises TargetError on a pattern that matches nothing."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise TargetError(_no_match(pattern, names, names))
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def by_block(names: list[str]) -> dict[str, list[str]]:
    """Groups module names by transformer block, in order."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in names:
        blocks[block_of(name)].append(name)
    return dict(blocks)


def stack_of(model: nn.Module, name: str) -> str:
    """Whose tokens a layer sees: "model", or in an encoder-decoder "encoder" or "decoder". Keys and values of
    cross-attention see the encoder's."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "model"
    parts = name.split(".")
    crosses = any(part in ("EncDecAttention", "encoder_attn", "crossattention") for part in parts)
    if "decoder" in parts and not (crosses and parts[-1] in ("k", "v", "k_proj", "v_proj", "key", "value")):
        return "decoder"
    return "encoder"


def _spelled_out(model: nn.Module, entry: str) -> tuple[str, ...]:
    if entry not in ROLE_NAMES:
        return (entry,)
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    roles = ROLES.get(model_type, Roles())
    names = roles.attention + roles.ffn + roles.ssm if entry == "all" else getattr(roles, entry)
    if not names and entry == "all":
        names = tuple({f"*.{name.split('.')[-1]}" for name in _block_linears(model)})
    if not names:
        linears = sorted({name.split(".")[-1] for name in _block_linears(model)})
        raise TargetError(
            f"molex does not know the {entry!r} linears of {model_type}; give targets by name. "
            f"Linears in its blocks: {', '.join(linears) or 'none'}"
        )
    return names


def _block_linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if block_of(name) and features(module)]


def _refuse(model: nn.Module, name: str) -> None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if (head is not None and model.get_submodule(name) is head) or not block_of(name):
        raise TargetError(
            f"{name} is a head or lies outside the model's blocks; it has no place in a mixture. "
            f"To train it whole, pass also_train=({name!r},)"
        )
    if name.split(".")[-1] == "dt_proj":
        raise TargetError(f"{name}: Mamba reads dt_proj's weight directly, experts there would be skipped silently")


def _no_match(pattern: str, linears: list[str], modules: list[str]) -> str:
    if any(matches(name, pattern) for name in modules):
        return f"{pattern!r} matches modules, but none of them is a linear"
    ends = sorted({name.split(".")[-1] for name in linears})
    near = get_close_matches(pattern.split(".")[-1], ends, n=3) or ends[:12]
    return f"{pattern!r} matches no module of this model; near or known names: {', '.join(near)}"
