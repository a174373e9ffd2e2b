"""Which backend computes a layer: an explicit choice that must run, or an automatic one that says why.

Dense-masked wins while C, the columns of all experts, is below about 500 (the arithmetic: the sorted form reads x
and touches y once for each of a token's K experts). Above that the sorted form wins if K experts are few.
"""

import logging
import os

import torch
from torch import Tensor, nn

from molex.errors import BackendError
from molex.kernels.base import Backend, backends
from molex.kernels.columns import Columns
from molex.routing import Routing

logger = logging.getLogger("molex")

DENSE_COLUMNS = 500


class Planner:
    """Picks a backend by shape; `choice` is "auto" or a backend's name. `MOLEX_BACKEND` replaces "auto"."""

    def __init__(self, choice: str = "auto"):
        self.choice = os.environ.get("MOLEX_BACKEND", "auto") if choice == "auto" else choice
        if self.choice != "auto":
            backends[self.choice]
        self._instances: dict[str, Backend] = {}
        self._told: set[tuple[object, ...]] = set()

    def pick(self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module) -> Backend:
        """Raises BackendError when a backend chosen by name cannot run these shapes."""
        if self.choice != "auto":
            return self._explicit(x, columns, routing, base)
        name, reason = self._automatic(x, columns, routing, base)
        if not torch.compiler.is_compiling():
            self._tell(name, reason, x, columns, routing)
        return self._get(name)

    def _explicit(self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module) -> Backend:
        backend = self._get(self.choice)
        reason = backend.supports(x, columns, routing, base)
        if reason:
            raise BackendError(f"backend {self.choice!r} cannot run this layer: {reason}; use backend='auto'")
        return backend

    def _automatic(self, x: Tensor, columns: Columns, routing: Routing, base: nn.Module) -> tuple[str, str]:
        num_columns, num_slots = len(columns.expert_of_column), routing.expert_ids.shape[1]
        crossover = DENSE_COLUMNS * max(num_slots / 2, 0.5)
        if num_columns <= crossover:
            return "dense", f"C={num_columns} is at most {crossover:.0f}"
        reason = self._get("grouped").supports(x, columns, routing, base)
        if reason:
            return "dense", f"grouped is faster at C={num_columns}, but {reason}"
        return "grouped", f"C={num_columns} is above {crossover:.0f} for K={num_slots}"

    def _get(self, name: str) -> Backend:
        if name not in self._instances:
            self._instances[name] = backends[name]()
        return self._instances[name]

    def _tell(self, name: str, reason: str, x: Tensor, columns: Columns, routing: Routing) -> None:
        shape = (x.shape[-1], columns.B.shape[0], len(columns.expert_of_column), routing.expert_ids.shape[1], x.dtype)
        if (name, *shape) in self._told:
            return
        self._told.add((name, *shape))
        logger.info("D=%d O=%d C=%d K=%d %s: backend %s (%s)", *shape, name, reason)
