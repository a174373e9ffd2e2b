"""Task ids on their way from a data set's `task_ids` column to the batch: through collators and through packing.

A row's task_ids is one number for the sequence, or a list with one for each token. Collators drop columns they do not
know, and packing joins rows, so the ids are taken out before a collator and laid over what it made.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from molex.errors import ConfigError

TASKS = "task_ids"
NO_TASK = 0  # at padding, where the token mask makes it irrelevant

Example = dict[str, Any]


class TaskCollator:
    """Wraps a collator: `task_ids` arrives in the batch as (B,), or as (B, S) where tokens differ."""

    def __init__(self, collator: Callable[[list[Example]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        if not examples or TASKS not in examples[0]:
            return self.collator(examples)
        tasks = [example[TASKS] for example in examples]
        rest = [{key: value for key, value in example.items() if key != TASKS} for example in examples]
        batch = self.collator(rest)
        return {**batch, TASKS: lay_over(batch, tasks, [len(row["input_ids"]) for row in rest if "input_ids" in row])}


def lay_over(batch: dict[str, Any], tasks: Sequence[int | Sequence[int]], lengths: Sequence[int]) -> Tensor:
    """Task ids for a collated batch: (B,) or (B, S). A preference batch holds every row twice.

    Raises ConfigError where the ids do not fit the tokens.
    """
    num_rows, length = batch["input_ids"].shape
    if num_rows % len(tasks) == 0 and all(not isinstance(task, Sequence | Tensor) for task in tasks):
        return torch.as_tensor(tasks).repeat(num_rows // len(tasks))
    flat = torch.cat([per_token(task, n) for task, n in zip(tasks, lengths, strict=True)])
    mask_BS = batch.get("attention_mask")
    if mask_BS is None:
        mask_BS = (torch.arange(num_rows * length) < len(flat)).view(num_rows, length)
    if int((mask_BS != 0).sum()) != len(flat):
        raise ConfigError(f"{len(flat)} task ids for a batch of {int((mask_BS != 0).sum())} tokens; give one per token")
    tasks_BS = torch.full((num_rows, length), NO_TASK)
    tasks_BS[mask_BS != 0] = flat
    return tasks_BS


def per_token(task: int | Sequence[int], length: int) -> Tensor:
    """One id for each of `length` tokens."""
    ids = torch.as_tensor(task)
    if ids.dim() == 0:
        return ids.repeat(length)
    if len(ids) != length:
        raise ConfigError(f"a row has {length} tokens and {len(ids)} task ids; give one number, or one per token")
    return ids
