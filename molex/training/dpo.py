"""MixtureDPOTrainer: direct preference optimisation of a mixture against its own base (arXiv 2305.18290).

    loss = −log σ( β [ (log π(y_w) − log π_base(y_w)) − (log π(y_l) − log π_base(y_l)) ] )

The reference is the same model with its experts off, so no second model is loaded. At initialisation both agree and
the loss is log 2.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from molex.errors import ConfigError
from molex.mixture import Mixture
from molex.training.arguments import MixtureArguments
from molex.training.mixin import MixtureTrainerMixin


@dataclass
class MixtureDPOConfig(MixtureArguments, DPOConfig):
    """DPOConfig of a mixture."""


class MixtureDPOTrainer(MixtureTrainerMixin, DPOTrainer):
    """Used as DPOTrainer is, without a reference model. Raises ConfigError on one.

    also_train modules are the policy's in the reference too.
    """

    def __init__(self, model: PreTrainedModel, args: DPOConfig, **rest: Any):
        if rest.get("ref_model") is not None or args.sync_ref_model:
            raise ConfigError("the reference is the mixture's own base: leave ref_model and sync_ref_model out")
        # TRL loads no reference model where reference log-probabilities are precomputed
        self._precompute = args.precompute_ref_log_probs
        args.precompute_ref_log_probs = True
        super().__init__(model, args=args, **rest)
        args.precompute_ref_log_probs = self.precompute_ref_logps = self._precompute
        self.ref_model = _Base(self.mixture)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return super()._precompute_ref_logps(dataset, name, batch_size) if self._precompute else dataset

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with self.mixture.disabled():
            return super().compute_ref_log_probs(model, inputs)


class _Base:
    """The mixture's base, called as a model. What the policy's forward routed stays recorded."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture

    def __call__(self, **inputs: Any) -> Any:
        with self.mixture.disabled():
            return self.mixture.model(**inputs)
