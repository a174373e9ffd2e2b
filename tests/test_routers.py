"""Every registered router against its paper's equation, one token at a time, and against the contract of Routing."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from molex.errors import ConfigError, StateError
from molex.routers import Router, RouterConfig, routers
from molex.routers.arrow import ArrowConfig
from molex.routers.base import BalancedRouter, Gate
from molex.routers.dynamic import DynamicConfig
from molex.routers.implicit import ImplicitConfig
from molex.routers.polytropon import PolytroponConfig
from molex.routers.scalings import ScalingsConfig
from molex.routers.self_activated import SelfActivatedConfig
from molex.routers.sigmoid import SigmoidConfig
from molex.routers.soft import SoftConfig
from molex.routers.staged import StagedConfig, StagedRouter
from molex.routers.task import TaskConfig
from molex.routers.topk import TopKConfig
from molex.routing import RouteContext
from tests.cases import ROUTERS, RouterCase
from tests.close import assert_close
from tests.equations import Token

WIDTH = 6
ROWS, LENGTH = 3, 4
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}

every_router = pytest.mark.parametrize("name", routers)


def built(config: RouterConfig, num_experts: int, dtype: torch.dtype = torch.float64) -> Router:
    """A router in evaluation mode whose parameters and buffers are random."""
    if isinstance(config, ScalingsConfig):
        router: Router = config.build_head(WIDTH, num_experts, num_layers=2)
    else:
        router = config.build(WIDTH, num_experts)
    with torch.no_grad():
        for tensor in [*router.parameters(), *router.buffers()]:
            tensor.copy_(0.7 * torch.randn_like(tensor))
    return router.to(dtype).eval()


def tokens(case: RouterCase, dtype: torch.dtype = torch.float64, rows: int = ROWS) -> tuple[Tensor, RouteContext]:
    """x (T, D) and what the router may know of it; A is a fixed random matrix."""
    x_TD = torch.randn(rows * LENGTH, WIDTH, dtype=dtype)
    return x_TD, context_of(x_TD, case, rows)


def context_of(x: Tensor, case: RouterCase, rows: int = ROWS, **known: Any) -> RouteContext:
    A_ED = torch.randn(case.num_experts, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    task_ids = torch.arange(rows).repeat_interleave(LENGTH) % 2
    known = {"task_ids": task_ids[: len(x)], "activations": x @ A_ED.T.to(x.dtype), **known}
    return RouteContext((rows, len(x) // max(rows, 1)), layer="a.layer", **known)


def case_of(name: str) -> RouterCase:
    assert name in ROUTERS, f"router {name!r} has no row in tests/cases.py"
    return ROUTERS[name]


@every_router
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_weights_and_gradients_are_the_papers(name: str, dtype: torch.dtype) -> None:
    case = case_of(name)
    router = built(case.config, case.num_experts, dtype)
    x_TD, _ = tokens(case, dtype)
    x_TD.requires_grad_()
    ctx = context_of(x_TD, case)
    routing = router(x_TD, ctx)
    routing.check()
    assert ctx.activations is not None
    assert ctx.task_ids is not None
    rows = [case.gates(router, Token(x, ctx.activations[t], int(ctx.task_ids[t]))) for t, x in enumerate(x_TD)]
    truth_TE = torch.stack(rows)
    torch.testing.assert_close(routing.gates(), truth_TE, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert routing.gates().requires_grad == truth_TE.requires_grad
    if not truth_TE.requires_grad:
        return
    upstream_TE = torch.randn_like(truth_TE)
    leaves = [x_TD, *router.parameters()]
    ours = torch.autograd.grad(routing.gates(), leaves, upstream_TE, allow_unused=True, retain_graph=True)
    papers = torch.autograd.grad(truth_TE, leaves, upstream_TE, allow_unused=True)
    for leaf, got, wanted in zip(leaves, ours, papers, strict=True):
        zeros = torch.zeros_like(leaf)
        got, wanted = zeros if got is None else got, zeros if wanted is None else wanted
        torch.testing.assert_close(got, wanted, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@every_router
def test_gradcheck(name: str) -> None:
    case = case_of(name)
    router = built(case.config, case.num_experts)
    x_TD, _ = tokens(case)
    x_TD.requires_grad_()
    parameters = dict(router.named_parameters())

    def gates(x: Tensor, *values: Tensor) -> Tensor:
        replaced = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(router, replaced, (x, context_of(x, case))).gates()

    learns = gates(x_TD, *parameters.values()).requires_grad
    assert learns == (name not in ("constant", "task", "implicit")), "weights without a gradient"
    if learns:
        assert torch.autograd.gradcheck(gates, (x_TD, *parameters.values()))


@every_router
def test_evaluation_is_deterministic(name: str) -> None:
    case = case_of(name)
    router = built(case.config, case.num_experts)
    x_TD, ctx = tokens(case)
    assert torch.equal(router(x_TD, ctx).gates(), router(x_TD, ctx).gates())


@every_router
def test_a_training_forward_keeps_the_contract(name: str) -> None:
    case = case_of(name)
    router = built(case.config, case.num_experts).train()
    x_TD, ctx = tokens(case)
    routing = router(x_TD, ctx)
    routing.check()
    assert routing.expert_ids.shape[0] == len(x_TD)


@every_router
def test_tokens_are_routed_apart(name: str) -> None:
    """Permuting tokens permutes their gates, and what stands at padding changes nobody else's."""
    case = case_of(name)
    router = built(case.config, case.num_experts)
    x_TD, ctx = tokens(case, rows=1)
    gates_TE = router(x_TD, ctx).gates()
    order_T = torch.randperm(len(x_TD))
    permuted_TE = router(x_TD[order_T], context_of(x_TD[order_T], case, rows=1)).gates()
    torch.testing.assert_close(permuted_TE, gates_TE[order_T])
    mask_T = torch.tensor([False, True, True, True])
    padded_TD = x_TD.where(mask_T[:, None], 1e3)
    padded_TE = router(padded_TD, context_of(padded_TD, case, rows=1, token_mask=mask_T)).gates()
    torch.testing.assert_close(padded_TE[mask_T], gates_TE[mask_T])


