"""Decoding with the router inside the kernels: the layer's output, its recorded routing and whole generations are those
of the router's own code, and everything that is more than the rule goes through that code."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molex
from molex.kernels import backends
from molex.kernels.planner import Planner
from molex.kernels.triton import ops
from molex.kernels.triton_backend import FEW_TOKENS
from molex.layer import MixtureLinear
from molex.mixture import Mixture
from molex.routers.topk import TopKRouter
from molex.routing import RouteContext, Routing
from tests.close import assert_close
from tests.kernels.triton.problems import DEVICE
from tests.models import mixture_of

# name -> preset and what is special
ROUTED: dict[str, dict[str, Any]] = {
    "renormalised": {"method": "mola", "num_experts": 4},
    "raw probabilities": {"method": "mola", "num_experts": 4, "renormalise": False},
    "unequal ranks": {"method": "mola", "num_experts": 3, "rank": (1, 4, 2)},
    "all experts": {"method": "mola", "num_experts": 2},
    "shared A": {"method": "hydralora", "router": "topk", "top_k": 2},
    "by magnitude": {"method": "flylora", "num_experts": 12, "rank": 1, "top_k": 3},
    "signed": {"method": "flylora", "num_experts": 12, "rank": 1, "top_k": 3, "signed": True},
}


def converted(method: str = "mola", dtype: torch.dtype = torch.float32, **overrides: Any) -> Mixture:
    """One block whose experts and balance biases do something, on the Triton kernels."""
    torch.manual_seed(0)
    uniform = {"allocation": None} if method == "mola" else {}
    mixture = mixture_of(method=method, num_hidden_layers=1, backend="triton", **uniform, **overrides)
    mixture.model.to(DEVICE)
    for layer in mixture.layers.values():
        layer.base.to(dtype)
        if isinstance(getattr(layer.router, "bias", None), Tensor):
            nn.init.normal_(layer.router.bias, std=0.3)  # type: ignore[union-attr, arg-type]
        for number in range(layer.experts.num_experts):
            layer.experts.scale[number] = 1 + number / 2
    return mixture


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever a backend routes."""
    calls, route_linear = [], backends["triton"].route_linear  # type: ignore[attr-defined]

    def counted(*call: Any) -> tuple[Tensor, Routing]:
        calls.append(1)
        return route_linear(*call)

    monkeypatch.setattr(backends["triton"], "route_linear", counted)
    return calls


def recorded(layer: MixtureLinear) -> Routing:
    return layer.state.trace[layer.name].routing


def by(layer: MixtureLinear, backend: str, dtype: torch.dtype) -> MixtureLinear:
    """A copy of the layer that computes in another way."""
    twin = copy.deepcopy(layer).to(dtype)
    twin.state.planner = Planner(backend)
    return twin


@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_layers_equal_the_routers_own_code(dtype: torch.dtype, name: str, num_tokens: int, taken: list[int]) -> None:
    mixture = converted(dtype=dtype, **ROUTED[name])
    first, *_, last = mixture.layers.values()
    for layer in (first, last):
        x = torch.randn(12, 1, layer.in_features, device=DEVICE).to(dtype)
        plain, truth = by(layer, "preload", torch.float32), by(layer, "reference", torch.float64)
        plain.base.to(dtype)
        taken.clear()
        calls = [(layer(part), recorded(layer)) for part in x.split(num_tokens)]
        assert len(taken) == len(calls), "the router's own code ran"
        expected = plain(x)
        theirs = recorded(plain)
        truth.route = lambda x, activations, chosen=theirs: chosen  # type: ignore[method-assign]
        assert_close("y", torch.cat([y for y, _ in calls]), truth(x.double()), expected)
        ours = [routing for _, routing in calls]
        ours[0].check()
        assert (ours[0].num_experts, ours[0].normalised) == (theirs.num_experts, theirs.normalised)
        assert torch.equal(torch.cat([routing.expert_ids for routing in ours]), theirs.expert_ids)
        torch.testing.assert_close(torch.cat([routing.weights for routing in ours]), theirs.weights)
        loose = {"rtol": 1e-5 if dtype == torch.float32 else 1e-2, "atol": 1e-4}
        torch.testing.assert_close(torch.cat([routing.logits for routing in ours]), theirs.logits, **loose)
        assert layer.state.trace[layer.name].context.layer == layer.name


