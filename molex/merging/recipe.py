"""A merge as a file says it, in the spirit of mergekit: base, adapters with weights, rule, what to write.

    base: path/of/base
    adapters:
      law: path/of/law                                 # or {path: ..., weight: ...}, see molex.merging.weights
      code: {path: path/of/code, weight: [0.2, 1.0]}
    rule: ties
    parameters: {density: 0.5}
    rank: 16                                           # or energy: 0.95
    as: lora                                           # or dense
    dtype: bfloat16
    shard_size: 5GB

`mixture: path` stands in the place of base and adapters; without a rule that is the exact merge. Flags of `molex merge`
have the same names.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from molex.checks import check_choice, near_and_known
from molex.errors import ConfigError
from molex.io.shards import num_bytes
from molex.merging.base import MergeRule, make_rule
from molex.merging.core import check_size
from molex.merging.weights import Weight, by_adapter

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_KEYS = {"as": "kind"}  # words of the file that Python does not allow as names


@dataclass(frozen=True, kw_only=True)
class MergeRecipe:
    """See the module's text. adapters: paths by name. weights: by name, None for the rule's own. Checked when made."""

    base: str = ""
    mixture: str = ""
    adapters: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, Weight] | None = None
    rule: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    energy: float | None = None
    kind: Literal["dense", "lora"] = "dense"
    dtype: str | None = None
    shard_size: int | str = "5GB"

    def __post_init__(self) -> None:
        if bool(self.mixture) == bool(self.base):
            raise ConfigError("say what is merged: a base and adapters, or a mixture, not both")
        if self.base and not self.adapters:
            raise ConfigError("a base without adapters: there is nothing to merge into it")
        if self.mixture and self.adapters:
            raise ConfigError("a mixture brings its own experts; leave adapters out")
        if self.parameters and self.rule is None:
            raise ConfigError(f"parameters={dict(self.parameters)} are a rule's; name the rule")
        check_choice("as", self.kind, ("dense", "lora"))
        check_choice("dtype", self.dtype, (None, *_DTYPES))
        check_size(self.rank, self.energy)
        num_bytes(self.shard_size)
        if self.adapters and self.weights is not None:
            by_adapter(self.weights, list(self.adapters))
        if self.rule is not None:
            make_rule(self.rule, self.parameters)

    def ready_rule(self) -> MergeRule | None:
        """The rule; of adapters "linear" where none is named, of a mixture None, the exact merge."""
        if self.rule is None:
            return None if self.mixture else make_rule("linear")
        return make_rule(self.rule, self.parameters)

    def torch_dtype(self) -> torch.dtype | None:
        return None if self.dtype is None else _DTYPES[self.dtype]

    def to_yaml(self) -> str:
        """As `read_recipe` reads it, with every setting as resolved."""
        plain: dict[str, Any] = {"mixture": self.mixture} if self.mixture else {"base": self.base}
        if self.adapters:
            weights = self.weights or {}
            plain["adapters"] = {
                name: {"path": path, **({"weight": weights[name]} if name in weights else {})}
                for name, path in self.adapters.items()
            }
        elif self.weights is not None:
            plain["weights"] = dict(self.weights)
        rule = self.ready_rule()
        if rule is not None:
            plain |= {"rule": self.rule or "linear", "parameters": dataclasses.asdict(rule)}
        plain |= {"rank": self.rank, "energy": self.energy, "as": self.kind}
        plain |= {"dtype": self.dtype, "shard_size": self.shard_size}
        kept = {key: value for key, value in plain.items() if value is not None and value != {}}
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def read_recipe(path: Path, flags: Mapping[str, Any]) -> MergeRecipe:
    """A recipe's file; flags win. Raises ConfigError on a file that is no such YAML, and as `make_recipe` does."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if not isinstance(document, Mapping):
        raise ConfigError(f"{path} holds a {type(document).__name__}; give keys such as base, adapters, rule")
    values = {**document, **flags}
    settings, own = flags.get("parameters", {}), document.get("parameters")
    if flags.get("rule", document.get("rule")) != document.get("rule"):  # the file's settings are another rule's
        values["parameters"] = settings
    elif isinstance(own, Mapping):
        values["parameters"] = {**own, **settings}
    return make_recipe(values)


def make_recipe(plain: Mapping[str, Any]) -> MergeRecipe:
    """A recipe from a file's keys. Raises ConfigError on unknown ones, with the nearest, and on wrong values."""
    values = dict(plain)
    known = ["as" if f.name == "kind" else f.name for f in dataclasses.fields(MergeRecipe)]
    for key in values:
        if key not in known:
            raise ConfigError(f"a merge has no setting {key!r}{near_and_known(key, known)}")
    values = {_KEYS.get(key, key): value for key, value in values.items() if value is not None}
    for key, kind in (("base", str), ("mixture", str), ("rule", str), ("parameters", Mapping), ("adapters", Mapping)):
        if not isinstance(values.get(key, kind()) if kind is str else values.get(key, {}), kind):
            raise ConfigError(f"{key}={values[key]!r}: give {'a text' if kind is str else 'keys and values'}")
    if "adapters" in values:
        paths, weights = _adapters(values["adapters"])
        if weights and "weights" in values:
            raise ConfigError("weights are given twice: beside the adapters, and by themselves")
        values["adapters"] = paths
        if weights:
            values["weights"] = weights
    return MergeRecipe(**values)


def _adapters(given: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Weight]]:
    """Paths, and weights where they are given: of all, or of none."""
    paths: dict[str, str] = {}
    weights: dict[str, Weight] = {}
    for name, entry in given.items():
        own: Any = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(own, Mapping) or not isinstance(own.get("path"), str):
            raise ConfigError(f"adapter {name!r}: {entry!r}; give a path, or path: and weight:")
        for key in own:
            if key not in ("path", "weight"):
                raise ConfigError(f"adapter {name!r} has no setting {key!r}{near_and_known(key, ('path', 'weight'))}")
        paths[str(name)] = own["path"]
        if own.get("weight") is not None:
            weights[str(name)] = own["weight"]
    if weights and len(weights) < len(paths):
        missing = [name for name in paths if name not in weights]
        raise ConfigError(f"{', '.join(missing)} have no weight, others do; give all of them one, or none")
    return paths, weights
