"""PEFT LoRA folders as they are served: every tensor binds to one linear of the base, or the folder is refused."""

from pathlib import Path

from torch import nn

from molex.checks import listed
from molex.io.fitting import adapted_layers, agreed_whole
from molex.io.peft import read_adapter
from molex.library import Factors
from molex_serve.adapters.base import LowRank
from molex_serve.adapters.content import generation_of, unchanged
from molex_serve.errors import BadAdapter
from molex_serve.model.columns import factor_dtype


def read_lora(folder: Path, model: nn.Module) -> LowRank:
    """Raises BadAdapter and molex's CheckpointError and TargetError on what cannot be served over this base."""
    with unchanged(folder):
        adapter, generation = read_adapter(folder), generation_of(folder)
    adapted_layers(model, [adapter])
    replaced = agreed_whole(model, [adapter])
    if replaced:
        raise BadAdapter(
            f"{folder} replaces {listed(sorted(replaced))} whole, which requests of other adapters share: train it "
            "without modules_to_save, or serve it as a merged model"
        )
    check_fits(adapter.factors, model, str(folder))
    return LowRank(
        kind="lora",
        generation=generation,
        num_bytes=num_bytes(adapter.factors),
        source=str(folder),
        factors=adapter.factors,
    )


def check_fits(factors: Factors, model: nn.Module, source: str) -> None:
    """Raises BadAdapter where what is served, A and s·B in the dtype of the linear, is not finite."""
    for layer, lora in factors.items():
        dtype = factor_dtype(model.get_submodule(layer))
        if not all(bool(part.to(dtype).isfinite().all()) for part in (lora.A, lora.scale * lora.B.to(dtype))):
            raise BadAdapter(f"{source}: {layer} has factors that {dtype} cannot hold at its scale of {lora.scale}")


def num_bytes(factors: Factors) -> int:
    return sum(lora.A.nbytes + lora.B.nbytes for lora in factors.values())
