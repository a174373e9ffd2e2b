"""What every strategy trains: converted tiny Llamas, the same global batch on any number of ranks, plain SGD.

SGD, since Adam does not see a gradient that is a constant factor too large. The rows are padded unequally, but so that
two ranks have equally many real tokens: then the mean of the ranks' losses is the loss of the whole batch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import molex
from tests.models import VOCABULARY, tiny

STEPS, ROWS, LENGTH = 3, 4, 9
PADDING = (3, 1, 0, 4)  # of each row; the halves sum to the same
LEARNING_RATE = 0.05

# case -> preset, overrides. dense base layers, all kinds of experts and routers, aux losses, balance biases
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixlora": ("mixlora", {"num_experts": 4, "rank": 4, "balance_coefficient": 0.1}),
    "mixdora": ("mixlora", {"num_experts": 4, "rank": 4, "balance_coefficient": 0.1, "experts": "dora"}),
    "mola": ("mola", {"num_experts": 3, "allocation": (2, 4), "rank": 4, "balance_coefficient": 0.1}),
    "flylora": ("flylora", {"num_experts": 16, "top_k": 4, "bias_rate": 0.01}),
    "moram": ("moram", {"temperature": 0.3}),
    "mos": ("mos", {"rank": 4, "pool_rank": 3}),
    "poly": ("poly", {"num_tasks": 3, "relaxed": False}),
    "xlora": ("xlora", {"num_experts": 3, "rank": 4, "head_dropout": 0.0}),
}


# DDP in float64, where the agreement is exact; sharded strategies in the precision that checkpoints are loaded in
DTYPES = {"ddp": torch.float64, "fsdp": torch.float32, "zero2": torch.float32, "zero3": torch.float32}


def build(case: str, dtype: torch.dtype) -> tuple[torch.nn.Module, molex.Mixture]:
    """A converted model in training mode, every trained and frozen factor random, the same on each call."""
    preset, overrides = CASES[case]
    torch.manual_seed(0)
    model = tiny("llama")
    mixture = molex.convert(model, molex.preset(preset, dropout=0.0, **overrides))
    model.to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if mixture.owns(name) and not name.endswith("magnitude"):
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model.train(), mixture


def batches(rank: int, world_size: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """This rank's rows of every step's batch, and their task ids."""
    generator = torch.Generator().manual_seed(1)
    own = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    mask_BS = torch.arange(LENGTH) < LENGTH - torch.tensor(PADDING)[:, None]
    steps = []
    for _ in range(STEPS):
        ids_BS = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
        tasks_B = torch.randint(0, 3, (ROWS,), generator=generator)
        batch = {
            "input_ids": ids_BS[own],
            "attention_mask": mask_BS[own].long(),
            "labels": ids_BS.where(mask_BS, -100)[own],
        }
        steps.append((batch, tasks_B[own]))
    return steps


def train(
    forward: Callable[..., Any],
    mixture: molex.Mixture,
    backward: Callable[[Tensor], None],
    update: Callable[[], None],
    rank: int = 0,
    world_size: int = 1,
) -> list[tuple[Tensor, Tensor]]:
    """The plain loop, `forward` being the wrapped model; returns each step's task loss and auxiliary loss."""
    losses = []
    for batch, tasks_B in batches(rank, world_size):
        mixture.set_tasks(tasks_B)
        labels_BS = batch.pop("labels")
        logits_BSV = forward(**batch, use_cache=False).logits  # transformers' own loss is float32
        task_loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())
        aux_loss = mixture.aux_loss()
        backward(task_loss + aux_loss)
        update()
        mixture.step()
        losses.append((task_loss.detach(), aux_loss.detach()))
    return losses


@torch.no_grad()
def logits(mixture: molex.Mixture) -> Tensor:
    """The first batch's logits, in evaluation mode."""
    batch, tasks_B = batches(0, 1)[0]
    mixture.set_tasks(tasks_B)
    return mixture.model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
