"""A learning rate for the routers of their own: the optimizer's groups, split.

Everything else about a group (weight decay above all) stays as the Trainer decided.
"""

import torch
from torch import nn

from molex.errors import ConfigError, StateError
from molex.mixture import Mixture


def router_parameters(mixture: Mixture) -> list[nn.Parameter]:
    """The trainable parameters that decide, of layers and of the model-scope router."""
    return [
        parameter
        for name, parameter in mixture.model.named_parameters()
        if parameter.requires_grad and mixture.owns(name) and ".router." in f".{name}"
    ]


def split_groups(optimizer: torch.optim.Optimizer, routers: list[nn.Parameter], learning_rate: float) -> None:
    """Moves router parameters of a fresh optimizer into groups of their own, with their own learning rate."""
    ids = {id(parameter) for parameter in routers}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in ids]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in ids]
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate, "routers": True})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def check_holds_all(optimizer: torch.optim.Optimizer, mixture: Mixture) -> None:
    """Raises StateError where the mixture has grown since its trainer made the optimizer: the new experts would not
    learn."""
    held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
    if any(id(p) not in held for p in mixture.trainable_parameters()):
        raise StateError("this optimizer does not hold all that trains; after mixture.grow make a new trainer")


def check_split(optimizer: torch.optim.Optimizer) -> None:
    """Raises ConfigError on an optimizer the Trainer did not make, whose groups are not ours to split."""
    if not any(group.get("routers") for group in getattr(optimizer, "param_groups", ())):
        raise ConfigError(
            "router_learning_rate needs an optimizer that the Trainer makes; "
            "leave `optimizers` (or DeepSpeed's `optimizer`) out, or give your own a group for the routers"
        )
