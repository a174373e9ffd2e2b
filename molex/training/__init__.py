"""Training: one mixin that makes transformers' Trainer and TRL's trainers train mixtures, and the data formats.

from molex.training import MixtureSFTConfig, MixtureSFTTrainer
trainer = MixtureSFTTrainer(mixture.model, args=MixtureSFTConfig("out", router_learning_rate=1e-3), train_dataset=...)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molex.training.arguments import MixtureArguments, MixtureTrainingArguments
    from molex.training.dpo import MixtureDPOConfig, MixtureDPOTrainer
    from molex.training.mixin import MixtureTrainerMixin
    from molex.training.sft import MixtureSFTConfig, MixtureSFTTrainer
    from molex.training.trainer import MixtureTrainer

# loaded when first used: TRL is imported only by who trains with it
_HOMES = {
    "MixtureArguments": "molex.training.arguments",
    "MixtureTrainingArguments": "molex.training.arguments",
    "MixtureTrainerMixin": "molex.training.mixin",
    "MixtureTrainer": "molex.training.trainer",
    "MixtureSFTConfig": "molex.training.sft",
    "MixtureSFTTrainer": "molex.training.sft",
    "MixtureDPOConfig": "molex.training.dpo",
    "MixtureDPOTrainer": "molex.training.dpo",
}

__all__ = [
    "MixtureArguments",
    "MixtureDPOConfig",
    "MixtureDPOTrainer",
    "MixtureSFTConfig",
    "MixtureSFTTrainer",
    "MixtureTrainer",
    "MixtureTrainerMixin",
    "MixtureTrainingArguments",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'molex.training' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
