"""Expert kinds: one file each. Importing this package registers them all."""

from molex.experts import averaged, dora, lora, shards, shared_a, sparse_a  # noqa: F401 (registers the kinds)
from molex.experts.base import ExpertBank, ExpertsConfig, LayerShape, LoRA, expert_kinds

__all__ = ["ExpertBank", "ExpertsConfig", "LayerShape", "LoRA", "expert_kinds"]
