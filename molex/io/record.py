"""What molex_config.json says: enough to rebuild a mixture's layers before any tensor is read, and to refuse a
wrong base.

    format_version, molex_version
    base           name, class, model_type, dtype, sizes; whether the same folder holds it
    config         MixtureConfig.to_dict()
    experts        the experts' names
    also_trained   modules saved whole
    num_parameters stored and base
    origins        of experts that came from adapters: their adapter_config.json, and the dtype they were stored in
    layers         name -> shape and number of experts; ranks, names, frozen, stage where they are not the config's
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from typing import Any

from torch import nn

import molex
from molex.config import MixtureConfig
from molex.distributed import num_elements
from molex.errors import CheckpointError, MolexError
from molex.io.hub import source_of
from molex.layer import MixtureLinear
from molex.mixture import Mixture
from molex.routers.staged import StagedRouter

FORMAT_VERSION = 1
CONFIG_FILE = "molex_config.json"
TENSOR_FILE = "molex.safetensors"
CARD_FILE = "README.md"

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings")


@dataclass(frozen=True, kw_only=True)
class BaseRecord:
    """Which model a mixture was made on. `included`: its weights lie in the same folder. `quantization`: the method of
    a quantised one, such as "bitsandbytes"."""

    name_or_path: str
    class_name: str
    model_type: str
    dtype: str
    sizes: dict[str, int] = field(default_factory=dict)
    included: bool = False
    quantization: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.sizes, dict):
            raise TypeError(f"{self.sizes!r} are no sizes of a base")


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """One converted layer. ranks, names, stage: None where they are what the config says. frozen: how many experts
    `mixture.grow` has frozen."""

    in_features: int
    out_features: int
    num_experts: int
    ranks: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None
    stage: str | None = None
    frozen: int = 0

    def __post_init__(self) -> None:
        for number in (self.in_features, self.out_features, self.num_experts, self.frozen, *(self.ranks or ())):
            if not isinstance(number, int) or number < 0:
                raise TypeError(f"{number!r} in a layer's record is no count")
        if not isinstance(self.names, tuple | None):
            raise TypeError(f"{self.names!r} are no names of a layer's experts")


@dataclass(frozen=True, kw_only=True)
class MixtureRecord:
    """The whole file."""

    base: BaseRecord
    config: MixtureConfig
    experts: tuple[str, ...]
    also_trained: tuple[str, ...]
    num_parameters: dict[str, int]
    layers: dict[str, LayerRecord]
    origins: dict[str, dict[str, Any]] = field(default_factory=dict)
    molex_version: str = molex.__version__

    def __post_init__(self) -> None:
        if not isinstance(self.experts, tuple) or not isinstance(self.origins, dict):
            raise TypeError(f"{self.experts!r} and {self.origins!r} are no experts and where they come from")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` inverts it."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        layers = {name: _without_defaults(layer) for name, layer in self.layers.items()}
        changed = {"base": asdict(self.base), "config": self.config.to_dict(), "layers": layers}
        # once through JSON, so that what is hashed is what a reader will find
        return json.loads(json.dumps({"format_version": FORMAT_VERSION, **plain, **changed}))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "MixtureRecord":
        """Raises CheckpointError on fields that are unknown, missing or of a wrong kind."""
        values = {name: value for name, value in document.items() if name != "format_version"}
        try:
            values["base"] = BaseRecord(**values["base"])
            values["config"] = MixtureConfig.from_dict(values["config"])
            values["layers"] = {name: LayerRecord(**_tuples(layer)) for name, layer in values["layers"].items()}
            return cls(**_tuples(values))
        except (KeyError, TypeError, ValueError, AttributeError, MolexError) as error:
            raise CheckpointError(f"{CONFIG_FILE} is damaged, or not of this molex: {error}") from error

    def ranks(self, layer: LayerRecord) -> tuple[int, ...]:
        """Each expert's rank in one layer."""
        return self.config.ranks(layer.num_experts) if layer.ranks is None else layer.ranks


def record_of(mixture: Mixture, included: bool = False) -> MixtureRecord:
    """Describes a living mixture."""
    counts = mixture.num_parameters()
    return MixtureRecord(
        base=base_record(mixture.model, included),
        config=mixture.config,
        experts=tuple(mixture.experts),
        also_trained=tuple(mixture.also_trained),
        num_parameters={"stored": counts["stored"], "base": counts["base"]},
        layers={name: _layer_record(layer, mixture) for name, layer in mixture.layers.items()},
        origins=mixture.origins,
    )


def base_record(model: nn.Module, included: bool = False) -> BaseRecord:
    """Describes a base, converted or not. Models without a transformers config are told by their class."""
    config = getattr(model, "config", None)
    class_name = type(model).__name__.removeprefix("FSDP")
    sizes = {name: getattr(config, name, None) for name in _SIZES}
    return BaseRecord(
        name_or_path=source_of(model),
        class_name=class_name,
        model_type=getattr(config, "model_type", None) or class_name,
        dtype=str(getattr(model, "dtype", "")).removeprefix("torch."),
        sizes={name: value for name, value in sizes.items() if isinstance(value, int)},
        included=included,
        quantization=_quantization(config),
    )


def _quantization(config: object) -> str:
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return "" if found is None else str(getattr(method, "value", method))


def digest(document: Mapping[str, Any]) -> str:
    """What ties the two files of one save together: everything but the base's name, which a user may correct."""
    rest = {name: value for name, value in document.items() if name not in ("base", "molex_version")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def frozen_experts(layer: MixtureLinear) -> int:
    """How many experts of a layer `mixture.grow` has frozen."""
    frozen_A = getattr(layer.experts, "frozen_A", None)
    num_columns = 0 if frozen_A is None else num_elements(frozen_A) // layer.in_features
    return sum(end <= num_columns for end in accumulate(layer.experts.ranks))


def _layer_record(layer: MixtureLinear, mixture: Mixture) -> LayerRecord:
    bank, config = layer.experts, mixture.config
    frozen = frozen_experts(layer)
    usual_ranks = frozen == 0 and bank.ranks == config.ranks(bank.num_experts)
    usual_names = bank.names == mixture.experts[: bank.num_experts]
    stage = layer.router.stage if isinstance(layer.router, StagedRouter) else None
    return LayerRecord(
        in_features=layer.in_features,
        out_features=layer.out_features,
        num_experts=bank.num_experts,
        ranks=None if usual_ranks else bank.ranks,
        names=None if usual_names else tuple(bank.names),
        stage=None if stage == getattr(config.router, "stage", None) else stage,
        frozen=frozen,
    )


def check_version(document: Mapping[str, Any]) -> None:
    """Raises CheckpointError on a file of no format of ours, or of a newer one."""
    version = document.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{CONFIG_FILE} has format_version {version!r}; it was not written by molex")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{CONFIG_FILE} is of format {version}, written by molex {document.get('molex_version')}; this molex "
            f"{molex.__version__} reads formats up to {FORMAT_VERSION}: upgrade molex"
        )


def _without_defaults(layer: LayerRecord) -> dict[str, Any]:
    return {f.name: value for f in fields(layer) if (value := getattr(layer, f.name)) != f.default}


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
