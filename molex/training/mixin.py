"""MixtureTrainerMixin: what a Trainer must do differently when its model is a mixture.

    class MixtureTrainer(MixtureTrainerMixin, transformers.Trainer): ...

- The auxiliary loss is added to the loss the trainer computed, wherever that came from (TRL's fused head ignores what a
  forward adds). It is a mean over the tokens of one micro-batch, so it is averaged over accumulation steps. Evaluation
  reports it beside the task loss, not in it.
- Balance biases move after each micro-batch's backward, since backward may recompute the forward.
- A `task_ids` column reaches the mixture.
- Routing statistics are logged with everything else.
- Checkpoints hold the mixture, not its base.

Methods with a leading underscore are Trainer's own: it has no public place for batches, columns and checkpoints.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import ParallelMode

from molex.errors import ConfigError
from molex.io.checkpoint import load_into
from molex.mixture import Mixture
from molex.training.arguments import RoutingLogs
from molex.training.groups import check_holds_all, check_split, router_parameters, split_groups
from molex.training.routing_log import RoutingLog
from molex.training.tasks import TASKS, TaskCollator

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # a mixin; for the type checker it is what it is mixed into


class MixtureTrainerMixin(Trainer):
    """Put it before a `transformers.Trainer` child whose model is a mixture.

    Raises StateError on a model that is not converted, ConfigError on re-entrant checkpointing, nn.DataParallel and
    processes that do not know of each other.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._train_routing, self._eval_routing = RoutingLog(), RoutingLog()
        self._made_optimizer = False
        model = kwargs.get("model", args[0] if args else None)
        with _as_adapter(model) if isinstance(model, PreTrainedModel) else nullcontext():
            super().__init__(*args, **kwargs)
        _check(self.args)
        _ = self.mixture

    @property
    def mixture(self) -> Mixture:
        assert self.model is not None
        return Mixture.of(self.model)

    @property
    def _routing_detail(self) -> RoutingLogs:
        return getattr(self.args, "routing_logs", "summary")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        computed = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = computed if isinstance(computed, tuple) else (computed, None)
        mixture, training = self.mixture, self.mixture.model.training
        aux_loss = mixture.aux_loss() if mixture.config.losses else None
        (self._train_routing if training else self._eval_routing).add(mixture.state.trace, aux_loss)
        if aux_loss is not None and training:
            loss = loss + aux_loss.to(loss.device) / self._accumulation_left(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _accumulation_left(self, num_items_in_batch: Tensor | int | None) -> int:
        """By what the trainer will not divide the loss any more: the rule of Trainer.training_step."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # transformers 5.19
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if scaled else 1

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.mixture.step()
        self.mixture.set_tasks(None)  # they were this batch's: whoever generates next has tasks of its own, or none
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().prediction_step(*args, **kwargs)
        self.mixture.set_tasks(None)
        return result

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        self.mixture.set_tasks(prepared.get(TASKS))
        return {name: value for name, value in prepared.items() if name != TASKS}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns
        if columns is not None and TASKS not in columns:
            columns.append(TASKS)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        plain, self.data_collator = self.data_collator, TaskCollator(self.data_collator)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = plain

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        fresh, routers = self.optimizer is None, router_parameters(self.mixture)
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = getattr(self.args, "router_learning_rate", None)
        if rate is not None and not routers:
            raise ConfigError(f"router_learning_rate={rate}: {self.mixture.config.method} has no router that trains")
        if rate is not None:
            if fresh:
                split_groups(optimizer, routers, rate)
            check_split(optimizer)
        if self._made_optimizer and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            check_holds_all(optimizer, self.mixture)
        self._made_optimizer = self._made_optimizer or fresh
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self._train_routing.read(self._routing_detail)
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        routed = self._eval_routing.read(self._routing_detail)
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in routed.items()})
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the mixture alone. Every process calls: a sharded mixture is gathered, its base is not."""
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir or ".")
        self.mixture.save(directory, state_dict, is_main_process=self.args.should_save)
        if not self.args.should_save:
            return
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)
        (directory / "training_args.json").write_text(self.args.to_json_string())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the mixture's own card is written with every save, and TRL's would stand in its place."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_mixture(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_mixture(self.state.best_model_checkpoint)

    def _load_mixture(self, directory: str) -> None:
        load_into(self.mixture, directory)


@contextmanager
def _as_adapter(model: PreTrainedModel) -> Iterator[None]:
    """A mixture on a quantised base trains experts alone, as a PEFT adapter does: the trainers' check for one, which
    knows PEFT only, is answered, and TRL's cast of what trains on such a base to 16 bits is taken back."""
    if not getattr(model, "is_quantized", False) or getattr(model, "_hf_peft_config_loaded", False):
        yield
        return
    masters = {p: p.data.clone() for p in model.parameters() if p.requires_grad}
    model._hf_peft_config_loaded = True  # on the instance alone, and only here: it changes save_pretrained too
    try:
        yield
    finally:
        del model._hf_peft_config_loaded
        for parameter, value in masters.items():
            parameter.data = value.to(parameter.device)


def _check(args: TrainingArguments) -> None:
    """Raises ConfigError on arguments under which a mixture would silently train wrongly."""
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):  # the second until transformers 6
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise ConfigError(
                f"{name} asks for re-entrant checkpointing, which corrupts router gradients; "
                "set 'use_reentrant' to False or leave it out"
            )
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if together and args.parallel_mode == ParallelMode.NOT_PARALLEL:
        raise ConfigError(
            f"{dist.get_world_size()} processes run, and accelerate has each of them train alone; on CPUs: use_cpu=True"
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs in one process train by nn.DataParallel, whose replicas share one routing record; "
            "start one process for each with torchrun or accelerate launch, or make one GPU visible"
        )
