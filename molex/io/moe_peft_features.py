"""What an adapter of MoE-PEFT may be besides a MixLoRA, each refused by its name with what to do about it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molex.checks import listed
from molex.errors import CheckpointError

_RETRAIN = "with a gate for each linear: train it anew with molex.preset({!r})"
_OTHER_KINDS = {
    "LORA": "a plain LoRA in PEFT's format: molex.from_peft(model, {name: path}, allow_bin=True) reads it",
    "MOLA": f"MoE-PEFT's MoLA, {_RETRAIN.format('mola')}",
    "LORAMOE": f"MoE-PEFT's LoRAMoE, {_RETRAIN.format('loramoe')}",
}
_OTHER_STRATEGIES = {
    "mixlora-dynamic": "its weights do not sum to 1, which no router here gives a block: train it anew with mixlora",
    "mixlora-switch": "its own inference returns a block's input unchanged: train it anew with mixlora",
    "mixtral": "the layout of mLoRA 0.3: convert it first, with misc/legacy_weights_convertor.py of TUDB-Labs/MixLoRA",
}
_KNOWN = {
    *("peft_type", "task_type", "base_model_name_or_path", "name", "task_name", "bias", "r", "lora_alpha", "lora_init"),
    *("lora_dropout", "target_modules", "use_dora", "use_rslora", "expert_lora", "routing_strategy", "num_experts"),
    *("top_k", "act_fn", "router_aux_loss_coef", "router_loss", "router_init_range", "jitter_noise"),
}


def check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raises CheckpointError on an adapter_config.json that is no MixLoRA's, and on what is not understood in it."""
    kind, strategy = config.get("peft_type"), config.get("routing_strategy")
    if kind != "MIXLORA":
        raise CheckpointError(f"{folder} is {_OTHER_KINDS.get(str(kind), f'an adapter of type {kind!r}, no MixLoRA')}")
    if strategy != "mixlora":
        reason = _OTHER_STRATEGIES.get(str(strategy), "which is not known here; only 'mixlora' is")
        raise CheckpointError(f"{folder} has routing_strategy={strategy!r}: {reason}")
    if not isinstance(config.get("expert_lora", {}), Mapping):
        raise CheckpointError(f"{folder} has expert_lora={config['expert_lora']!r}; it must be an object")
    both = {**config, **config.get("expert_lora", {})}
    unknown = sorted(both.keys() - _KNOWN)
    if unknown:
        raise CheckpointError(f"{folder} has settings that are not understood here: {listed(unknown)}")
    if config.get("use_dora") or both.get("use_dora"):
        raise CheckpointError(
            f"{folder} has use_dora: MoE-PEFT saves no magnitudes, so what it trained is lost. What it would load is "
            "the same without DoRA: delete use_dora from the configuration to get that"
        )
    if both.get("bias", "none") != "none":
        raise CheckpointError(f"{folder} has bias={both['bias']!r}: no MixLoRA trains biases")
    num_experts, top_k = config.get("num_experts"), config.get("top_k", 2)
    if type(num_experts) is not int or type(top_k) is not int or not 1 <= top_k <= num_experts:
        raise CheckpointError(
            f"{folder} has num_experts={num_experts!r}, top_k={top_k!r}: give 1 <= top_k <= num_experts"
        )
