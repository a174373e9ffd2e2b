"""PEFT LoRA folders as they are served: every tensor binds to one linear of the base, or the folder is refused."""

from pathlib import Path

from torch import nn

from molex.checks import listed
from molex.io.fitting import adapted_layers, agreed_whole
from molex.io.peft import read_adapter
from molex.library import Factors
from molex_serve.adapters.base import LowRank
from molex_serve.adapters.content import generation_of
from molex_serve.errors import BadAdapter


def read_lora(folder: Path, model: nn.Module) -> LowRank:
    """Raises BadAdapter and molex's CheckpointError and TargetError on what cannot be served over this base."""
    adapter = read_adapter(folder)
    adapted_layers(model, [adapter])
    replaced = agreed_whole(model, [adapter])
    if replaced:
        raise BadAdapter(
            f"{folder} replaces {listed(sorted(replaced))} whole, which requests of other adapters share: train it "
            "without modules_to_save, or serve it as a merged model"
        )
    return LowRank(
        kind="lora",
        generation=generation_of(folder),
        num_bytes=num_bytes(adapter.factors),
        source=str(folder),
        factors=adapter.factors,
    )


def num_bytes(factors: Factors) -> int:
    return sum(lora.A.nbytes + lora.B.nbytes for lora in factors.values())
