"""A batch in which every row belongs to another adapter equals each of them alone, by its own library."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from molex_serve.model.served import ServedModel
from molex_serve.model.step import BASE, Span, Step
from tests.models import VOCABULARY, tiny
from tests.serve.adapters_of import LORAS, MIXTURES, TASKS, alone, save_blend, save_lora, save_mixture

LENGTH = 6
EVERYONE = ("base", *LORAS, "blend", *MIXTURES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for name in LORAS:
        save_lora(name, tiny("llama"), folder)
    save_blend(folder)
    for name in MIXTURES:
        save_mixture(name, tiny("llama"), folder)
    return folder


def texts(count: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(3))


def attach(served: ServedModel, folder: Path, names: tuple[str, ...]) -> dict[str, int]:
    return {name: served.attach(served.read(str(folder / name))) for name in names if name != "base"} | {"base": BASE}


def logits(served: ServedModel, handles: dict[str, int], rows: list[str], ids: Tensor) -> Tensor:
    """Each row of ids (B, S) by the adapter named for it."""
    spans = [Span(handles[name], i * LENGTH, (i + 1) * LENGTH, TASKS.get(name)) for i, name in enumerate(rows)]
    served.begin_step(Step.of(tuple(spans), torch.device("cpu")))
    with torch.no_grad():
        found = served.model(ids).logits
    served.begin_step(None)
    return found


def test_everyone_in_one_batch(folder: Path) -> None:
    served = ServedModel(tiny("llama"))
    handles = attach(served, folder, EVERYONE)
    rows = [*EVERYONE, *reversed(EVERYONE)]
    ids = texts(len(rows))
    found = logits(served, handles, rows, ids)
    for name, own, ids_S in zip(rows, found, ids, strict=True):
        torch.testing.assert_close(own, alone(name, folder, "llama", ids_S), atol=2e-5, rtol=1e-4, msg=name)
