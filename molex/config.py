"""MixtureConfig: everything that makes a mixture, as frozen dataclasses that become JSON and come back.

Each router, expert kind and loss has a config of its own beside its class; this one assembles them. Overrides are
flat: every setting has one name, wherever it lives, in Python, YAML and flags (`num_experts`, `top_k`, ...).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from molex.checks import check_choice, check_settings, near_and_known
from molex.errors import ConfigError
from molex.experts import ExpertsConfig, expert_kinds
from molex.experts.lora import LoRAConfig
from molex.losses import Loss, losses
from molex.registry import Registry
from molex.routers import RouterConfig, routers
from molex.routers.constant import ConstantConfig

Scaling = Literal["alpha/rank", "alpha/sqrt(rank)", "alpha/num_experts", "alpha"]


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """What to convert, how many experts of what kind, who routes them, which losses train the router.

    targets / plain_targets: roles or module-name patterns (molex.architectures); plain ones get one ordinary LoRA.
    scope "linear": every linear routes itself; "ffn": the linears of a feed-forward block share one routing.
    num_experts, allocation: see molex.allocation. rank, alpha: one for all experts, or one for each.
    scaling: what an expert is multiplied by. also_train: modules trained and saved whole; also_keep: saved whole, not
    trained. train_experts False: only routers train.
    """

    method: str = "custom"
    targets: tuple[str, ...] = ("all",)
    plain_targets: tuple[str, ...] = ()
    also_train: tuple[str, ...] = ()
    also_keep: tuple[str, ...] = ()
    scope: Literal["linear", "ffn"] = "linear"
    num_experts: int = 1
    allocation: str | tuple[int, ...] | None = None
    rank: int | tuple[int, ...] = 8
    alpha: float | tuple[float, ...] = 16.0
    scaling: Scaling = "alpha/rank"
    dropout: float = 0.0
    experts: ExpertsConfig = field(default_factory=LoRAConfig)
    router: RouterConfig = field(default_factory=ConstantConfig)
    losses: tuple[Loss, ...] = ()
    train_experts: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        patterns = ("targets", "plain_targets", "also_train", "also_keep")
        for name in (*patterns, "allocation", "rank", "alpha", "losses"):  # JSON and YAML have lists for tuples
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif isinstance(value, str) and name in patterns:
                object.__setattr__(self, name, (value,))
        check_choice("scope", self.scope, ("linear", "ffn"))
        check_choice("scaling", self.scaling, Scaling.__args__)
        if not isinstance(self.num_experts, int) or self.num_experts < 1:
            raise ConfigError(f"num_experts={self.num_experts!r}: a whole number, at least 1")
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        if not ranks or any(not isinstance(rank, int) or rank < 1 for rank in ranks):
            raise ConfigError(f"rank={self.rank!r}: whole numbers, at least 1")
        alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)
        if not all(alpha > 0 for alpha in alphas):
            raise ConfigError(f"alpha={self.alpha!r}: numbers above 0; experts of scale 0 would add nothing")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must be in [0, 1)")

    def ranks(self, num_experts: int) -> tuple[int, ...]:
        """Each expert's rank. Raises ConfigError where a list of ranks has another length."""
        return _per_expert("rank", self.rank, num_experts)

    def scales(self, num_experts: int) -> tuple[float, ...]:
        """Each expert's scale."""
        return self.scales_of(self.ranks(num_experts))

    def scales_of(self, ranks: tuple[int, ...]) -> tuple[float, ...]:
        """The scales of experts of these ranks. Raises ConfigError where a list of alphas has another length."""
        num_experts = len(ranks)
        alphas = _per_expert("alpha", self.alpha, num_experts)
        divisors = {
            "alpha/rank": ranks,
            "alpha/sqrt(rank)": [rank**0.5 for rank in ranks],
            "alpha/num_experts": [num_experts] * num_experts,
            "alpha": [1] * num_experts,
        }[self.scaling]
        return tuple(float(alpha / divisor) for alpha, divisor in zip(alphas, divisors, strict=True))

    def override(self, overrides: Mapping[str, Any]) -> "MixtureConfig":
        """A copy with flat settings changed, each in every part that has it. Raises ConfigError on unknown names."""
        own = {f.name for f in dataclasses.fields(self)}
        parts: dict[str, Any] = {"router": self.router, "experts": self.experts, "losses": self.losses}
        for kind, registry in (("router", routers), ("experts", expert_kinds)):
            if kind in overrides:
                parts[kind] = _part(overrides[kind], registry)
        parts["losses"] = _losses(overrides.get("losses", self.losses))
        rest = {name: value for name, value in overrides.items() if name not in parts}
        if "num_experts" in rest:  # a bare number means the same number everywhere
            rest.setdefault("allocation", None)
        known = own | _settings(parts["router"], parts["experts"], *parts["losses"])
        for name in rest:
            if name not in known:
                raise ConfigError(f"{self.method} has no setting {name!r}{near_and_known(name, sorted(known))}")
        of_its_own = {name: value for name, value in rest.items() if name in own}
        check_settings(type(self), of_its_own)
        return dataclasses.replace(
            self,
            router=_changed(parts["router"], rest),
            experts=_changed(parts["experts"], rest),
            losses=tuple(_changed(loss, rest) for loss in parts["losses"]),
            **of_its_own,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` inverts it."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["router"] = _named(self.router, routers)
        plain["experts"] = _named(self.experts, expert_kinds)
        plain["losses"] = [_named(loss, losses) for loss in self.losses]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "MixtureConfig":
        """Raises ConfigError on unknown keys and kinds."""
        values = dict(plain)
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"unknown keys in a mixture's configuration: {', '.join(sorted(unknown))}")
        for name, registry in (("router", routers), ("experts", expert_kinds)):
            if name in values:
                values[name] = _part(values[name], registry)
        values["losses"] = _losses(values.get("losses", ()))
        check_settings(cls, values)
        return cls(**values)


def part_settings(config: MixtureConfig) -> dict[str, Any]:
    """The settings of a configuration's router, experts and losses, flat, with their values."""
    parts = (config.router, config.experts, *config.losses)
    return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}


def _per_expert(name: str, value: Any, num_experts: int) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        return (value,) * num_experts
    if len(value) != num_experts:
        raise ConfigError(f"{name} has {len(value)} entries for {num_experts} experts")
    return value


def _settings(*parts: Any) -> set[str]:
    return {f.name for part in parts for f in dataclasses.fields(part)}


def _changed(part: Any, overrides: Mapping[str, Any]) -> Any:
    own = {name: value for name, value in overrides.items() if name in _settings(part)}
    check_settings(type(part), own)
    return dataclasses.replace(part, **own) if own else part


def _named(part: Any, registry: Registry[Any]) -> dict[str, Any]:
    return {"kind": registry.name_of(type(part)), **dataclasses.asdict(part)}


def _part(value: Any, registry: Registry[Any]) -> Any:
    """A config object from itself, from a registered name, or from its JSON form."""
    if isinstance(value, str):
        return registry[value]()
    if not isinstance(value, Mapping):
        if not any(type(value) is registry[name] for name in registry):
            raise ConfigError(f"{value!r} is no {registry.kind}; give a name, a configuration or its JSON form")
        return value
    settings = {name: setting for name, setting in value.items() if name != "kind"}
    part_type = registry[value.get("kind", "")]
    unknown = set(settings) - {f.name for f in dataclasses.fields(part_type)}
    if unknown:
        raise ConfigError(f"{registry.kind} {value['kind']!r} has no setting {', '.join(sorted(unknown))}")
    check_settings(part_type, settings)
    return part_type(**settings)


def _losses(values: Any) -> tuple[Loss, ...]:
    if not isinstance(values, tuple | list):
        raise ConfigError(f"losses={values!r}: give a list of losses; known: {', '.join(losses)}")
    return tuple(_part(loss, losses) for loss in values)
