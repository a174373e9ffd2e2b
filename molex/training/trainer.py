"""MixtureTrainer: transformers' Trainer for mixtures."""

from transformers import Trainer

from molex.training.mixin import MixtureTrainerMixin


class MixtureTrainer(MixtureTrainerMixin, Trainer):
    """Used as Trainer is; args may be MixtureTrainingArguments."""
