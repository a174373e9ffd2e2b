"""The planner: an explicit choice runs or raises, an automatic one says why, once per shape."""

import logging
import re
import time
from typing import Any

import pytest
import torch

import molex
from molex.errors import BackendError, ConfigError
from molex.kernels import Backend, Columns, Planner, backends, columns_of
from molex.kernels.block import Projection
from molex.kernels.dense import Dense
from molex.kernels.race import Through, like_layer, race
from molex.routing import Routing
from tests.kernels.cases import DEVICE, HERE
from tests.kernels.test_ffn import Case, block_of
from tests.kernels.test_ffn import make as block_problem
from tests.models import tiny


def shapes(
    ranks: tuple[int, ...],
    top_k: int,
    num_in: int = 256,
    dtype: torch.dtype = torch.float32,
    num_tokens: int = 3,
) -> tuple[torch.Tensor, Columns, Routing, torch.nn.Linear]:
    columns = Columns(torch.zeros(sum(ranks), num_in), torch.zeros(256, sum(ranks)), ranks, columns_of(ranks)).to(dtype)
    ids_TK = torch.arange(top_k).expand(num_tokens, -1).clone()
    base = torch.nn.Linear(num_in, 256, dtype=dtype).requires_grad_(False)
    routing = Routing(ids_TK, torch.ones(num_tokens, top_k), None, len(ranks))
    return torch.zeros(num_tokens, num_in, dtype=dtype), columns, routing, base


def picked(planner: Planner, problem: tuple[torch.Tensor, Columns, Routing, torch.nn.Linear]) -> str:
    return backends.name_of(type(planner.pick(*problem)))


@pytest.mark.parametrize("name", HERE)
def test_an_explicit_choice_is_taken(name: str) -> None:
    with DEVICE:
        problem = shapes((8, 8), 1)
    assert picked(Planner(name), problem) == name


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


def test_auto_goes_by_columns_experts_a_token_and_tokens() -> None:
    planner = Planner()
    assert picked(planner, shapes((16,) * 8, 2, num_tokens=2048)) == "dense"
    assert picked(planner, shapes((16,) * 64, 2, num_tokens=2048)) == "grouped"
    assert picked(planner, shapes((16,) * 64, 16, num_tokens=2048)) == "dense"
    assert picked(planner, shapes((16,) * 64, 2, num_tokens=1)) == "dense"


def test_auto_says_once_per_shape_what_and_why(caplog: pytest.LogCaptureFixture) -> None:
    planner = Planner()
    with caplog.at_level(logging.INFO, logger="molex"):
        for num_tokens in (2000, 2000, 1500):
            planner.pick(*shapes((16,) * 8, 2, num_tokens=num_tokens))
            planner.pick(*shapes((16,) * 64, 2, num_tokens=num_tokens, dtype=torch.float64))
    first, second = [record.getMessage() for record in caplog.records]
    assert first == "T<=2048 D=256 O=256 C=128 K=2 torch.float32: backend dense (predicted to be fastest, or nearly)"
    pattern = (
        r"T<=2048 D=256 O=256 C=1024 K=2 torch.float64: backend dense "
        r"\(grouped is predicted at 0\.\d\d of dense's time, "
        r"but grouped_mm takes float32, bfloat16 and float16, not torch.float64\)"
    )
    assert re.fullmatch(pattern, second)


def test_a_base_that_hides_its_weight_is_picked_for_apart() -> None:
    """The same shape over another base: what was decided for the plain one does not hold there."""
    planner, (x, columns, routing, base) = Planner(), shapes((16,) * 8, 2)
    hooked = torch.nn.Linear(256, 256).requires_grad_(False)
    hooked.register_forward_hook(lambda module, inputs, output: output)
    decided: list[bool] = []

    def predict(x: torch.Tensor, one: Projection, num_tokens: int) -> tuple[str, str]:
        decided.append(one.base is hooked)
        return "dense", ""

    planner._predict = predict  # type: ignore[method-assign]
    for each in (base, hooked, base, hooked):
        planner.pick(x, columns, routing, each)
    assert decided == [False, True]


