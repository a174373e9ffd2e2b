"""What TRL prepares, packs and masks, with task ids that stay beside their tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from molex.errors import StateError
from molex.training.tasks import NO_TASK
from molex.workbench import load_tokenizer
from tests.training.small import mixture_of, quick, texts, trainer_of

LETTERS = "xyz"  # the text of task i is made of letter i alone, so that every token tells its task
PACKINGS = {
    "plain": {},
    "truncated": {"max_length": 5},
    "kept end": {"max_length": 5, "truncation_mode": "keep_end"},
    "bfd": {"packing": True, "max_length": 16},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 6},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    "padding_free": {"padding_free": True, "max_length": None},
    "padding_free, padded to 8": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8},
}


def telling(num_rows: int = 12) -> Dataset:
    lengths = [3, 9, 1, 6, 4, 11, 2, 5, 8, 3, 7, 10]
    rows = [{"text": LETTERS[i % 3] * lengths[i], "task_ids": i % 3} for i in range(num_rows)]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("arguments", PACKINGS.values(), ids=PACKINGS)
def test_every_token_has_the_task_of_its_text(arguments: dict[str, Any], tmp_path: Path) -> None:
    mixture = mixture_of("mtlora", num_experts=4)
    trainer = trainer_of("sft", mixture, tmp_path, telling(), telling(3), num_train_epochs=1, **arguments)
    trainer.train()
    assert _letters_checked(trainer) >= 30
    trainer.evaluate()  # which mtlora refuses where no task arrives


@pytest.mark.parametrize("name", ["plain", "bfd", "wrapped"])
def test_streamed_tokens_have_the_tasks_of_their_texts(name: str, tmp_path: Path) -> None:
    stream = telling().to_iterable_dataset()
    trainer = trainer_of("sft", mixture_of("mtlora", num_experts=4), tmp_path, stream, max_steps=3, **PACKINGS[name])
    trainer.train()
    assert _letters_checked(trainer) >= 15


def test_per_token_ids_pass_through_and_are_cut_with_their_tokens(tmp_path: Path) -> None:
    rows = [{"input_ids": [120, 121, 122, 120, 121, 122, 122], "task_ids": [0, 1, 2, 0, 1, 2, 2]} for _ in range(4)]
    for arguments in ({}, {"max_length": 5}, {"max_length": 4, "truncation_mode": "keep_end"}, PACKINGS["bfd_split"]):
        mixture = mixture_of("mtlora", num_experts=4)
        trainer = trainer_of("sft", mixture, tmp_path, Dataset.from_list(rows), max_steps=2, **arguments)
        trainer.train()
        assert _letters_checked(trainer) >= 16


def test_stock_sft_trainer_drops_task_ids(tmp_path: Path) -> None:
    args = SFTConfig(str(tmp_path), max_steps=1, **quick())
    model = mixture_of("mtlora", num_experts=4).model
    trainer = SFTTrainer(model, args=args, train_dataset=telling(), processing_class=load_tokenizer())
    with pytest.raises(StateError, match="task"):
        trainer.train()


def test_a_batch_without_task_ids_does_not_keep_the_last_ones(tmp_path: Path) -> None:
    trainer = trainer_of("sft", mixture_of("mtlora", num_experts=4), tmp_path, telling(4), texts(4), max_steps=1)
    trainer.train()
    with pytest.raises(StateError, match="task"):
        trainer.evaluate()


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing_keeps_the_sequences_apart_in_the_losses_that_want_them(strategy: str, tmp_path: Path) -> None:
    """MeteoRA's task loss does not cross from one packed sequence to the next; wrapped packing knows no sequences."""
    mixture = mixture_of("meteora", num_experts=3, rank=4, top_k=2)
    arguments = {"packing": True, "packing_strategy": strategy, "max_length": 16, "max_steps": 2}
    trainer = trainer_of("sft", mixture, tmp_path, telling(), **arguments)
    trainer.train()
    segments = next(iter(mixture.state.trace.values())).context.segment_ids
    assert (segments is not None) == (strategy == "bfd")
    if segments is not None:
        starts = (trainer.seen[-1]["position_ids"][0] == 0).nonzero().flatten()
        assert torch.equal((segments.diff() > 0).nonzero().flatten() + 1, starts[1:])
        assert len(starts) > 1
    assert trainer.state.log_history[0]["aux_loss"] > 0


def test_prompts_are_left_out_of_the_loss_and_kept_in_the_routing(tmp_path: Path) -> None:
    rows = [{"prompt": "upper: ab\n= ", "completion": "AB"}, {"prompt": "upper: xyz\n= ", "completion": "XYZ"}]
    trainer = trainer_of("sft", mixture_of("mixlora"), tmp_path, Dataset.from_list(rows), max_steps=1)
    trainer.train()
    _assert_trained_on(trainer.seen[0], {"AB<eos>", "XYZ<eos>"})
    assert _routed_tokens(trainer) == int(trainer.seen[0]["attention_mask"].sum())


def test_assistant_only_loss_trains_on_what_the_assistant_says(tmp_path: Path) -> None:
    turns = [("user", "ab"), ("assistant", "AB"), ("user", "c"), ("assistant", "C")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 2
    mixture = mixture_of("mixlora")
    trainer = trainer_of("sft", mixture, tmp_path, Dataset.from_list(rows), max_steps=1, assistant_only_loss=True)
    trainer.train()
    _assert_trained_on(trainer.seen[0], {"AB<eos>C<eos>"})
    assert any(gradient.any() for name, gradient in trainer.gradients.items() if ".router." in name)


def _letters_checked(trainer: Any) -> int:
    """Compares the ids the mixture was given with those the tokens tell; how many tokens told one."""
    checked = 0
    for batch, tasks in zip(trainer.seen, trainer.tasks, strict=True):
        ids_BS = batch["input_ids"]
        given_BS = tasks[:, None].expand_as(ids_BS) if tasks.dim() == 1 else tasks
        for task, letter in enumerate(LETTERS):
            assert (given_BS[ids_BS == ord(letter)] == task).all()
            checked += int((ids_BS == ord(letter)).sum())
        if tasks.dim() == 2:
            assert (given_BS[ids_BS == 256] == NO_TASK).all()
    return checked


def _assert_trained_on(batch: dict[str, Tensor], expected: set[str]) -> None:
    tokenizer = load_tokenizer()
    assert {tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]} == expected


def _routed_tokens(trainer: Any) -> int:
    load = next(load for name, load in trainer.loads[0].items() if name.endswith("gate_proj"))
    return int(load.sum()) // trainer.mixture.config.router.top_k
