"""What a PEFT LoRA folder may hold besides scale · B A, each refused by its name with what to do about it.

Most of it changes the base, adds a bias, or is no product of two matrices, so that dropping it in silence would give
another model than the one that was trained.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from molex.checks import listed
from molex.errors import CheckpointError

_AS_LORA = "convert it to a plain LoRA with peft.convert_to_lora (or merge it, and extract one)"
_MERGE = "merge it into its base (merge_and_unload) and use that as the base"
_AS_IT_STARTED = (True, False, None, "gaussian", "eva", "orthogonal")  # inits that leave the base as it is

# setting -> (whether it is on, what it does and what to do)
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "use_dora": (bool, f"scales rows of W + B A, which no B A expresses: {_AS_LORA}"),
    "lora_bias": (bool, f"adds a bias that B A has no place for: {_MERGE}"),
    "bias": (lambda value: value not in (None, "none"), f"trains the base's biases: {_MERGE}"),
    "init_lora_weights": (
        lambda value: value not in _AS_IT_STARTED,
        "changed the base's weights when training started: save it with path_initial_model_for_weight_conversion",
    ),
    "trainable_token_indices": (bool, f"trains rows of the embeddings: {_MERGE}"),
    "layer_replication": (bool, "repeats layers of the base; give molex a base that has them"),
    "alora_invocation_tokens": (bool, "is active from a marker in the text on, which no router here knows"),
    "target_parameters": (bool, "adapts fused parameters of MoE layers, not linears"),
    "use_qalora": (bool, f"pools the input of A: {_AS_LORA}"),
    "use_bdlora": (bool, f"keeps A or B as diagonal blocks: {_AS_LORA}"),
    "kasa_config": (bool, f"has changed the base's weights and has a diagonal between B and A: {_MERGE}"),
    "monteclora_config": (bool, f"draws its factors anew in training: {_AS_LORA}"),
    "velora_config": (bool, "keeps state for training only: delete it and its lora_velora_embed tensors"),
    "megatron_config": (bool, "is split over Megatron's ranks; save it in the plain layout"),
}

# parts of tensor names -> what they are; beside lora_A.weight and lora_B.weight
_REFUSED_TENSORS = {
    "lora_magnitude_vector": "use_dora",
    "lora_B.bias": "lora_bias",
    "lora_A.bias": "lora_bias",
    "lora_embedding_": "a LoRA of an embedding",
    "trainable_tokens": "trainable_token_indices",
    ".base_layer.": "a LoRA of a head or an embedding",
    "lora_diag": "kasa_config",
}


def check_features(config: Mapping[str, Any], tensors: Sequence[str], folder: Path) -> None:
    """Raises CheckpointError on a setting or a tensor that makes an adapter more than a LoRA of linears."""
    for setting, (is_on, reason) in _REFUSED.items():
        if is_on(config.get(setting)):
            raise CheckpointError(f"{folder} has {setting}={config[setting]!r}: it {reason}")
    for part, feature in _REFUSED_TENSORS.items():
        found = [name for name in tensors if part in name]
        if found:
            reason = _REFUSED[feature][1] if feature in _REFUSED else "which no layer of a mixture takes: leave it out"
            raise CheckpointError(f"{folder} has {found[0]} ({feature}), {reason}")
    plain = (".lora_A.weight", ".lora_B.weight")
    unknown = [name for name in tensors if ".lora_" in name and not name.endswith(plain)]
    lonely = [n for n in tensors if n.endswith(plain[1]) and n.removesuffix(plain[1]) + plain[0] not in tensors]
    if unknown or lonely:
        raise CheckpointError(f"{folder} has tensors that are no pair of lora_A and lora_B: {listed(unknown + lonely)}")
