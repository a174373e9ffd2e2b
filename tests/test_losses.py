"""Every registered loss against its paper's equation, its closed forms and the papers' published values."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from molex.entropy import normalised_entropy
from molex.errors import ConfigError, StateError
from molex.losses import (
    Entropy,
    LoadBalance,
    LocalizedBalance,
    Loss,
    SpecialisationBalance,
    TaskCrossEntropy,
    losses,
)
from molex.routing import Decision, RouteContext, Routing, Trace
from tests import equations as eq
from tests.cases import LOSSES, LossCase

ROWS, LENGTH, NUM_EXPERTS = 4, 6, 4
LINEARS = [f"model.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in ("up", "down")]

every_loss = pytest.mark.parametrize("name", losses)


def case_of(name: str) -> LossCase:
    assert name in LOSSES, f"loss {name!r} has no row in tests/cases.py"
    return LOSSES[name]


def context(mask: Tensor | None = None, rows: int = ROWS, length: int = LENGTH) -> RouteContext:
    """Rows of tasks 0, 1, 0, 1."""
    tasks = (torch.arange(rows) % 2).repeat_interleave(length)
    return RouteContext((rows, length), token_mask=mask, task_ids=tasks, layer="a.layer")


def routed(logits: Tensor, top_k: int, ctx: RouteContext) -> Decision:
    weights_TK, ids_TK = logits.softmax(-1).topk(top_k)
    return Decision(Routing(ids_TK, weights_TK, logits, logits.shape[1]), ctx)


def random_trace(case: LossCase, mask: Tensor | None = None, num_experts: int = NUM_EXPERTS) -> dict[str, Decision]:
    shape = (ROWS * LENGTH, num_experts)
    top_k = num_experts if case.top_k == NUM_EXPERTS else case.top_k
    leaves = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name in LINEARS}
    return {name: routed(logits, top_k, context(mask)) for name, logits in leaves.items()}


def value(loss: Any, trace: Trace) -> float:
    return float(loss(trace).detach())


@every_loss
def test_value_and_gradient_are_the_papers(name: str) -> None:
    case = case_of(name)
    mask = torch.rand(ROWS * LENGTH) > 0.3
    for mask_T in (None, mask):
        trace = random_trace(case, mask_T)
        ours, papers = case.config(trace), case.value(case.config, trace)
        torch.testing.assert_close(ours, papers, rtol=1e-10, atol=1e-10)
        logits = [d.routing.logits for d in trace.values()]
        got = torch.autograd.grad(ours, logits, retain_graph=True)  # type: ignore[arg-type]
        for mine, wanted in zip(got, torch.autograd.grad(papers, logits), strict=True):  # type: ignore[arg-type]
            torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-10)


@every_loss
def test_gradcheck(name: str) -> None:
    case = case_of(name)
    ctx = context(torch.rand(ROWS * LENGTH) > 0.3)

    def loss(logits: Tensor) -> Tensor:
        return case.config({LINEARS[0]: routed(logits, case.top_k, ctx)})

    assert torch.autograd.gradcheck(loss, torch.randn(ROWS * LENGTH, NUM_EXPERTS).double().requires_grad_())


@every_loss
def test_closed_forms(name: str) -> None:
    case = case_of(name)
    tokens, chosen = ROWS * LENGTH, torch.arange(case.top_k)
    even_TK = (torch.arange(tokens)[:, None] + chosen) % NUM_EXPERTS
    even = Routing(
        even_TK, torch.full((tokens, case.top_k), 1 / case.top_k), torch.zeros(tokens, NUM_EXPERTS), NUM_EXPERTS
    )
    sure_TE = torch.tensor([50.0, 0, 0, 0]).expand(tokens, -1)
    same = Routing(chosen.expand(tokens, -1), sure_TE.softmax(-1)[:, : case.top_k], sure_TE, NUM_EXPERTS)
    for routing, expected in ((even, case.uniform), (same, case.collapsed)):
        assert value(case.config, dict.fromkeys(LINEARS, Decision(routing, context()))) == pytest.approx(
            expected, abs=1e-4
        )


@every_loss
def test_padding_does_not_count(name: str) -> None:
    """A padded batch has the loss of the batch without padding, whatever stands in the padding."""
    case = case_of(name)
    trace = random_trace(case)
    padded = {}
    for linear, decision in trace.items():
        logits = decision.routing.logits
        assert logits is not None
        wide = torch.full((ROWS, LENGTH + 2, NUM_EXPERTS), 30.0, dtype=torch.float64)
        wide[..., 1] = -30.0
        wide[:, 2:] = logits.detach().view(ROWS, LENGTH, -1)
        mask = torch.ones(ROWS, LENGTH + 2, dtype=torch.bool)
        mask[:, :2] = False
        padded[linear] = routed(wide.flatten(0, 1), case.top_k, context(mask.flatten(), length=LENGTH + 2))
    assert value(case.config, padded) == pytest.approx(value(case.config, trace), rel=1e-10)


@every_loss
def test_rows_of_padding_alone_are_finite(name: str) -> None:
    case = case_of(name)
    nothing = torch.zeros(ROWS * LENGTH, dtype=torch.bool)
    one_row = nothing.clone()
    one_row[:LENGTH] = True
    for mask in (nothing, one_row):
        trace = random_trace(case, mask)
        loss = case.config(trace)
        loss.backward()
        assert bool(loss.isfinite())
        for decision in trace.values():
            assert decision.routing.logits is not None
            assert bool(decision.routing.logits.isfinite().all())


@every_loss
def test_no_token_at_all(name: str) -> None:
    case = case_of(name)
    empty = routed(torch.zeros(0, NUM_EXPERTS, requires_grad=True), case.top_k, context(rows=0))
    assert bool(case.config({LINEARS[0]: empty}).isfinite())


@every_loss
def test_is_float32_under_autocast(name: str) -> None:
    case = case_of(name)
    trace = {n: routed(torch.randn(ROWS * LENGTH, NUM_EXPERTS), case.top_k, context()) for n in LINEARS}
    with torch.autocast("cpu", torch.bfloat16):
        inside = case.config(trace)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, case.config(trace))


@every_loss
def test_layers_of_unlike_sizes(name: str) -> None:
    case = case_of(name)
    trace = random_trace(case)
    wider = random_trace(case, num_experts=6)
    mixed = {**trace, **{n.replace("layers.", "layers.1"): d for n, d in wider.items()}}
    torch.testing.assert_close(case.config(mixed), case.value(case.config, mixed))


def test_balance_over_a_model_weighs_groups_of_unlike_layers_by_their_number() -> None:
    case = case_of("load_balance")
    few, many = random_trace(case), random_trace(case, num_experts=6)
    more = {f"{n}{i}": d for n, d in many.items() for i in range(3)}
    loss = LoadBalance(balance_coefficient=1.0)
    expected = (len(few) * loss(few) + len(more) * loss(more)) / (len(few) + len(more))
    torch.testing.assert_close(loss({**few, **more}), expected)
    assert float((loss(few) - loss(more)).abs()) > 1e-3


@pytest.mark.parametrize("loss", [LocalizedBalance(localized_coefficient=0.0), TaskCrossEntropy(task_coefficient=0.0)])
def test_a_coefficient_of_zero_asks_for_no_tasks(loss: Loss) -> None:
    without_tasks = dataclasses.replace(context(length=8), task_ids=None)
    assert float(loss(uniform_trace(5, 2, LINEARS, without_tasks))) == 0.0


def uniform_trace(num_experts: int, top_k: int, linears: list[str], ctx: RouteContext) -> Trace:
    tokens = ctx.shape[0] * ctx.shape[1]
    ids_TK = (torch.arange(tokens)[:, None] + torch.arange(top_k)) % num_experts
    weights_TK = torch.full((tokens, top_k), 1 / num_experts if top_k == num_experts else 1 / top_k)
    routing = Routing(ids_TK, weights_TK, torch.zeros(tokens, num_experts), num_experts)
    return dict.fromkeys(linears, Decision(routing, ctx))


def test_mixloras_published_minimum() -> None:
    """2.0 · coefficient at uniform routing with k = 2, over however many layers."""
    trace = uniform_trace(8, 2, LINEARS, context(length=8))
    assert value(LoadBalance(balance_coefficient=1e-2), trace) == pytest.approx(2e-2)


def test_molas_published_minimum() -> None:
    """1 per block, summed: 32 for a model of 32 blocks."""
    linears = [f"model.layers.{layer}.q_proj" for layer in range(32)]
    loss = LoadBalance(balance_coefficient=1, balance_over="block", balance_counts="shares")
    assert value(loss, uniform_trace(8, 2, linears, context(length=8))) == pytest.approx(32)


def test_loramoes_published_value() -> None:
    """0.010435 per linear at E = 6, δ = 0.1, 4 samples, two of each type, uniform gates."""
    loss = LocalizedBalance(localized_coefficient=1, delta=0.1)
    assert value(loss, uniform_trace(6, 6, LINEARS[:1], context())) == pytest.approx(0.010435, abs=5e-7)


@pytest.mark.parametrize(
    ("probabilities", "entropy"),
    [
        ([1 / 6] * 6, 0.9997),
        ([0.4, 0.3, 0.1, 0.1, 0.05, 0.05], 0.8292),
        ([0.7, 0.1, 0.05, 0.05, 0.05, 0.05], 0.5902),
        ([0.95, 0.01, 0.01, 0.01, 0.01, 0.01], 0.1418),
        ([0.8, 0.15, 0.02, 0.01, 0.01, 0.01], 0.3723),
    ],
)
def test_dynmoles_published_entropies(probabilities: list[float], entropy: float) -> None:
    p_E = torch.tensor(probabilities, dtype=torch.float64)
    assert float(normalised_entropy(p_E, 1.1)) == pytest.approx(entropy, abs=5e-5)
    loss = Entropy(entropy_coefficient=1)
    assert value(loss, {"a": routed(p_E.log()[None], 2, context(rows=1, length=1))}) == pytest.approx(entropy, abs=5e-5)


def test_shannon_is_the_limit_at_one() -> None:
    p_TE = torch.randn(5, 6, dtype=torch.float64).softmax(-1)
    shannon_T, near_T = (normalised_entropy(p_TE, q, eps=0) for q in (1.0, 1 + 1e-7))
    torch.testing.assert_close(shannon_T, near_T, rtol=1e-5, atol=1e-6)
    assert float(normalised_entropy(torch.full((4,), 0.25), 1.0)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("counts", ["slots", "shares", "weights"])
@pytest.mark.parametrize("over", ["model", "block"])
def test_every_form_of_load_balance(counts: Any, over: Any) -> None:
    loss = LoadBalance(balance_coefficient=0.5, balance_over=over, balance_counts=counts)
    trace = random_trace(LOSSES["load_balance"], torch.rand(ROWS * LENGTH) > 0.3)
    torch.testing.assert_close(loss(trace), eq.load_balance(loss, trace))


@pytest.mark.parametrize("q", [0, 2.5, 1.001])
def test_entropy_index_has_a_range(q: float) -> None:
    with pytest.raises(ConfigError, match="entropy_index"):
        Entropy(entropy_index=q)


def test_counts_have_no_gradient_but_soft_mass_has() -> None:
    """DynMoLE's F is the routed weight: its gradient is part of the loss's."""
    logits = torch.randn(ROWS * LENGTH, NUM_EXPERTS, dtype=torch.float64, requires_grad=True)
    decision = routed(logits, 2, context())
    constant = decision._replace(routing=decision.routing._replace(weights=decision.routing.weights.detach()))
    for counts, same in (("slots", True), ("weights", False)):
        loss = LoadBalance(balance_counts=counts)  # type: ignore[arg-type]
        (full,) = torch.autograd.grad(loss({"a": decision}), logits, retain_graph=True)
        (partial,) = torch.autograd.grad(loss({"a": constant}), logits, retain_graph=True)
        assert torch.allclose(full, partial) == same


@pytest.mark.parametrize("loss", [LoadBalance(), LoadBalance(balance_counts="weights"), SpecialisationBalance()])
def test_descent_takes_load_from_the_crowded_expert(loss: Any) -> None:
    logits = torch.zeros(ROWS * LENGTH, NUM_EXPERTS)
    logits[:, 2] = 1.0
    logits.requires_grad_()
    loss({"a": routed(logits, 1, context())}).backward()
    assert logits.grad is not None
    assert bool((logits.grad[:, 2] > 0).all())


def test_the_sign_of_lora_mixers_entropy_is_an_option() -> None:
    trace = random_trace(LOSSES["specialisation_balance"])
    flatter, sharper = (
        value(SpecialisationBalance(specialisation_coefficient=1, entropy_weight=w, entropy_sign=sign), trace)
        for w, sign in ((0.3, "paper"), (0.3, "specialise"))
    )
    spread = (sharper - flatter) / 0.6
    p = torch.stack([d.routing.logits.softmax(-1) for d in trace.values() if d.routing.logits is not None])
    assert spread == pytest.approx(float(-(p * p.log()).sum(-1).mean()))


def test_a_hard_stage_has_no_specialisation_loss() -> None:
    decision = routed(torch.zeros(24, NUM_EXPERTS), 1, context())
    hard = decision._replace(routing=decision.routing._replace(logits=None))
    assert value(SpecialisationBalance(), {"a": hard}) == 0
    with pytest.raises(StateError, match="logits"):
        LoadBalance()({"a": hard})


def test_matching_experts_get_less_mass_as_the_fact_sheet_found() -> None:
    """Minimising the constraint makes Q proportional to 1 / I: the matched half ends at (1 - δ) / (1 + δ)."""
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    ctx = RouteContext((1, 1), task_ids=torch.tensor([1]), layer="a")
    optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        p_TE = logits.softmax(-1)
        ids = torch.arange(4)[None]
        loss = LocalizedBalance(localized_coefficient=1)({"a": Decision(Routing(ids, p_TE, logits, 4), ctx)})
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)  # type: ignore[arg-type]
    p_E = logits.softmax(-1)[0]
    assert float(p_E[0] / p_E[2]) == pytest.approx(0.9 / 1.1, rel=1e-4)


def test_the_papers_variance_over_mean() -> None:
    loss = LocalizedBalance(squared_mean=False)
    trace = random_trace(LOSSES["localized_balance"])
    torch.testing.assert_close(loss(trace), eq.localized_balance(loss, trace))


def test_packed_sequences_are_samples_of_their_own() -> None:
    """Two sequences in one row have the losses of two rows; no label crosses their border."""
    logits = torch.randn(2 * LENGTH, 4, dtype=torch.float64)
    tasks = torch.tensor([0, 1]).repeat_interleave(LENGTH)
    apart = RouteContext((2, LENGTH), task_ids=tasks, layer="a")
    packed = RouteContext((1, 2 * LENGTH), task_ids=tasks, segment_ids=tasks.clone(), layer="a")
    for loss, top_k in ((LocalizedBalance(), 4), (TaskCrossEntropy(), 2)):
        values = [value(loss, {"a": routed(logits, top_k, ctx)}) for ctx in (apart, packed)]
        assert values[0] == pytest.approx(values[1], rel=1e-10)


def test_meteoras_labels_are_the_next_tokens() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64)
    ctx = RouteContext((1, 3), task_ids=torch.tensor([3, 1, 2]), layer="a")
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 1] + log_p[1, 2]) / 2
    assert value(TaskCrossEntropy(task_coefficient=1), {"a": routed(logits, 2, ctx)}) == pytest.approx(float(expected))


@pytest.mark.parametrize("loss", [LocalizedBalance(), TaskCrossEntropy()])
def test_task_ids_are_asked_for_and_checked(loss: Any) -> None:
    logits = torch.zeros(4, 4)
    with pytest.raises(StateError, match="set_tasks"):
        loss({"a": routed(logits, 4, RouteContext((1, 4), layer="a"))})
    with pytest.raises(ConfigError, match="task"):
        loss({"a": routed(logits, 4, RouteContext((1, 4), task_ids=torch.full((4,), 7), layer="a"))})


def test_localized_balance_needs_two_halves() -> None:
    with pytest.raises(ConfigError, match="odd"):
        LocalizedBalance()({"a": routed(torch.zeros(24, 3), 3, context())})


@pytest.mark.parametrize(
    "setting",
    [(LoadBalance, "balance_over"), (LoadBalance, "balance_counts"), (SpecialisationBalance, "entropy_sign")],
)
def test_unknown_choices_are_refused(setting: tuple[Any, str]) -> None:
    with pytest.raises(ConfigError, match=setting[1]):
        setting[0](**{setting[1]: "other"})


def test_settings_of_losses_do_not_collide() -> None:
    """Overrides are flat: two losses must not share a setting's name by accident."""
    names = [f.name for name in losses for f in dataclasses.fields(losses[name])]
    assert len(names) == len(set(names))
