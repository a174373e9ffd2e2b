"""What training a mixture adds to transformers' TrainingArguments: fields that also are flags and YAML keys."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from molex.errors import ConfigError

RoutingLogs = Literal["summary", "blocks", "layers"]


@dataclass
class MixtureArguments:
    """Inherit it beside TrainingArguments or one of its children; a trainer given plain arguments uses the defaults."""

    router_learning_rate: float | None = field(
        default=None, metadata={"help": "The routers' learning rate; by default that of the experts, learning_rate."}
    )
    routing_logs: RoutingLogs = field(
        default="summary",
        metadata={"help": "What is logged of the routing: a summary, or each transformer block or layer as well."},
    )

    def __post_init__(self) -> None:
        """transformers renamed gradient_checkpointing; both names are taken here, without its warning (TRL's own
        default uses the old one). Raises ConfigError on a value out of range."""
        if self.router_learning_rate is not None and self.router_learning_rate < 0:
            raise ConfigError(f"router_learning_rate={self.router_learning_rate} must not be negative")
        if self.routing_logs not in RoutingLogs.__args__:
            raise ConfigError(f"routing_logs={self.routing_logs!r}; choose from {', '.join(RoutingLogs.__args__)}")
        for suffix in ("", "_kwargs"):
            old, new = f"gradient_checkpointing{suffix}", f"activation_checkpointing{suffix}"
            if getattr(self, new, False) is None:
                setattr(self, new, getattr(self, old))
        super().__post_init__()  # type: ignore[misc]


@dataclass
class MixtureTrainingArguments(MixtureArguments, TrainingArguments):
    """TrainingArguments of a mixture."""
