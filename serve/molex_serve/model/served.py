"""ServedModel: a base model to which adapters are attached and detached while it runs.

Linears that no adapter changes stay untouched; the first adapter that changes one puts a `ServedLinear` in its place.
A step in which all tokens are the base's is computed by the base's own modules, bit for bit.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from molex.errors import StateError, TargetError
from molex.tokens import find_stacks
from molex_serve.adapters.base import ExpertSwap, HostAdapter, LowRank, Routed
from molex_serve.adapters.loading import read
from molex_serve.errors import BadAdapter, LoadBusy
from molex_serve.model.columns import ColumnPool
from molex_serve.model.experts import ExpertPool
from molex_serve.model.linear import Current, ServedBlock, ServedLinear
from molex_serve.model.plan import Plan
from molex_serve.model.routed import Attribution, RoutedAdapter
from molex_serve.model.step import BASE, FirstPass, Step
from molex_serve.model.twin import twin_of
from molex_serve.settings import AdapterLimits


class ServedModel:
    """`read` may run on any thread; `attach`, `detach` and `begin_step` between the model's forwards."""

    def __init__(self, model: PreTrainedModel, limits: AdapterLimits | None = None):
        if getattr(model, "molex_mixture", None) is not None:
            raise StateError("this model is a mixture: serve its base, and the saved mixture as an adapter of it")
        self.model, self.limits = model.eval(), limits or AdapterLimits()
        self.pristine, self.stack = twin_of(model), find_stacks(model)[-1].module
        self.current, self.pool = Current(), ColumnPool(self.limits.columns)
        self.routed: dict[int, RoutedAdapter] = {}
        self.experts = self._expert_pool()
        self._linears: dict[str, nn.Module] = {}  # the base's own, where one stands in their place
        self._blocks: dict[str, nn.Module] = {}
        self._plan: Plan | None = None  # of the last step; no adapter of it was detached since

    def read(self, path: str, two_passes: bool = False) -> HostAdapter:
        """An adapter from disk, checked against the base. two_passes: the engine can do a first pass. Raises
        BadAdapter."""
        adapter = read(path, self.pristine)
        if isinstance(adapter, Routed) and adapter.mixture.head is not None and not two_passes:
            raise BadAdapter(
                f"{path} decides after a first pass over the base, which takes a second cache: serve with --two-passes "
                "or --static"
            )
        if isinstance(adapter, LowRank) and adapter.rank > self.limits.rank:
            raise BadAdapter(f"{path} has rank {adapter.rank}, at most {self.limits.rank} are allowed here")
        return adapter

    @torch.no_grad()
    def attach(self, adapter: HostAdapter) -> int:
        """Makes it resident and returns its handle. Raises LoadBusy where there is no place for it."""
        handle = self._free_handle()
        if isinstance(adapter, LowRank):
            self.pool.add(handle, adapter, {name: self.pristine.get_submodule(name) for name in adapter.factors})
            self._serve(adapter.factors)
        elif isinstance(adapter, Routed):
            self.routed[handle] = routed = RoutedAdapter(adapter.mixture)
            self._serve(routed.layers, routed.blocks)
        elif isinstance(adapter, ExpertSwap) and self.experts is not None:
            self.experts.attach(handle, adapter)
        else:
            raise BadAdapter(f"{adapter.source} is of kind {adapter.kind!r}, which is not served over this model here")
        return handle

    def detach(self, handle: int) -> None:
        """Gives its place and its memory back; no request may use it any more."""
        self._plan = None
        if handle in self.routed:
            del self.routed[handle]
        elif self.experts is not None and handle in self.experts:
            self.experts.detach(handle)
        else:
            self.pool.remove(handle)

    def check_task(self, handle: int, task: int | None) -> None:
        """Raises BadRequest where the adapter is routed by tasks and this is none of them."""
        if handle in self.routed:
            self.routed[handle].check_task(task)

    def begin_step(self, step: Step | None, first_pass: FirstPass | None = None) -> None:
        """The next forward has these tokens; None: the step is over. first_pass is called where an adapter needs it."""
        self._act(None, None)
        if step is None:
            return
        if self._plan is None or not self._plan.suits(step):
            self._plan = Plan(step, self.pool, self.routed)
        plan = self._plan
        plan.begin(None if first_pass is None else partial(first_pass, self.stack))
        self._act(step, None if plan.is_base else plan)

    def _act(self, step: Step | None, plan: Plan | None) -> None:
        self.current.adds = plan
        if self.experts is not None:
            self.experts.step = step

    def attribution(self, handle: int) -> Attribution | None:
        """Who served an adapter's tokens in the last step."""
        return self.routed[handle].attribution() if handle in self.routed else None

    def close(self) -> None:
        """Gives the model back as it was."""
        self.current.adds = self._plan = None
        for name, linear in self._linears.items():
            self.model.set_submodule(name, linear)
        for block in self._blocks.values():
            del block.forward
        self._linears.clear()
        self._blocks.clear()
        self.routed.clear()
        self.pool.close()
        if self.experts is not None:
            self.experts.close()

    def _expert_pool(self) -> ExpertPool | None:
        """Slots beside the experts of a mixture-of-experts base; None over others, and where there are to be none."""
        if self.limits.expert_slots == 0:
            return None
        try:
            return ExpertPool(self.model, self.limits.expert_slots, self.limits.resident)
        except TargetError:
            return None

    def _serve(self, linears: Iterable[str], blocks: Iterable[str] = ()) -> None:
        """Has these linears and feed-forward blocks look at what a step adds."""
        for name in set(linears) - self._linears.keys():
            self._linears[name] = self.model.get_submodule(name)
            self.model.set_submodule(name, ServedLinear(name, self._linears[name], self.current))
        for name in set(blocks) - self._blocks.keys():
            self._blocks[name] = module = self.model.get_submodule(name)
            module.forward = ServedBlock(name, module, self.current)  # type: ignore[assignment]

    def _free_handle(self) -> int:
        taken = {*self.routed, *self.pool.places, *(self.experts.handles() if self.experts else ())}
        free = next((h for h in range(BASE + 1, self.limits.resident + 1) if h not in taken), None)
        if free is None:
            raise LoadBusy(f"{len(taken)} adapters are resident, as many as are allowed here")
        return free