@every_router
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [False, True], ids=["float32 weights", "cast weights"])
def test_weights_are_float32_in_16_bits(name: str, dtype: torch.dtype, cast: bool) -> None:
    case = case_of(name)
    router = built(case.config, case.num_experts, torch.float32)
    router = router.to(dtype) if cast else router
    x_TD, _ = tokens(case, dtype)
    for x in (x_TD, 1000 * x_TD):
        routing = router(x, context_of(x, case))
        routing.check()
        assert routing.weights.dtype == torch.float32
        assert routing.logits is None or routing.logits.dtype == torch.float32


@every_router
def test_autocast_does_not_reach_in(name: str) -> None:
    case = case_of(name)
    router = built(case.config, case.num_experts, torch.float32)
    x_TD, ctx = tokens(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = router(x_TD, ctx)
    assert torch.equal(inside.gates(), router(x_TD, ctx).gates())


@every_router
@pytest.mark.parametrize("count", [0, 1])
def test_no_token_and_one_token(name: str, count: int) -> None:
    case = case_of(name)
    router = built(case.config, case.num_experts)
    for mode in (True, False):
        router.train(mode)
        x_TD = torch.randn(count, WIDTH, dtype=torch.float64)
        router(x_TD, context_of(x_TD, case, rows=count)).check()


@every_router
def test_zero_tokens_have_finite_weights_and_gradients(name: str) -> None:
    """What a row of padding looks like after a norm."""
    case = case_of(name)
    router = built(case.config, case.num_experts)
    x_TD = torch.zeros(LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    routing = router(x_TD, context_of(x_TD, case, rows=1))
    routing.check()
    if routing.weights.requires_grad:
        routing.weights.sum().backward()
        grads = [leaf.grad for leaf in (x_TD, *router.parameters()) if leaf.grad is not None]
        assert all(bool(grad.isfinite().all()) for grad in grads)


@every_router
def test_one_expert(name: str) -> None:
    """E = 1 works or is refused in words."""
    small = {"top_k": 1, "keep_top_k": 1, "rank_partition": 1}
    config = case_of(name).config
    fields = {key: value for key, value in small.items() if hasattr(config, key)}
    case = RouterCase(type(config)(**fields), case_of(name).gates, "one expert", num_experts=1)
    if name == "task":
        with pytest.raises(ConfigError, match="num_experts >= 2"):
            built(case.config, 1)
        return
    router = built(case.config, 1)
    x_TD = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    router(x_TD, context_of(x_TD, case, rows=1, task_ids=torch.zeros(LENGTH, dtype=torch.long))).check()


@pytest.mark.parametrize("top_k", [0, 5, 2.0])
@pytest.mark.parametrize("config", [TopKConfig, SigmoidConfig, ImplicitConfig, ArrowConfig, StagedConfig])
def test_top_k_must_fit(config: Any, top_k: Any) -> None:
    with pytest.raises(ConfigError, match="top_k"):
        config(top_k=top_k).build(WIDTH, 4)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: TaskConfig(mode="both"), "mode"),  # type: ignore[arg-type]
        (lambda: StagedConfig(stage="warm"), "stage"),  # type: ignore[arg-type]
        (lambda: SoftConfig(gate_init="zeros").build(WIDTH, 2), "gate_init"),  # type: ignore[arg-type]
        (lambda: TopKConfig(temperature=0), "temperature"),
        (lambda: TopKConfig(jitter=1), "jitter"),
        (lambda: DynamicConfig(entropy_index=3), "entropy_index"),
        (lambda: DynamicConfig(keep_top_k=9).build(WIDTH, 4), "top_k"),
        (lambda: SigmoidConfig(rank_partition=3).build(WIDTH, 8), "rank_partition"),
        (lambda: SelfActivatedConfig(top_k=0), "top_k"),
        (lambda: PolytroponConfig(num_tasks=0), "num_tasks"),
        (lambda: ScalingsConfig(head_dropout=1), "head_dropout"),
        (lambda: ScalingsConfig(top_k=9).build_head(WIDTH, 4, 2), "top_k"),
        (lambda: ScalingsConfig().build(WIDTH, 4), "build_head"),
    ],
)
def test_wrong_settings_are_named(make: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make()


@pytest.mark.parametrize("config", [TaskConfig(), StagedConfig(stage="hard"), PolytroponConfig(num_tasks=2)])
def test_tasks_are_asked_for_and_checked(config: RouterConfig) -> None:
    router = config.build(WIDTH, 3)
    x_TD = torch.randn(2, WIDTH)
    with pytest.raises(StateError, match="set_tasks"):
        router(x_TD, RouteContext((1, 2)))
    for wrong in (-1, 3):
        with pytest.raises(ConfigError, match="task id"):
            router(x_TD, RouteContext((1, 2), task_ids=torch.tensor([0, wrong])))


@pytest.mark.parametrize(
    ("probabilities", "kept"),
    [
        ([1 / 6] * 6, [0, 1, 2, 3, 4, 5]),
        ([0.4, 0.3, 0.1, 0.1, 0.05, 0.05], [0, 1]),
        ([0.7, 0.1, 0.05, 0.05, 0.05, 0.05], [0, 1]),
        ([0.95, 0.01, 0.01, 0.01, 0.01, 0.01], [0, 1]),
        ([0.8, 0.15, 0.02, 0.01, 0.01, 0.01], [0, 1]),
    ],
)
def test_dynmoles_vectors(probabilities: list[float], kept: list[int]) -> None:
    """What the released code keeps, with the raw probabilities as weights."""
    p_E = torch.tensor(probabilities, dtype=torch.float64)
    router = DynamicConfig().build(6, 6).double()
    router.gate.weight.data = torch.eye(6, dtype=torch.float64)  # type: ignore[union-attr]
    routing = router(p_E.log()[None], RouteContext((1, 1)))
    gates_E = routing.gates()[0]
    torch.testing.assert_close(gates_E[kept], p_E[kept])
    assert float(gates_E.sum()) == pytest.approx(float(p_E[kept].sum()))


def test_threshold_one_never_routes_softly() -> None:
    router = DynamicConfig(entropy_threshold=1, entropy_index=0.1).build(WIDTH, 4)
    gates_TE = router(torch.zeros(2, WIDTH), RouteContext((1, 2))).gates()
    assert (gates_TE > 0).sum(1).tolist() == [3, 3]  # top_p = 0.75 of even probabilities


def test_jitter_acts_in_training_only() -> None:
    router = TopKConfig(top_k=1, renormalise=False, jitter=0.5).build(WIDTH, 4)
    x_TD, ctx = torch.randn(5, WIDTH), RouteContext((1, 5))
    assert not torch.equal(router(x_TD, ctx).weights, router(x_TD, ctx).weights)
    router.eval()
    assert torch.equal(router(x_TD, ctx).weights, router(x_TD, ctx).weights)


def test_balance_moves_the_bias_against_the_load_and_only_when_told() -> None:
    for config in (SigmoidConfig(top_k=2, bias_rate=0.25), ImplicitConfig(top_k=2, bias_rate=0.25)):
        router = config.build(WIDTH, 4).train()
        assert isinstance(router, BalancedRouter)
        router(*tokens(RouterCase(config, ROUTERS["implicit"].gates, "")))
        assert router.bias.tolist() == [0, 0, 0, 0]
        router.balance(torch.tensor([6.0, 2.0, 0.0, 0.0]))
        assert router.bias.tolist() == [-0.25, 0, 0.25, 0.25]
        assert not router.bias.requires_grad


def test_biases_and_prototypes_survive_a_cast() -> None:
    router = SigmoidConfig(top_k=2).build(WIDTH, 4).to(torch.bfloat16)
    assert isinstance(router, BalancedRouter)
    for _ in range(100):
        router.balance(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(router.bias, torch.tensor([-1e-3, 1e-3, 1e-3, 1e-3]))
    arrow = ArrowConfig(top_k=1).build(WIDTH, 2).to(torch.float16)
    assert arrow.prototypes.dtype == torch.float32


def test_smoras_bias_may_stay_out_of_the_weight() -> None:
    router = SigmoidConfig(top_k=2, bias_in_weight=False).build(WIDTH, 4).double()
    router.bias += torch.tensor([0.0, 9.0, 9.0, 0.0])  # type: ignore[misc]
    x_TD = torch.randn(5, WIDTH, dtype=torch.float64)
    q_TE = (x_TD @ router.gate.weight.T).sigmoid()  # type: ignore[union-attr]
    gates_TE = router(x_TD, RouteContext((1, 5))).gates()
    torch.testing.assert_close(gates_TE[:, 1:3], q_TE[:, 1:3] / q_TE[:, 1:3].sum(1, keepdim=True))


def test_flylora_chooses_by_magnitude_and_signed_on_request() -> None:
    ctx = RouteContext((1, 1), activations=torch.tensor([[-3.0, 1.0, 2.0, 0.5]]))
    x_TD = torch.zeros(1, WIDTH)
    assert ImplicitConfig(top_k=2).build(WIDTH, 4)(x_TD, ctx).expert_ids.tolist() == [[0, 2]]
    assert ImplicitConfig(top_k=2, signed=True).build(WIDTH, 4)(x_TD, ctx).expert_ids.tolist() == [[2, 1]]


def test_moram_drops_nothing_in_training() -> None:
    router = SelfActivatedConfig(top_k=2, threshold=0.99).build(WIDTH, 4)
    ctx = RouteContext((1, 1), activations=torch.tensor([[-3.0, 1.0, 2.0, 0.5]]))
    assert router.train()(torch.zeros(1, WIDTH), ctx).expert_ids.tolist() == [[2, 1]]
    assert router.eval()(torch.zeros(1, WIDTH), ctx).expert_ids.tolist() == [[-1, -1]]


def test_staged_trains_hard_then_dense() -> None:
    router = StagedConfig(top_k=2).build(WIDTH, 4)
    assert isinstance(router, StagedRouter)
    x_TD, ctx = torch.randn(3, WIDTH), RouteContext((1, 3), task_ids=torch.tensor([2, 0, 3]))
    torch.testing.assert_close(router(x_TD, ctx).gates(), (x_TD @ router.gate.weight.T).softmax(-1))
    router.stage = "hard"
    assert router(x_TD, ctx).gates().argmax(1).tolist() == [2, 0, 3]
    assert router(x_TD, ctx).gates().sum(1).tolist() == [1, 1, 1]


def test_matrix_mode_uses_the_tasks_expert_alone() -> None:
    router = TaskConfig(mode="matrix").build(WIDTH, 3)
    ctx = RouteContext((1, 3), task_ids=torch.tensor([2, 0, 1]))
    assert router(torch.zeros(3, WIDTH), ctx).expert_ids.tolist() == [[2], [0], [1]]


def test_a_relaxed_draw_is_shared_by_a_sequence_and_follows_its_task() -> None:
    """Padding has task 0, on whichever side it stands; a packed row holds several sequences."""
    router = PolytroponConfig(num_tasks=2).build(WIDTH, 3)
    router.task_logits.data = torch.tensor([[-20.0, -20.0, 20.0], [20.0, 20.0, -20.0]])
    x_TD = torch.randn(6, WIDTH)
    left_padded = RouteContext((2, 3), task_ids=torch.tensor([0, 1, 1, 0, 0, 0]))
    gates_TE = router(x_TD, left_padded).gates()
    assert torch.equal(gates_TE[1], gates_TE[2])
    assert bool((gates_TE[1:3, 2] < 1e-3).all()), "the row's task is 1"
    router.task_logits.data.zero_()
    tasks, segments = torch.zeros(6, dtype=torch.long), torch.tensor([0, 0, 0, 0, 1, 1])
    packed_TE = router(x_TD, RouteContext((1, 6), task_ids=tasks, segment_ids=segments)).gates()
    assert torch.equal(packed_TE[0], packed_TE[3])
    assert torch.equal(packed_TE[4], packed_TE[5])
    assert not torch.equal(packed_TE[3], packed_TE[4])


def test_relaxed_draws_have_the_bernoullis_mean() -> None:
    """E[sigmoid(l + logistic noise)] against its numerical integral."""
    router = PolytroponConfig(num_tasks=1).build(WIDTH, 2)
    router.task_logits.data = torch.tensor([[1.5, 0.0]])
    rows = 20000
    x_TD = torch.zeros(rows, WIDTH)
    gates_TE = router(x_TD, RouteContext((rows, 1), task_ids=torch.zeros(rows, dtype=torch.long))).gates()
    grid = (torch.arange(1000) + 0.5) / 1000
    noise = grid.log() - (-grid).log1p()
    first, second = (1.5 + noise).sigmoid()[:, None], noise.sigmoid()[None]
    assert float(gates_TE[:, 0].mean()) == pytest.approx(float((first / (first + second)).mean()), abs=0.01)


def test_arrow_learns_the_top_right_singular_vector() -> None:
    router = ArrowConfig(top_k=2).build(WIDTH, 3).double()
    A_RD, B_OR = torch.randn(2, WIDTH).double(), torch.randn(5, 2).double()
    router.learn_expert(1, A_RD, B_OR)  # type: ignore[operator]
    top_D = torch.linalg.svd(B_OR @ A_RD).Vh[0]
    prototype_D = router.prototypes[1].double()  # type: ignore[index]
    assert float((prototype_D @ top_D).abs()) == pytest.approx(1, abs=1e-6)
    router.learn_expert(2, A_RD, torch.zeros_like(B_OR))  # type: ignore[operator]
    assert float(router.prototypes[2].abs().sum()) == 0, "an expert that adds nothing has no direction"  # type: ignore[index]


def test_xloras_kept_weights() -> None:
    head_input = torch.randn(5, WIDTH, dtype=torch.float64)
    router = built(ScalingsConfig(top_k=2), 4)
    assert isinstance(router.head, torch.nn.Sequential)
    p_TE = router.head(head_input).softmax(-1)
    best_TK = p_TE.topk(2).values
    assert torch.equal(router(head_input, RouteContext((1, 5))).weights, best_TK), "not renormalised"
    again = built(ScalingsConfig(top_k=2, softmax_top_k=True), 4)
    again.load_state_dict(router.state_dict())
    torch.testing.assert_close(again(head_input, RouteContext((1, 5))).weights, best_TK.softmax(-1))
    raw = built(ScalingsConfig(softmax=False), 4)
    raw.load_state_dict(router.state_dict())
    torch.testing.assert_close(raw(head_input, RouteContext((1, 5))).gates(), router.head(head_input))


def test_xlora_gives_every_layer_its_own_or_the_same() -> None:
    hidden_TD = torch.randn(3, WIDTH, dtype=torch.float64)
    for layerwise in (True, False):
        router = built(ScalingsConfig(layerwise=layerwise), 4)
        first, second = router.decide(hidden_TD)  # type: ignore[operator]
        assert torch.equal(first.weights, second.weights) != layerwise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gate_keeps_no_wider_copy_of_its_input(dtype: torch.dtype) -> None:
    """In 16 bits the product is float32; what is saved for the backward is x itself."""
    x = torch.randn(7, 12).to(dtype).requires_grad_()
    gate, kept = Gate(12, 5), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        logits = gate(x)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), gate.weight.data_ptr()}
    grad = torch.randn(7, 5)
    d_x, d_weight = torch.autograd.grad(logits, [x, gate.weight], grad)
    assert (logits.dtype, d_x.dtype, d_weight.dtype) == (torch.float32, dtype, torch.float32)
    assert_close("logits", logits, x.double() @ gate.weight.double().T, F.linear(x.float(), gate.weight))
    assert_close("d weight", d_weight, grad.double().T @ x.double(), grad.T @ x.float())
    assert_close("d x", d_x, grad.double() @ gate.weight.double(), (grad @ gate.weight).to(dtype))
