"""Mixture: the handle on a converted model. The model itself stays the user's own and is used as before.

mixture = molex.convert(model, molex.preset("mixlora"))
loss = model(**batch).loss + mixture.aux_loss();  loss.backward();  optimizer.step();  mixture.step()
mixture.save("out/");  mixture.revert()
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from molex import library
from molex.config import MixtureConfig
from molex.distributed import num_elements, whole
from molex.errors import StateError
from molex.layer import MixtureLinear
from molex.library import Factors
from molex.losses import total_loss
from molex.routers import BalancedRouter, Router
from molex.routing import Decision
from molex.state import MixtureState
from molex.stats import LayerStats, layer_stats, over_all_ranks, slot_counts
from molex.tokens import task_tensor

if TYPE_CHECKING:
    from molex.io.adapter import Adapter
    from molex.io.native import NativeExport
    from molex.io.native.export import Tokenizer
    from molex.merging import MergeRule
    from molex.merging.weights import Weights


class Removable(Protocol):
    """What surgery hung on the model."""

    def remove(self) -> None: ...


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
        self.hooks: list[Removable] = []
        self.required_grad: dict[str, bool] = {}  # of the base's parameters, before the conversion
        self.origins: dict[str, dict[str, Any]] = {}  # of experts that came from adapters: what their folder said

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
        return library.expert_names(self.layers)

    @property
    def head(self) -> Router | None:
        """The router that decides for all layers at once, where the method has one (X-LoRA)."""
        return getattr(getattr(self.model, "molex", None), "router", None)

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

    def active_parameters(self) -> int:
        """Parameters of experts and routers that one token used, on average over the last forward."""
        self._check_alive()
        head = sum(num_elements(p) for n, p in self.model.named_parameters() if n.startswith("molex.router."))
        return head + round(library.active_parameters(self.layers, self.stats()))

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
        if self.config.losses and not self.state.trace:
            raise StateError("no routing is recorded: run a forward with gradients on (or in evaluation mode) first")
        loss = total_loss(self.config.losses, self.state.trace)
        return torch.zeros((), device=next(self.model.parameters()).device) if loss is None else loss

    def step(self) -> None:
        """Moves balance biases against the last forward's load; call it after each micro-batch's backward."""
        self._check_alive()
        moving = {n: layer.router for n, layer in self.layers.items() if isinstance(layer.router, BalancedRouter)}
        counts = {name: slot_counts(decision) for name, decision in self.state.trace.items() if name in moving}
        for name, load_E in over_all_ranks(counts).items():
            moving[name].balance(load_E)

    def stats(self) -> dict[str, LayerStats]:
        """Load, entropy and dead experts of each routed layer in the last forward."""
        self._check_alive()
        return layer_stats({name: d for name, d in self.state.trace.items() if not self.layers[name].plain})

    def set_tasks(self, task_ids: Tensor | Sequence[int] | None) -> None:
        """Task ids of the batches to come, (B,) or (B, S); they stay until changed.

        Raises ConfigError on any other shape, and where they are no whole numbers.
        """
        self._check_alive()
        self.state.tasks = None if task_ids is None else task_tensor(task_ids)

    @contextmanager
    def using(
        self,
        tasks: Tensor | Sequence[int] | None = None,
        adapters: str | Sequence[str | None] | None = None,
    ) -> Iterator[None]:
        """Inference with these task ids, or with one expert by name for each sequence (None = the base alone)."""
        self._check_alive()
        changed: dict[str, Tensor] = {}
        if tasks is not None:
            changed["tasks"] = task_tensor(tasks)
        if adapters is not None:
            named = [adapters] if isinstance(adapters, str) or not isinstance(adapters, Sequence) else adapters
            changed["request"] = torch.tensor([library.find_expert(self.layers, name) for name in named])
        with self.state.replaced(**changed):
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, with no expert at work: the reference of DPO and GRPO. also_train modules stay trained."""
        self._check_alive()
        with self.state.replaced(enabled=False):
            yield

    @contextmanager
    def record(self) -> Iterator[list[dict[str, Decision]]]:
        """Collects the routing of every forward inside: generation overwrites the trace at each token."""
        self._check_alive()
        steps: list[dict[str, Decision]] = []
        with self.state.replaced(steps=steps):
            yield steps

    def load_expert(self, expert_id: int, name: str, factors: Factors) -> None:
        """Puts a pretrained LoRA in an expert's place in every layer; a routed layer it lacks gets a zero expert there.

        Raises TargetError on a layer this mixture does not have, ConfigError on a wrong id or shape; then no layer
        has changed.
        """
        self._check_alive()
        before = [*self.experts]
        library.load_expert(self.layers, expert_id, name, factors)
        for replaced in {name, before[expert_id]}:  # what a folder said of it is no longer true
            self.origins.pop(replaced, None)

    def factors(self, expert_id: int) -> Factors:
        """One expert's LoRA in every layer, copied. Raises ConfigError where experts are more than LoRAs."""
        self._check_alive()
        return library.factors_of(self.layers, expert_id)

    def grow(self, num_experts: int) -> None:
        """Freezes the experts there are and adds trainable ones: MoRAM's next task.

        Raises ConfigError where the router could not choose the new ones, or the experts are no plain LoRAs.
        """
        self._check_alive()
        library.grow(self.layers, self.config, num_experts)

    def add_expert(self, source: "str | Path | Adapter", name: str) -> None:
        """One more expert after the others, from a folder that PEFT wrote; the others keep their numbers and weights.

        It trains if the others do. A gate scores it 0 until its row is set (molex.gates_from_prompts) or trained; Arrow
        knows its direction at once. Make the optimizer after it: one made before holds parameters that are no longer in
        the model. Raises as `molex.from_peft` does, and ConfigError where router or experts are made
        for a fixed number; the mixture is then as it was.
        """
        self._check_alive()
        from molex.composing import add_expert  # reads adapters, so it is above this file

        add_expert(self, source, name)

    def export_peft(self, directory: str | Path) -> list[Path]:
        """Writes every expert as a folder that PEFT loads, DIRECTORY/name; returns the folders. An expert that came
        from an adapter, untrained since, comes out bit for bit. Raises ConfigError where experts are no LoRAs."""
        self._check_alive()
        from molex.io.exporting import export_peft  # io describes mixtures, so it is above this file

        return export_peft(self, Path(directory))

    def export_native(
        self,
        directory: str | Path,
        target: str = "transformers",
        *,
        family: str | None = None,
        tokenizer: "Tokenizer | None" = None,
        max_shard_bytes: int = 4_000_000_000,
        dry_run: bool = False,
        check: bool = True,
    ) -> "NativeExport":
        """Writes the mixture as a native mixture-of-experts checkpoint for "transformers", "vllm" or "llama.cpp": see
        molex.io.native.export."""
        self._check_alive()
        from molex.io.native import export_native  # io describes mixtures, so it is above this file

        return export_native(
            self,
            directory,
            target,
            family=family,
            tokenizer=tokenizer,
            max_shard_bytes=max_shard_bytes,
            dry_run=dry_run,
            check=check,
        )

    def merge(
        self,
        rule: "str | MergeRule | None" = None,
        weights: "Weights | None" = None,
        *,
        parameters: Mapping[str, Any] | None = None,
        rank: int | None = None,
        energy: float | None = None,
    ) -> nn.Module:
        """Folds the experts into the base, in place, and returns it, a plain model: see molex.merging.of_mixture."""
        self._check_alive()
        from molex.merging import merge_mixture  # merging reads mixtures, so it is above this file

        return merge_mixture(self, rule, weights, parameters=parameters, rank=rank, energy=energy)

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
            self.model.set_submodule(name, layer.base)
            self.state.planner.give_back(layer.base)
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
