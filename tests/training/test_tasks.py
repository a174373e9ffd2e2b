"""Task ids laid over collated batches."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening
from trl.trainer.dpo_trainer import DataCollatorForPreference

from molex.errors import ConfigError
from molex.training.tasks import TaskCollator
from molex.workbench import load_tokenizer


def rows(*pairs: tuple[int, Any]) -> list[dict[str, Any]]:
    return [{"input_ids": [9] * n, "labels": [9] * n, "task_ids": task} for n, task in pairs]


def padded(side: str) -> DataCollatorForSeq2Seq:
    tokenizer = load_tokenizer()
    tokenizer.padding_side = side
    return DataCollatorForSeq2Seq(tokenizer)


def test_one_id_for_each_sequence() -> None:
    batch = TaskCollator(padded("right"))(rows((3, 1), (2, 0)))
    assert torch.equal(batch["task_ids"], torch.tensor([1, 0]))
    assert batch["input_ids"].shape == (2, 3)


@pytest.mark.parametrize(("side", "second"), [("right", [4, 5, 0]), ("left", [0, 4, 5])])
def test_ids_of_tokens_are_padded_as_their_tokens_are(side: str, second: list[int]) -> None:
    batch = TaskCollator(padded(side))(rows((3, [1, 2, 3]), (2, [4, 5])))
    assert torch.equal(batch["task_ids"], torch.tensor([[1, 2, 3], second]))


def test_one_id_for_each_sequence_of_a_flattened_batch() -> None:
    batch = TaskCollator(DataCollatorWithFlattening(return_tensors="pt"))(rows((3, 1), (2, 0), (1, 2)))
    assert torch.equal(batch["task_ids"], torch.tensor([[1, 1, 1, 0, 0, 2]]))


def test_a_single_flattened_row_keeps_its_one_id() -> None:
    batch = TaskCollator(DataCollatorWithFlattening(return_tensors="pt"))(rows((3, 1)))
    assert torch.equal(batch["task_ids"], torch.tensor([1]))


def test_a_preference_batch_holds_every_row_twice() -> None:
    pairs = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3, 4], "task_ids": task} for task in (5, 6)]
    batch = TaskCollator(DataCollatorForPreference(pad_token_id=0))(pairs)
    assert torch.equal(batch["task_ids"], torch.tensor([5, 6, 5, 6]))
    assert batch["input_ids"].shape == (4, 3)


def test_rows_without_ids_are_left_alone() -> None:
    batch = TaskCollator(padded("right"))([{"input_ids": [1, 2], "labels": [1, 2]}])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert isinstance(batch["input_ids"], Tensor)


def test_ids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 tokens and 2 task ids"):
        TaskCollator(padded("right"))(rows((3, [1, 2])))
