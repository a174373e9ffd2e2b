"""A plain training loop on the workbench: what the demo and the comparison of methods run.

For real work use the trainers of molex.training; this loop is the shortest complete one:
forward, task loss + auxiliary losses, backward, optimizer, balance biases.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from molex.mixture import Mixture
from molex.workbench.data import collate


@dataclass(frozen=True, kw_only=True)
class Run:
    """steps × batch_size rows; AdamW with a cosine schedule after a short warm-up. task_types: how many values the task
    ids are folded to (LoRAMoE's types are 2)."""

    steps: int
    batch_size: int = 48
    learning_rate: float = 5e-3
    task_types: int | None = None


def fit(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    run: Run,
    on_step: Callable[[int, float], bool | None] = lambda step, loss: None,
) -> list[float]:
    """Trains on rows in their order and returns the task loss of every step; on_step may return True to stop."""
    model, parameters = mixture.model, mixture.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=run.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, run.steps // 20), run.steps)
    model.train()
    losses = []
    for step in range(run.steps):
        batch_rows = [rows[i % len(rows)] for i in range(step * run.batch_size, (step + 1) * run.batch_size)]
        batch = collate(batch_rows, tokenizer)
        mixture.set_tasks(task_ids(batch_rows, batch["input_ids"].shape[1], run.task_types))
        task_loss = model(**batch, use_cache=False).loss
        (task_loss + mixture.aux_loss()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mixture.step()
        losses.append(task_loss.item())
        if on_step(step, losses[-1]):
            break
        model.train()
    model.eval()
    mixture.set_tasks(None)
    return losses


def task_ids(rows: Sequence[Mapping[str, Any]], length: int, task_types: int | None = None) -> Tensor:
    """The rows' tasks (B,), folded to fewer types where a method knows only so many; (B, length) where a row has a
    list, one for each of its tokens: -1 is none, as for padding."""
    tasks = [row["task_ids"] for row in rows]
    ids = torch.tensor([-1 if isinstance(own, list) else own for own in tasks])
    if any(isinstance(own, list) for own in tasks):
        ids = ids[:, None].repeat(1, length)
        for row, own in enumerate(tasks):
            if isinstance(own, list):
                ids[row, : len(own)] = torch.tensor(own)
    return ids if task_types is None else torch.where(ids < 0, ids, ids % task_types)
