"""A second tree of modules over the same weights: what is converted there leaves the served model as it is."""

import copy
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def twin_of(model: Model) -> Model:
    """A copy of the modules that shares every parameter and buffer."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
