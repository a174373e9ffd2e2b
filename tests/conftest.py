"""For every test: one thread, fixed seeds, no network, and uninitialised memory that is NaN instead of zero by luck."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _poisoned_memory() -> Iterator[None]:
    """What molex allocates and does not write is NaN, so that it shows in the result."""
    with torch.device("meta"):
        torch.empty(0)  # `with torch.device` remembers the functions it redirects: let it see the true ones
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        memory = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return memory
        caller = sys._getframe(1).f_globals.get("__name__", "")
        with torch.no_grad():
            return memory.fill_(torch.nan) if caller.startswith("molex") and memory.is_floating_point() else memory

    return poisoned