class Slow(Dense):
    """Right, after a while."""

    def linear(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(0.005)
        return super().linear(*args, **kwargs)


class Wrong(Dense):
    """Three percent more of the experts than there should be."""

    def linear(
        self, x: torch.Tensor, base: torch.nn.Module, columns: Columns, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        return super().linear(x, base, columns._replace(B=columns.B * 1.03), *args, **kwargs)


class Broken(Dense):
    def linear(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise OSError("no such instruction\nin the second line")


def test_a_race_is_won_by_the_fastest_of_those_that_are_right(caplog: pytest.LogCaptureFixture) -> None:
    x, columns, routing, base = shapes((8,) * 4, 2, num_tokens=64)  # B is zero: on it nobody would be wrong
    through = like_layer(x, Projection(base, columns, routing))
    contestants = {"slow": Slow(), "dense": Dense(), "wrong": Wrong(), "broken": Broken()}
    with caplog.at_level(logging.WARNING, logger="molex"):
        times = race(through, contestants, Dense())
    assert set(times) == {"slow", "dense"}
    assert min(times, key=times.__getitem__) == "dense"
    said = [record.getMessage() for record in caplog.records]
    assert "backend wrong computes something else here" in said[0]
    assert said[1] == "backend broken does not run here and is not used: no such instruction"


def test_where_plans_race_the_winner_is_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    raced: list[set[str]] = []

    def pretend(through: Through, contestants: dict[str, Backend], yardstick: Backend) -> dict[str, float]:
        raced.append({*contestants})
        return {"dense": 2e-6, "preload": 1e-6}

    monkeypatch.setattr("molex.kernels.planner.may_race", lambda x: True)
    monkeypatch.setattr("molex.kernels.planner.race", pretend)
    planner = Planner()
    with caplog.at_level(logging.INFO, logger="molex"):
        names = [picked(planner, shapes((16,) * 8, 2, num_tokens=300)) for _ in range(2)]
    assert names == ["preload", "preload"]
    assert raced == [{"dense", "preload"}]
    assert caplog.records[-1].getMessage().endswith("backend preload (microseconds here: preload 1, dense 2)")
    with torch.no_grad():  # without the pass back another plan may be best
        picked(planner, shapes((16,) * 8, 2, num_tokens=300))
    assert len(raced) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they may race")
def test_on_a_processor_nothing_races() -> None:
    assert picked(Planner(), shapes((16,) * 8, 2, num_tokens=300)) == "dense"


def test_the_environment_replaces_auto_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLEX_BACKEND", "reference")
    assert picked(Planner(), shapes((8, 8), 1)) == "reference"
    assert picked(Planner("dense"), shapes((8, 8), 1)) == "dense"
    monkeypatch.setenv("MOLEX_BACKEND", "fast")
    with pytest.raises(ConfigError, match="fast"):
        Planner()


@pytest.mark.parametrize("method", ["mola", "mixlora"])
def test_a_race_inside_a_checkpoint_leaves_its_gradients_alone(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint counts what is saved inside it, and computes it again when that is asked for."""

    def gradients(racing: bool) -> dict[str, torch.Tensor]:
        monkeypatch.setattr("molex.kernels.planner.may_race", lambda x: racing)
        model = tiny("llama").train()
        settings = {"allocation": None} if method == "mola" else {}
        mixture = molex.convert(model, molex.preset(method, num_experts=4, rank=4, dropout=0.0, **settings))
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        assert len(mixture.state.planner._picked) > 0 or not racing
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    torch.manual_seed(0)
    expected = gradients(racing=False)
    torch.manual_seed(0)
    got = gradients(racing=True)
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["opt", "phi3", "gpt_neox"])
@pytest.mark.parametrize("experts", ["lora", "dora"])
def test_layers_of_streams_do_not_race(architecture: str, experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What narrows a block is given several streams of each token: it is no single linear."""
    forms: list[int] = []

    def pretend(through: Through, contestants: dict[str, Backend], yardstick: Backend) -> dict[str, float]:
        forms.append(through(yardstick)[0].dim())
        return {"dense": 1e-6}

    monkeypatch.setattr("molex.kernels.planner.may_race", lambda x: True)
    monkeypatch.setattr("molex.kernels.planner.race", pretend)
    model = tiny(architecture).train()
    molex.convert(model, molex.preset("mixlora", num_experts=4, rank=4, dropout=0.0, experts=experts))
    model(torch.arange(12).view(2, 6), labels=torch.arange(12).view(2, 6)).loss.backward()
    assert set(forms) == {3}, "the plain LoRAs of attention alone"


def test_a_base_that_does_more_than_compute_is_not_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr("molex.kernels.planner.may_race", lambda x: True)
    *others, base = shapes((1,) * 1024, 1, num_tokens=300)
    base.register_forward_hook(lambda *call: called.append(1))
    Planner().pick(*others, base)  # type: ignore[arg-type]
    assert not called


def test_without_memory_for_a_race_it_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Dense, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("molex.kernels.planner.may_race", lambda x: True)
    monkeypatch.setattr(Dense, "linear", full)
    assert picked(Planner(), shapes((16,) * 8, 2, num_tokens=300)) == "dense"


def test_blocks_that_differ_in_kind_race_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    raced: list[set[str]] = []

    def pretend(through: Through, contestants: dict[str, Backend], yardstick: Backend) -> dict[str, float]:
        raced.append({*contestants})
        return {"dense": 1e-6}

    monkeypatch.setattr("molex.kernels.planner.may_race", lambda x: True)
    monkeypatch.setattr("molex.kernels.planner.race", pretend)
    p = block_problem(Case("kinds", normalised=False), torch.float32)
    block, planner = block_of(p), Planner()
    kinds = [
        block,
        block._replace(activation="relu"),
        block._replace(keep=torch.ones(p.x.shape[0], 3, dtype=torch.bool)),
        block._replace(routing=block.routing._replace(normalised=True)),
    ]
    for kind in (*kinds, *kinds):
        planner.pick_block(p.x, kind)
    assert len(raced) == len(kinds)
