"""DPO of a mixture against its own base."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOTrainer

import molex
from molex.errors import ConfigError
from molex.training import MixtureDPOConfig, MixtureDPOTrainer
from molex.workbench import load_tokenizer
from molex.workbench.tokenizer import VOCABULARY_SIZE
from tests.models import tiny
from tests.training.small import mixture_of, quick

BETA = 0.5


def preferences(num_rows: int = 6) -> Dataset:
    answers = ["AB", "NO", "X", "YES", "Q", "WHY"]
    rows = [
        {"prompt": f"upper: {a.lower()}\n= ", "chosen": a, "rejected": a.lower() * 2, "task_ids": i % 2}
        for i, a in enumerate(answers)
    ]
    return Dataset.from_list(rows[:num_rows])


def dpo(mixture: molex.Mixture, folder: Path, **arguments: Any) -> MixtureDPOTrainer:
    args = MixtureDPOConfig(str(folder), beta=BETA, **quick(**{"max_steps": 4, "learning_rate": 5e-2, **arguments}))
    return MixtureDPOTrainer(
        mixture.model,
        args,
        train_dataset=preferences(),
        eval_dataset=preferences(2),
        processing_class=load_tokenizer(),
    )


def logps_by_hand(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Σ log p of each row's completion."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    with torch.no_grad():
        log_p = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].double().log_softmax(-1)
    return (log_p.gather(2, ids[:, 1:, None])[..., 0] * mask).sum(1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_starts_at_log_two_and_falls(checkpointing: bool, tmp_path: Path) -> None:
    mixture = mixture_of("mixlora", awake=False, num_experts=4, balance_coefficient=0.0)
    trainer = dpo(mixture, tmp_path, max_steps=12, activation_checkpointing=checkpointing)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.9 * losses[0]


def test_the_reference_is_the_base(tmp_path: Path) -> None:
    mixture = mixture_of("mixlora", num_experts=4)  # awake: the policy is not the base
    trainer = dpo(mixture, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    base = tiny("llama", vocab_size=VOCABULARY_SIZE, max_position_embeddings=256)
    policy, reference = (logps_by_hand(model, batch) for model in (mixture.model.eval(), base))
    assert (policy - reference).abs().min() > 1e-2
    inputs = {name: value for name, value in batch.items() if name != "task_ids"}
    torch.testing.assert_close(
        torch.cat(trainer.compute_ref_log_probs(mixture.model, inputs)).double(), reference, rtol=1e-5, atol=1e-4
    )
    chosen, rejected = (policy - reference).chunk(2)
    by_hand = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
    with torch.no_grad():
        loss = trainer.compute_loss(mixture.model, trainer._prepare_inputs(batch))
    assert float(loss) == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize("precompute", [False, True])
def test_evaluates_reports_routing_and_takes_precomputed_references(precompute: bool, tmp_path: Path) -> None:
    mixture = mixture_of("mixlora", num_experts=4)
    trainer = dpo(mixture, tmp_path, precompute_ref_log_probs=precompute)
    assert ("ref_chosen_logps" in trainer.train_dataset.column_names) == precompute
    trainer.train()
    metrics = trainer.evaluate()
    again = trainer.evaluate(preferences(2))
    assert metrics["eval_loss"] == pytest.approx(again["eval_loss"], rel=1e-4)
    assert metrics["eval_aux_loss"] > 0
    assert all("routing/entropy" in row for row in trainer.state.log_history if "loss" in row)


def test_both_precomputed_and_live_references_are_the_base(tmp_path: Path) -> None:
    losses = []
    for precompute in (False, True):
        trainer = dpo(mixture_of("mixlora", num_experts=4, dropout=0.0), tmp_path, precompute_ref_log_probs=precompute)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_task_ids_reach_chosen_and_rejected(tmp_path: Path) -> None:
    trainer = dpo(mixture_of("mtlora", num_experts=3), tmp_path)
    trainer.train()
    tasks = next(iter(trainer.get_train_dataloader()))["task_ids"]
    assert torch.equal(tasks[:2], tasks[2:])


@pytest.mark.parametrize("sync", [False, True])
def test_another_reference_is_refused(sync: bool, tmp_path: Path) -> None:
    mixture, args = mixture_of("mola"), MixtureDPOConfig(str(tmp_path), sync_ref_model=sync, **quick())
    with pytest.raises(ConfigError, match="the reference is the mixture's own base"):
        MixtureDPOTrainer(
            mixture.model,
            args,
            ref_model=None if sync else tiny("llama"),
            train_dataset=preferences(2),
            processing_class=load_tokenizer(),
        )


def test_stock_dpo_trainer_looks_for_a_second_model(tmp_path: Path) -> None:
    args = MixtureDPOConfig(str(tmp_path), **quick(max_steps=1))
    with pytest.raises(OSError, match=r"."):
        DPOTrainer(
            mixture_of("mixlora", num_experts=4).model,
            args=args,
            train_dataset=preferences(),
            processing_class=load_tokenizer(),
        )
