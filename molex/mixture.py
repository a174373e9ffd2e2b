"""Mixture: the handle on a converted model. The model itself stays the user's own and is used as before.

mixture = molex.convert(model, molex.preset("mixlora"))
loss = model(**batch).loss + mixture.aux_loss();  loss.backward();  optimizer.step();  mixture.step()
mixture.save("out/");  mixture.revert()
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from molex.config import MixtureConfig
from molex.errors import ConfigError, StateError, TargetError
from molex.experts.dora import DoRABank
from molex.experts.lora import LoRABank
from molex.layer import MixtureLinear
from molex.reductions import add_up
from molex.routers import Router
from molex.routers.constant import ConstantConfig, ConstantRouter
from molex.routing import Decision, Trace
from molex.sharding import num_elements, whole
from molex.state import MixtureState
from molex.stats import LayerStats, layer_stats, over_all_ranks, slot_counts

logger = logging.getLogger("molex")

Factors = Mapping[str, tuple[Tensor, Tensor]]  # layer name -> A (R, D), B (O, R)


class Mixture:
    """Made by `molex.convert` and `molex.load`; `Mixture.of(model)` finds it again, on copies of a model too."""

    def __init__(
        self,
        model: nn.Module,
        config: MixtureConfig,
        layers: dict[str, MixtureLinear],
        also_trained: list[str],
        state: MixtureState,
    ):
        self.model, self.config, self.layers = model, config, layers
        self.also_trained, self.state = also_trained, state
        self.hooks: list[RemovableHandle] = []
        self.required_grad: dict[str, bool] = {}  # of the base's parameters, before the conversion

    @staticmethod
    def of(model: nn.Module) -> "Mixture":
        """The mixture of a converted model. Raises StateError where it has none."""
        mixture = getattr(model, "molex_mixture", None)
        if mixture is None:
            raise StateError(f"this {type(model).__name__} is not converted; call molex.convert(model, config)")
        return mixture

    @property
    def experts(self) -> list[str]:
        """The experts' names, of the layer that has most."""
        return max((layer.experts.names for layer in self.layers.values()), key=len)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What training moves: experts, routers and also_train modules."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def num_parameters(self) -> dict[str, int]:
        """Counts: stored (experts and routers), trainable, and base."""
        owned = [p for name, p in self.model.named_parameters() if self.owns(name)]
        total = sum(num_elements(p) for p in self.model.parameters())
        stored = sum(num_elements(p) for p in owned)
        return {
            "stored": stored,
            "trainable": sum(num_elements(p) for p in self.trainable_parameters()),
            "base": total - stored,
        }

    def owns(self, name: str) -> bool:
        """Whether a parameter or buffer of the model belongs to the mixture, by its name in the model."""
        if name.startswith("molex."):
            return True
        return any(name.rpartition(part)[0] in self.layers for part in (".experts.", ".router."))

    def state_dict(self) -> dict[str, Tensor]:
        """What the mixture adds to the base and what it trains whole, under the model's own names.

        Where the model is sharded over ranks this gathers: every rank must call, and every rank gets all of it.
        """
        self._check_alive()
        trained_whole = tuple(f"{name}." for name in self.also_trained)
        named = self.model.state_dict(keep_vars=True)
        kept = {name: t for name, t in named.items() if self.owns(name) or name.startswith(trained_whole)}
        return whole(kept)

    def aux_loss(self) -> Tensor:
        """The sum of the method's losses over the last forward. Raises StateError where nothing was recorded."""
        self._check_alive()
        trace = self.state.trace
        if self.config.losses and not trace:
            raise StateError("no routing is recorded: run a forward with gradients on (or in evaluation mode) first")
        scored = {name: d for name, d in trace.items() if d.routing.num_experts > 1}
        if not self.config.losses or not scored:
            return torch.zeros((), device=next(self.model.parameters()).device)
        together = _on_one_device(scored)
        return add_up([loss(together) for loss in self.config.losses])

    def step(self) -> None:
        """Moves balance biases against the last forward's load; call it after each micro-batch's backward."""
        routers = {name: layer.router for name, layer in self.layers.items() if layer.router is not None}
        moving = {name: router for name, router in routers.items() if type(router).balance is not Router.balance}
        counts = {name: slot_counts(decision) for name, decision in self.state.trace.items() if name in moving}
        for name, load_E in over_all_ranks(counts).items():
            moving[name].balance(load_E)

    def stats(self) -> dict[str, LayerStats]:
        """Load, entropy and dead experts of each routed layer in the last forward."""
        return layer_stats({name: d for name, d in self.state.trace.items() if not self._plain(name)})

    def _plain(self, name: str) -> bool:
        """Whether a layer has one ordinary LoRA beside the routed ones, which is no expert of the mixture."""
        return isinstance(self.layers[name].router, ConstantRouter) and not isinstance(
            self.config.router, ConstantConfig
        )

    def set_tasks(self, task_ids: Tensor | Sequence[int] | None) -> None:
        """Task ids of the batches to come, (B,) or (B, S); they stay until changed, since backward may recompute.

        Raises ConfigError on any other shape, and where they are no whole numbers.
        """
        try:
            tasks = None if task_ids is None else torch.as_tensor(task_ids)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"task_ids={task_ids!r}; give a whole number for each sequence or token") from error
        if tasks is not None and tasks.dim() not in (1, 2):
            raise ConfigError(f"task_ids has shape {tuple(tasks.shape)}; give one task id for each sequence or token")
        if tasks is not None and tasks.numel() and tasks.is_floating_point():
            raise ConfigError(f"task_ids are {tasks.dtype}; give a whole number for each sequence or token")
        self.state.tasks = None if tasks is None else tasks.long()

    @contextmanager
    def using(
        self,
        tasks: Tensor | Sequence[int] | None = None,
        adapters: str | Sequence[str | None] | None = None,
    ) -> Iterator[None]:
        """Inference with these task ids, or with one expert by name for each sequence (None = the base alone)."""
        self._check_alive()
        before = self.state.tasks, self.state.request
        if tasks is not None:
            self.set_tasks(tasks)
        if adapters is not None:
            named = [adapters] if isinstance(adapters, str) or not isinstance(adapters, Sequence) else adapters
            self.state.request = torch.tensor([self._expert_id(name) for name in named])
        try:
            yield
        finally:
            self.state.tasks, self.state.request = before

    def _expert_id(self, name: str | None) -> int:
        if name is None:
            return -1
        if name not in self.experts:
            raise ConfigError(f"no expert {name!r}; this mixture has: {', '.join(self.experts)}")
        expert_id = self.experts.index(name)
        for layer_name, layer in self.layers.items():
            if expert_id >= layer.experts.num_experts and not self._plain(layer_name):
                raise ConfigError(f"{layer_name} has no expert {name!r}, only {layer.experts.num_experts}")
        return expert_id

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, with no expert at work: the reference of DPO and GRPO. also_train modules stay trained."""
        before, self.state.enabled = self.state.enabled, False
        try:
            yield
        finally:
            self.state.enabled = before

    @contextmanager
    def record(self) -> Iterator[list[dict[str, Decision]]]:
        """Collects the routing of every forward inside: generation overwrites the trace at each token."""
        before, self.state.steps = self.state.steps, []
        try:
            yield self.state.steps
        finally:
            self.state.steps = before

    def load_expert(self, expert_id: int, name: str, factors: Factors, scale: float) -> None:
        """Puts a pretrained LoRA in an expert's place in every layer; a routed layer it lacks gets a zero expert there.

        Raises TargetError on a layer this mixture does not have, ConfigError on a wrong id or shape; then no layer
        has changed.
        """
        self._check_alive()
        if name in self.experts and self.experts.index(name) != expert_id:
            raise ConfigError(f"expert {self.experts.index(name)} is called {name!r} already; choose another name")
        unknown = sorted(set(factors) - set(self.layers))
        if unknown:
            raise TargetError(f"expert {name!r} has layers that are not converted: {', '.join(unknown[:5])}")
        filled = {n: layer for n, layer in self.layers.items() if n in factors or not self._plain(n)}
        missing = len(filled) - len(factors)
        if missing:
            logger.warning("expert %r has no %d of %d layers; they add nothing", name, missing, len(filled))
        pairs = {n: factors.get(n) or layer.zero_factors(expert_id) for n, layer in filled.items()}
        for layer_name, (A, B) in pairs.items():
            try:
                filled[layer_name].experts.check_expert(expert_id, A, B, scale)
            except ConfigError as error:
                raise ConfigError(f"{layer_name}: {error}") from error
        for layer_name, (A, B) in pairs.items():
            filled[layer_name].load_expert(expert_id, name, A, B, scale)

    def factors(self, expert_id: int) -> Factors:
        """One expert's A (R, D) and B (O, R) in every layer, copied. Raises ConfigError where experts are not LoRAs."""
        found = {}
        for name, layer in self.layers.items():
            if not isinstance(layer.experts, LoRABank) or isinstance(layer.experts, DoRABank):
                raise ConfigError(f"{name}: experts of this kind are more than one A and one B")
            if not 0 <= expert_id < layer.experts.num_experts:
                raise ConfigError(f"{name}: expert {expert_id} of a bank of {layer.experts.num_experts}")
            A_RD, B_OR = layer.experts.columns().expert(expert_id)
            found[name] = (A_RD.detach().clone(), B_OR.detach().clone())
        return found

    def grow(self, num_experts: int) -> None:
        """Freezes the experts there are and adds trainable ones: MoRAM's next task.

        Raises ConfigError where the router could not choose the new ones, or the experts are no plain LoRAs.
        """
        if num_experts < 1:
            raise ConfigError(f"num_experts={num_experts}: growing adds at least 1")
        for name, layer in self.layers.items():
            if type(layer.experts) is not LoRABank or layer.router is None or not layer.router.growable:
                raise ConfigError(f"{name}: these experts or their router cannot grow; convert with more experts")
        for layer in self.layers.values():
            assert isinstance(layer.experts, LoRABank)
            assert layer.router is not None
            layer.experts.grow(num_experts, self.config.ranks(1)[0], self.config.scales(num_experts)[0])
            layer.router.num_experts += num_experts

    def save(
        self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None, is_main_process: bool = True
    ) -> None:
        """Writes the mixture into a folder that `molex.load` reads: see molex.io.saving."""
        from molex.io.saving import save  # io describes mixtures, so it is above this file

        save(self, directory, state_dict, is_main_process)

    def revert(self) -> nn.Module:
        """Gives the model back as it was: the same base objects, hooks gone, requires_grad restored.

        Raises StateError where it was done already.
        """
        self._check_alive()
        for name, layer in self.layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.base)
        for hook in self.hooks:
            hook.remove()
        for attribute in ("molex", "molex_mixture", "save_pretrained"):
            if attribute in vars(self.model) or attribute in self.model._modules:
                delattr(self.model, attribute)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.required_grad.get(name, parameter.requires_grad))
        return self.model

    def _check_alive(self) -> None:
        if getattr(self.model, "molex_mixture", None) is not self:
            raise StateError(
                "this mixture was reverted already; its model is a plain model again: call molex.convert or molex.load"
            )

    def summary(self) -> dict[str, Any]:
        """What was made, in a few numbers."""
        counts = [layer.experts.num_experts for layer in self.layers.values()]
        return {
            "method": self.config.method,
            "layers": len(self.layers),
            "experts": (min(counts), max(counts)),
            **self.num_parameters(),
        }


def _on_one_device(trace: Trace) -> Trace:
    """A model spread over several devices leaves its decisions on them; losses add them up."""
    device = next(iter(trace.values())).routing.weights.device
    return {name: d if d.routing.weights.device == device else d.to(device) for name, d in trace.items()}