def with_gradients(mixture: Mixture, layer: MixtureLinear, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return layer(x)


def in_training(mixture: Mixture, layer: MixtureLinear, x: Tensor) -> Tensor:
    mixture.model.train()
    return layer(x)


def with_dropout(mixture: Mixture, layer: MixtureLinear, x: Tensor) -> Tensor:
    layer.experts.dropout.train()
    return layer(x)


def hooked_router(mixture: Mixture, layer: MixtureLinear, x: Tensor) -> Tensor:
    layer.router.register_forward_hook(lambda *call: None)  # type: ignore[union-attr]
    return layer(x)


def hooked_gate(mixture: Mixture, layer: MixtureLinear, x: Tensor) -> Tensor:
    layer.router.gate.register_forward_pre_hook(lambda *call: None)  # type: ignore[union-attr]
    return layer(x)


def hooked_bank(mixture: Mixture, layer: MixtureLinear, x: Tensor) -> Tensor:
    layer.experts.register_forward_hook(lambda *call: None)
    return layer(x)


def replaced_forward(mixture: Mixture, layer: MixtureLinear, x: Tensor) -> Tensor:
    layer.router.forward = layer.router.forward  # type: ignore[union-attr, method-assign]
    return layer(x)


def requested(mixture: Mixture, layer: MixtureLinear, x: Tensor) -> Tensor:
    with mixture.using(adapters=["1"]):
        return layer(x)


def many_tokens(mixture: Mixture, layer: MixtureLinear, x: Tensor) -> Tensor:
    return layer(x.expand(1, FEW_TOKENS + 1, -1))


def temperature(mixture: Mixture, layer: MixtureLinear, x: Tensor) -> Tensor:
    object.__setattr__(layer.router.config, "temperature", 2.0)  # type: ignore[union-attr]
    return layer(x)


def another_class(mixture: Mixture, layer: MixtureLinear, x: Tensor) -> Tensor:
    class Mine(TopKRouter):
        pass

    layer.router.__class__ = Mine  # type: ignore[union-attr]
    return layer(x)


def sharded(mixture: Mixture, layer: MixtureLinear, x: Tensor) -> Tensor:
    layer.router.gate.weight.ds_id = 0  # type: ignore[union-attr]
    return layer(x)


ORDINARY = [
    *(with_gradients, in_training, with_dropout, hooked_router, hooked_gate, hooked_bank, replaced_forward),
    *(requested, many_tokens, temperature, another_class, sharded),
]


@pytest.mark.parametrize("how", ORDINARY, ids=lambda how: how.__name__)
@torch.no_grad()
def test_what_is_more_than_the_rule_goes_the_ordinary_way(
    how: Callable[[Mixture, MixtureLinear, Tensor], Tensor], taken: list[int]
) -> None:
    mixture = converted()
    layer = next(iter(mixture.layers.values()))
    layer(torch.randn(1, 1, layer.in_features, device=DEVICE))
    assert taken
    taken.clear()
    y = how(mixture, layer, torch.randn(1, 1, layer.in_features, device=DEVICE))
    assert not taken
    assert bool(y.isfinite().all())


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "mola", "num_experts": 5, "rank": 30},  # more columns than a program holds
        {"method": "mola", "experts": "dora"},
        {"method": "mixlora"},
        {"method": "mixlora", "name": "opt"},  # its blocks are no gated ones: the two halves are computed apart
        {"method": "smora", "num_experts": 8, "rank": 1, "top_k": 2},
        {"method": "loramoe"},
    ],
    ids=str,
)
@torch.no_grad()
def test_layers_without_a_rule_go_the_ordinary_way(settings: dict[str, Any], taken: list[int]) -> None:
    mixture = converted(**settings)
    mixture.model(torch.tensor([[3]], device=DEVICE))
    assert not taken


@pytest.mark.parametrize("name", ["renormalised", "by magnitude"])
def test_a_generation_and_its_records_are_the_same(name: str, taken: list[int]) -> None:
    mixture = converted(**ROUTED[name])
    ids = torch.tensor([[7, 3, 14, 15], [9, 26, 5, 35]], device=DEVICE)  # none is padding, which is 0: all experts tie
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = {}
    for backend in ("triton", "dense"):
        mixture.state.planner = Planner(backend)
        with mixture.record() as steps:
            found[backend] = mixture.model.generate(**batch, **settings), steps
        assert bool(taken) == (backend == "triton")
        taken.clear()
    (ours, our_steps), (theirs, their_steps) = found["triton"], found["dense"]
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)
    for our_step, their_step in zip(our_steps, their_steps, strict=True):
        assert our_step.keys() == their_step.keys()
        for layer in our_step:
            assert torch.equal(our_step[layer].routing.expert_ids, their_step[layer].routing.expert_ids)


