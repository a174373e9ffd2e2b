"""The planner: an explicit choice runs or raises, an automatic one says why, once per shape."""

import logging

import pytest
import torch

from molex.errors import BackendError, ConfigError
from molex.kernels import Columns, Planner, backends, columns_of
from molex.routing import Routing
from tests.kernels.cases import HERE


def shapes(
    ranks: tuple[int, ...], top_k: int, num_in: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, Columns, Routing, torch.nn.Linear]:
    columns = Columns(torch.zeros(sum(ranks), num_in), torch.zeros(16, sum(ranks)), ranks, columns_of(ranks)).to(dtype)
    ids_TK = torch.zeros(3, top_k, dtype=torch.int64)
    base = torch.nn.Linear(num_in, 16, dtype=dtype).requires_grad_(False)
    return torch.zeros(3, num_in, dtype=dtype), columns, Routing(ids_TK, torch.ones(3, top_k), None, len(ranks)), base


def picked(planner: Planner, problem: tuple[torch.Tensor, Columns, Routing, torch.nn.Linear]) -> str:
    return backends.name_of(type(planner.pick(*problem)))


@pytest.mark.parametrize("name", HERE)
def test_an_explicit_choice_is_taken(name: str) -> None:
    assert picked(Planner(name), shapes((8, 8), 1)) == name


def test_an_explicit_choice_that_cannot_run_raises() -> None:
    with pytest.raises(BackendError, match=r"'grouped' cannot run this layer: .*float64.*auto"):
        Planner("grouped").pick(*shapes((8, 8), 1, dtype=torch.float64))
    with pytest.raises(BackendError, match="16 bytes"):
        Planner("grouped").pick(*shapes((8, 8), 1, num_in=15))


@pytest.mark.skipif("triton" in HERE, reason="its interpreter is on")
def test_triton_says_where_it_runs() -> None:
    with pytest.raises(BackendError, match="run on a GPU, x is on cpu"):
        Planner("triton").pick(*shapes((8, 8), 1))


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'dense'.*reference"):
        Planner("dens")


def test_auto_goes_by_the_columns() -> None:
    planner = Planner()
    assert picked(planner, shapes((16,) * 8, 2)) == "dense"
    assert picked(planner, shapes((16,) * 64, 2)) == "grouped"
    assert picked(planner, shapes((16,) * 64, 8)) == "dense"


def test_auto_says_once_per_shape_what_and_why(caplog: pytest.LogCaptureFixture) -> None:
    planner = Planner()
    with caplog.at_level(logging.INFO, logger="molex"):
        for _ in range(3):
            planner.pick(*shapes((16,) * 8, 2))
            planner.pick(*shapes((16,) * 64, 2, dtype=torch.float64))
    assert [record.getMessage() for record in caplog.records] == [
        "D=16 O=16 C=128 K=2 torch.float32: backend dense (C=128 is at most 500)",
        "D=16 O=16 C=1024 K=2 torch.float64: backend dense (grouped is faster at C=1024, but "
        "grouped_mm takes float32, bfloat16 and float16, not torch.float64)",
    ]


def test_the_environment_replaces_auto_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLEX_BACKEND", "reference")
    assert picked(Planner(), shapes((8, 8), 1)) == "reference"
    assert picked(Planner("dense"), shapes((8, 8), 1)) == "dense"
    monkeypatch.setenv("MOLEX_BACKEND", "fast")
    with pytest.raises(ConfigError, match="fast"):
        Planner()
