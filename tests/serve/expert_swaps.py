"""ESFT adapters for tiny mixture-of-experts bases, and models that have one merged in, by nothing but the files."""

import copy
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import molex.esft
from molex.esft import Selection

# name -> layer -> experts: of different numbers in each layer, some in common, one with a single layer
ADAPTERS: dict[str, dict[int, tuple[int, ...]]] = {
    "law": {1: (0, 3), 2: (5,)},
    "code": {1: (3,), 2: (1, 5, 2)},
    "math": {2: (4, 0)},
    "poem": {1: (5, 4, 2, 1), 2: (0,)},
    "intent": {1: (2,), 2: (3, 2)},
}


def save_swap(name: str, base: PreTrainedModel, folder: Path, scale: float = 1.0) -> Path:
    """What molex.esft writes after a training that moved the chosen experts; the base stays as it is."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    tuning = molex.esft.tune(base, Selection(ADAPTERS[name]))
    with torch.no_grad():
        for parameter in tuning.trainable_parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    tuning.save(folder / name)
    tuning.revert()
    return folder / name


def merged(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model of its own with the folder's matrices copied over the base's."""
    model = copy.deepcopy(base)
    own = dict(model.named_parameters())
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == 3 * sum(map(len, json.loads((folder / "expert_cfg.json").read_text())["experts"].values()))
    with torch.no_grad():
        for key, tensor in tensors.items():
            match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", key)
            assert match, key
            expert, inner = int(match[2]), tensor.shape[0]
            if match[3] == "down":
                own[f"{match[1]}.down_proj"][expert] = tensor
            else:
                start = 0 if match[3] == "gate" else inner
                own[f"{match[1]}.gate_up_proj"][expert, start : start + inner] = tensor
    return model


def greedy(model: PreTrainedModel, prompts: Tensor, num_tokens: int = 8) -> Tensor:
    """(B, num_tokens)."""
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    assert isinstance(out, Tensor)
    return out[:, prompts.shape[1] :]