@torch.no_grad()
def test_one_graph(taken: list[int]) -> None:
    model = converted().model
    ids = torch.tensor([[3, 14]], device=DEVICE)
    eager = model(ids, use_cache=False).logits
    taken.clear()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
    assert taken
    torch.testing.assert_close(compiled, eager)


@torch.no_grad()
def test_a_narrowed_gate_is_read_as_the_router_reads_it(taken: list[int]) -> None:
    mixture = converted(dtype=torch.bfloat16)
    layer = next(iter(mixture.layers.values())).to(torch.bfloat16)
    x = torch.randn(3, 1, layer.in_features, device=DEVICE).to(torch.bfloat16)
    layer(x)
    assert taken
    ours = recorded(layer)
    expected = x.view(3, -1).double() @ layer.router.gate.weight.double().T  # type: ignore[union-attr]
    assert_close("logits", ours.logits, expected, expected.float())


def test_backends_that_route_are_named_by_their_class() -> None:
    assert molex.kernels.routed.may_route(Planner("triton"), torch.device("cpu"))
    assert not molex.kernels.routed.may_route(Planner("dense"), torch.device("cpu"))
    assert not molex.kernels.routed.may_route(Planner(), torch.device("cpu"))
    assert molex.kernels.routed.may_route(Planner(), torch.device("cuda"))


def decoded(monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> Tensor:
    """Logits of a mixture on `auto`, on a device where the Triton backend wins every race."""
    won = {"triton": 0.0, "dense": 1.0}
    monkeypatch.setattr("molex.kernels.planner.may_race", lambda x: True)
    monkeypatch.setattr("molex.layer.may_route", lambda planner, device: True)
    monkeypatch.setattr("molex.kernels.planner.race", lambda through, contestants, yardstick: won)
    mixture = converted(**overrides)
    mixture.state.planner = Planner()
    return mixture.model.eval()(torch.arange(5, device=DEVICE)[None]).logits


@pytest.mark.parametrize("name", ["renormalised", "by magnitude"])
@torch.no_grad()
def test_auto_routes_in_kernels_that_are_right(name: str, taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = converted(**ROUTED[name]).model.eval()(torch.arange(5, device=DEVICE)[None]).logits
    taken.clear()
    torch.testing.assert_close(decoded(monkeypatch, **ROUTED[name]), expected)
    assert taken


@pytest.mark.parametrize(
    ("name", "part"), [("renormalised", "launch_route_planes"), ("by magnitude", "launch_self_gate")]
)
@torch.no_grad()
def test_auto_leaves_out_kernels_that_route_wrongly(
    name: str, part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = decoded(monkeypatch, **ROUTED[name])
    right = getattr(ops, part)

    def wrong(*call: Any) -> Any:
        found = right(*call)
        return found._replace(gated=1.1 * found.gated) if isinstance(found, tuple) else torch.zeros_like(found)

    monkeypatch.setattr(ops, part, wrong)
    torch.testing.assert_close(decoded(monkeypatch, **ROUTED[name]), expected)
    assert "routing in kernels chooses or computes something else" in caplog.text


@pytest.mark.parametrize("name", ["renormalised", "raw probabilities", "by magnitude", "signed"])
@torch.no_grad()
def test_a_rule_says_what_the_router_does(name: str) -> None:
    mixture = converted(**ROUTED[name])
    layer = next(iter(mixture.layers.values()))
    x = torch.randn(9, layer.in_features, device=DEVICE)
    hidden = layer.experts.columns().shrink(x)  # type: ignore[union-attr, operator]
    rule, context = layer.router.rule(), RouteContext((1, 9), activations=hidden)  # type: ignore[union-attr]
    assert rule is not None
    said, done = rule.decide(x, hidden), layer.router.eval()(x, context)  # type: ignore[misc]
    assert torch.equal(said.expert_ids, done.expert_ids)
    torch.testing.assert_close(said.weights, done.weights)
    torch.testing.assert_close(said.logits, done.logits)
    assert said.normalised == done.normalised
