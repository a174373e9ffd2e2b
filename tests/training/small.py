"""Tiny mixtures, rows and trainers for the training tests, and trainers that remember what they were fed."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments

import molex
from molex.training import (
    MixtureSFTConfig,
    MixtureSFTTrainer,
    MixtureTrainer,
    MixtureTrainingArguments,
)
from molex.workbench import load_tokenizer
from molex.workbench.tokenizer import VOCABULARY_SIZE
from tests.models import tiny

WORDS = ["reverse abc", "upper no", "sort the letters of this", "x", "double aa", "ends of a word", "min 3 1 2", "yes"]


def mixture_of(preset: str, dtype: torch.dtype = torch.float32, awake: bool = True, **overrides: Any) -> molex.Mixture:
    """A tiny Llama as a mixture of byte-level vocabulary; awake: its experts are not zero any more."""
    model = tiny("llama", vocab_size=VOCABULARY_SIZE, max_position_embeddings=256).to(dtype)
    torch.manual_seed(1)
    mixture = molex.convert(model, molex.preset(preset, **overrides))
    if awake:
        for layer in mixture.layers.values():
            for parameter in layer.experts.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.1)
    return mixture


def texts(num_rows: int = 8, tasks: list[Any] | None = None) -> Dataset:
    """Rows of text of unlike lengths, with a task_ids column where asked."""
    rows = {"text": [WORDS[i % len(WORDS)] for i in range(num_rows)]}
    return Dataset.from_dict(rows if tasks is None else {**rows, "task_ids": tasks[:num_rows]})


def tokenised(dataset: Dataset) -> Dataset:
    """What plain Trainer takes."""
    tokenizer = load_tokenizer()

    def one(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(row["text"] + tokenizer.eos_token)["input_ids"]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}

    return dataset.map(one, remove_columns=["text"])


def quick(**overrides: Any) -> dict[str, Any]:
    """Arguments of a silent run on the CPU that logs every step, clips nothing and keeps its rate."""
    return {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "activation_checkpointing": False,
        **overrides,
    }


def trainer_of(
    kind: str, mixture: molex.Mixture, folder: Path, data: Dataset, eval_data: Dataset | None = None, **overrides: Any
) -> "Recording":
    """kind "trainer" or "sft": the same rows through either; further overrides are arguments."""
    settings = quick(output_dir=str(folder), **overrides)
    tokenizer = load_tokenizer()
    if kind == "sft":
        return RecordingSFT(
            mixture.model,
            args=MixtureSFTConfig(**settings),
            train_dataset=data,
            eval_dataset=eval_data,
            processing_class=tokenizer,
        )
    return RecordingTrainer(
        mixture.model,
        args=MixtureTrainingArguments(**settings),
        train_dataset=tokenised(data),
        eval_dataset=None if eval_data is None else tokenised(eval_data),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


class Recording:
    """Mixed into a trainer: `seen` are the micro-batches, `tasks` what the mixture was told, `gradients` those of the
    last optimizer step."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen: list[dict[str, Any]] = []
        self.tasks: list[Tensor | None] = []
        self.loads: list[dict[str, Tensor]] = []
        self.gradients: dict[str, Tensor] = {}
        self.add_callback(_Gradients(self))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.seen.append({name: value for name, value in inputs.items() if name != "use_cache"})
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.loads.append({name: stats.counts for name, stats in self.mixture.stats().items()})
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        if self.model.training:
            self.tasks.append(self.mixture.state.tasks)
        return prepared

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.state.log_history if "loss" in row]


class _Gradients(TrainerCallback):
    def __init__(self, trainer: Recording):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        named = self.trainer.mixture.model.named_parameters()
        self.trainer.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


class RecordingTrainer(Recording, MixtureTrainer):
    pass


class RecordingSFT(Recording, MixtureSFTTrainer):
    pass
