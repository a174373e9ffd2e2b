"""Which modules a configuration means: patterns and roles to module names, with every mismatch an error.

Heads, Mamba's dt_proj and modules that are not linears are refused by name; a pattern that matches nothing is an error
that lists the nearest names.
"""

from difflib import get_close_matches
from typing import NamedTuple

from torch import nn

from molex.architectures import ROLE_NAMES, ROLES, block_of, matches
from molex.config import MixtureConfig
from molex.errors import TargetError
from molex.linears import features
from molex.tokens import find_stacks

Linears = dict[str, nn.Module]


class Targets(NamedTuple):
    """routed: get experts and a router. plain: get one LoRA. also_trained, also_kept: names of modules saved whole."""

    routed: Linears
    plain: Linears
    also_trained: list[str]
    also_kept: list[str]


def find_targets(model: nn.Module, config: MixtureConfig) -> Targets:
    """What a configuration means in this model. Raises TargetError as the module says, and on overlaps."""
    routed = find_linears(model, config.targets)
    if not routed:
        found = "names no linear inside this model" if config.targets else "is empty"
        raise TargetError(f"targets={config.targets} {found}: nothing to convert; give names of linears")
    plain = find_linears(model, config.plain_targets)
    also_trained = find_modules(model, config.also_train)
    both = sorted(set(routed) & set(plain))
    if both:
        raise TargetError(f"{both[0]} is both in targets and in plain_targets; leave it in one")
    also_kept = find_modules(model, config.also_keep)
    for whole in (*also_trained, *also_kept):
        inside = [name for name in (*routed, *plain) if f"{name}.".startswith(f"{whole}.")]
        if inside:
            raise TargetError(
                f"also_train or also_keep names {whole}, which holds the target {inside[0]}; leave it in one"
            )
    _refuse_shared(model, {*routed, *plain})
    return Targets(routed, plain, also_trained, also_kept)


def find_linears(model: nn.Module, entries: tuple[str, ...]) -> Linears:
    """The linears that roles and patterns name, in the model's order. Raises TargetError as the module says."""
    linears = {name: module for name, module in model.named_modules() if name and features(module)}
    wanted: set[str] = set()
    for entry in entries:
        wanted |= _in_role(model, entry, linears) if entry in ROLE_NAMES else _matching(model, entry, linears)
    for name in sorted(wanted):
        _refuse(model, name, linears)
    return {name: module for name, module in linears.items() if name in wanted}


def find_modules(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Names of the modules `also_train` patterns mean. Raises TargetError on a pattern that matches nothing."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise TargetError(_no_match(pattern, names))
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def _refuse_shared(model: nn.Module, targets: set[str]) -> None:
    """A linear in two places would get experts in one; a block that runs twice would forget its first routing."""
    first_at = {module: name for name, module in model.named_modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        if first_at[module] in targets and first_at[module] != name:
            raise TargetError(
                f"{first_at[module]} and {name} are one module; molex takes linears that stand in one place"
            )


def _matching(model: nn.Module, pattern: str, linears: Linears) -> set[str]:
    found = {name for name in linears if matches(name, pattern)}
    if found:
        return found
    if any(matches(name, pattern) for name, _ in model.named_modules() if name):
        raise TargetError(f"{pattern!r} matches modules, but none of them is a linear")
    raise TargetError(_no_match(pattern, list(linears)))


def _in_role(model: nn.Module, role: str, linears: Linears) -> set[str]:
    """A role's linears, among those that see the text; "all" of an unknown architecture goes by shape alone."""
    stacks = find_stacks(model)
    text = {name: module for name, module in linears.items() if any(stack.holds(name) for stack in stacks)}
    kind = _model_type(model)
    roles = ROLES.get(kind)
    if roles is None and role == "all":
        return _by_shape(model, text)
    patterns = () if roles is None else sum(roles, ()) if role == "all" else getattr(roles, role)
    if not patterns:
        known = "molex does not know this architecture" if roles is None else "it has none"
        ends = sorted({name.split(".")[-1] for name in _by_shape(model, text)})
        raise TargetError(
            f"no {role!r} linears in {kind}: {known}; give targets by name. Linears in its blocks: {', '.join(ends)}"
        )
    return set().union(*(_matching(model, pattern, text) for pattern in patterns))


def _model_type(model: nn.Module) -> str:
    """The architecture's name; of a model of text and images, its text part's."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()  # type: ignore[union-attr]
    return getattr(config, "model_type", type(model).__name__)


def _by_shape(model: nn.Module, linears: Linears) -> set[str]:
    return {name for name in linears if _why_not(model, name, linears) is None}


def _refuse(model: nn.Module, name: str, linears: Linears) -> None:
    reason = _why_not(model, name, linears)
    if reason is not None:
        raise TargetError(f"{name} {reason}")


def _why_not(model: nn.Module, name: str, linears: Linears) -> str | None:
    """Why a linear has no place in a mixture; None where it has."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    outside = not block_of(name) and any(block_of(other) for other in linears)
    if outside or linears[name] is head:
        return (
            "is a head or lies outside the model's blocks; it has no place in a mixture. "
            f"To train it whole, pass also_train=({name!r},)"
        )
    if name.split(".")[-1] == "dt_proj":
        return "is read by Mamba as a weight, not called: experts there would be skipped silently"
    return None


def _no_match(pattern: str, names: list[str]) -> str:
    ends = sorted({name.split(".")[-1] for name in names})
    near = get_close_matches(pattern.split(".")[-1], ends, n=3) or ends[:12]
    return f"{pattern!r} matches no module of this model; near or known names: {', '.join(near)}"
