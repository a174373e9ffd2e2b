"""Every registered expert kind against its paper's equation, token by token, with every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molex
from molex.errors import ConfigError, TargetError
from molex.experts import ExpertBank, ExpertsConfig, LayerShape, LoRA, expert_kinds
from molex.experts.averaged import AveragedConfig
from molex.experts.dora import DoRAConfig
from molex.experts.lora import LoRABank, LoRAConfig
from molex.experts.shards import ShardBank, ShardPool, ShardsConfig
from molex.experts.shared_a import SharedAConfig
from molex.experts.sparse_a import SparseABank, SparseAConfig
from molex.kernels import Planner
from molex.routing import Routing, dense_routing
from tests.cases import EXPERTS, ExpertsCase
from tests.close import assert_close

WIDTH, OUT, TOKENS = 8, 6, 5
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}

every_kind = pytest.mark.parametrize("name", expert_kinds)


def case_of(name: str) -> ExpertsCase:
    assert name in EXPERTS, f"experts {name!r} have no row in tests/cases.py"
    return EXPERTS[name]


def shape_of(base: nn.Linear, ranks: tuple[int, ...], scales: tuple[float, ...], dropout: float = 0.0) -> LayerShape:
    dtype = torch.promote_types(base.weight.dtype, torch.float32)
    return LayerShape("a.layer", base, WIDTH, OUT, ranks, scales, dropout, torch.device("cpu"), dtype)


def built(case: ExpertsCase, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> tuple[ExpertBank, nn.Linear]:
    """A bank at its start, and the base it stands on. Scales differ where the kind allows it and are no powers of 2."""
    base = nn.Linear(WIDTH, OUT, dtype=dtype).requires_grad_(False)
    alike = isinstance(case.config, AveragedConfig)
    scales = tuple(2 / 3 + (0 if alike else expert / 7) for expert in range(len(case.ranks)))
    bank = case.config.build(shape_of(base, case.ranks, scales, dropout))
    if isinstance(bank, ShardBank):
        assert isinstance(case.config, ShardsConfig)
        bank.join_pool(ShardPool(case.config, 2, shape_of(base, case.ranks, scales)), layer=1)
    return bank, base


def parameters_of(bank: ExpertBank) -> dict[str, nn.Parameter]:
    pool = bank.pool.named_parameters() if isinstance(bank, ShardBank) else ()
    return dict([*bank.named_parameters(), *pool])


def randomised(bank: ExpertBank) -> ExpertBank:
    for parameter in parameters_of(bank).values():
        parameter.data = 0.5 * torch.randn_like(parameter)
    return bank


def copied(case: ExpertsCase, bank: ExpertBank, base: nn.Linear, dtype: torch.dtype) -> tuple[ExpertBank, nn.Linear]:
    """The same bank and base, all in one dtype."""
    twin, twin_base = built(case)
    for leaf, parameter in parameters_of(twin).items():
        parameter.data = parameters_of(bank)[leaf].detach().to(dtype)
    twin.scale = bank.scale.to(dtype)
    if isinstance(twin, ShardBank) and isinstance(bank, ShardBank):
        twin.index_A, twin.index_B = bank.index_A, bank.index_B
    twin_base.load_state_dict(base.state_dict())
    return twin, twin_base.to(dtype)


def gates_for(case: ExpertsCase, dtype: torch.dtype = torch.float64) -> Tensor:
    """(T, heads · E): some experts serve nobody, one token has nobody."""
    gates_TE = torch.rand(TOKENS, case.heads * len(case.ranks), dtype=dtype)
    gates_TE[1], gates_TE[2, ::2] = 0, 0
    return gates_TE


def run(bank: ExpertBank, base: nn.Module, x: Tensor, gates: Tensor) -> Tensor:
    weights = gates.to(torch.promote_types(gates.dtype, torch.float32))
    ids_TK = dense_routing(weights, None).expert_ids.where(weights != 0, -1)
    routing = Routing(ids_TK, weights * (ids_TK >= 0), None, gates.shape[1])
    return bank(x, base, lambda activations: routing, Planner())


@every_kind
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_output_and_every_gradient_are_the_papers(name: str, dtype: torch.dtype) -> None:
    case = case_of(name)
    bank, base = built(case, dtype)
    randomised(bank)
    x_TD = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    gates_TE = gates_for(case, dtype).requires_grad_()
    y_TO = run(bank, base, x_TD, gates_TE)
    truth_TO = torch.stack([case.row(bank, base, x, gates) for x, gates in zip(x_TD, gates_TE, strict=True)])
    limit = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(y_TO, truth_TO, **limit)
    upstream_TO = torch.randn_like(y_TO)
    leaves = {"x": x_TD, **{n: p for n, p in parameters_of(bank).items() if p.requires_grad}}
    ours = torch.autograd.grad(y_TO, [*leaves.values()], upstream_TO, retain_graph=True)
    papers = torch.autograd.grad(truth_TO, [*leaves.values()], upstream_TO, retain_graph=True)
    for leaf, got, wanted in zip(leaves, ours, papers, strict=True):
        torch.testing.assert_close(got, wanted, **limit, msg=lambda text, leaf=leaf: f"{leaf}: {text}")
    (got,), (wanted,) = (torch.autograd.grad(y, gates_TE, upstream_TO) for y in (y_TO, truth_TO))
    served_TE = gates_TE != 0  # the gate of an expert that is not there has no meaning
    torch.testing.assert_close(got[served_TE], wanted[served_TE], **limit)


@every_kind
def test_gradcheck(name: str) -> None:
    case = case_of(name)
    bank, base = built(case)
    randomised(bank)
    trained = [n for n, p in parameters_of(bank).items() if p.requires_grad]
    names = ["magnitude"] if name == "dora" else trained  # DoRA's norm is a constant for autograd, on purpose
    holders = {n: bank.pool if isinstance(bank, ShardBank) else bank for n in names}
    gates_TE = gates_for(case) + 0.1

    def output(x: Tensor, gates: Tensor, *values: Tensor) -> Tensor:
        before = {n: holders[n]._parameters[n] for n in names}
        for n, value in zip(names, values, strict=True):
            holders[n]._parameters[n] = value  # type: ignore[assignment]
        try:
            return run(bank, base, x, gates)
        finally:
            for n in names:
                holders[n]._parameters[n] = before[n]

    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    inputs = (x_TD, gates_TE.requires_grad_(), *(holders[n]._parameters[n] for n in names))
    assert torch.autograd.gradcheck(output, inputs)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_starts_as_the_base_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    case = case_of(name)
    bank, base = built(case, dtype)
    x_TD = torch.randn(TOKENS, WIDTH).to(dtype)
    assert torch.equal(run(bank, base, x_TD, gates_for(case)), base(x_TD))


@every_kind
def test_dropout_acts_in_training_only(name: str) -> None:
    case = case_of(name)
    bank, base = built(case, dropout=0.5)
    randomised(bank)
    x_TD, gates_TE = torch.randn(TOKENS, WIDTH, dtype=torch.float64), gates_for(case)
    assert not torch.equal(run(bank, base, x_TD, gates_TE), run(bank, base, x_TD, gates_TE))
    bank.eval()
    assert torch.equal(run(bank, base, x_TD, gates_TE), run(bank, base, x_TD, gates_TE))


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [False, True], ids=["float32 weights", "cast weights"])
def test_16_bits(name: str, dtype: torch.dtype, cast: bool) -> None:
    """As close to float64 as the paper's loop in 16 bits; the scale is never rounded."""
    case = case_of(name)
    bank, base = built(case, dtype)
    randomised(bank)
    scale_E = bank.scale.clone()
    if cast:
        bank.to(dtype)
        if isinstance(bank, ShardBank):
            bank.pool.to(dtype)
    assert torch.equal(bank.scale, scale_E)
    x_TD, gates_TE = torch.randn(TOKENS, WIDTH).to(dtype), gates_for(case)
    y_TO = run(bank, base, x_TD, gates_TE)
    loops = {}
    for loop_dtype in (torch.float64, dtype):
        twin, twin_base = copied(case, bank, base, loop_dtype)
        pairs = zip(x_TD.to(loop_dtype), gates_TE.to(loop_dtype), strict=True)
        loops[loop_dtype] = torch.stack([case.row(twin, twin_base, x, gates) for x, gates in pairs]).detach()
    assert_close(name, y_TO.detach(), loops[torch.float64], loops[dtype])


@every_kind
def test_autocast_gives_what_the_base_gives(name: str) -> None:
    case = case_of(name)
    bank, base = built(case, torch.float32)
    x_TD = torch.randn(TOKENS, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        y_TO, base_TO = run(bank, base, x_TD, gates_for(case)), base(x_TD)
    assert y_TO.dtype == torch.bfloat16
    assert torch.equal(y_TO, base_TO)


@every_kind
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (0, 3)])
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    """No token, one token, rows of tokens."""
    case = case_of(name)
    bank, base = built(case)
    x = torch.randn(*shape, WIDTH, dtype=torch.float64, requires_grad=True)
    gates_TE = torch.rand(x.shape[:-1].numel(), case.heads * len(case.ranks), dtype=torch.float64)
    y = run(bank, base, x, gates_TE)
    assert y.shape == (*shape, OUT)
    y.sum().backward()


@every_kind
def test_materialize_is_what_one_expert_adds(name: str) -> None:
    case = case_of(name)
    bank, base = built(case)
    randomised(bank)
    if name == "dora":
        with pytest.raises(ConfigError, match="rescales"):
            bank.materialize(0)
        return
    for expert in range(len(case.ranks)):
        gates_E = torch.eye(len(case.ranks), dtype=torch.float64)[expert].repeat(case.heads)
        x_D = torch.randn(WIDTH, dtype=torch.float64)
        added_O = case.row(bank, base, x_D, gates_E) - base(x_D)
        torch.testing.assert_close(bank.materialize(expert) @ x_D, added_O)
    bank.to(torch.bfloat16)
    assert bank.materialize(0).dtype in (torch.float32, torch.float64)


@every_kind
def test_a_loaded_expert_is_that_lora_or_a_clear_error(name: str) -> None:
    case = case_of(name)
    bank, _ = built(case)
    randomised(bank)
    expert = len(case.ranks) - 1
    others = [bank.materialize(e) for e in range(expert)] if name != "dora" else []
    rank, scale = case.ranks[expert], float(bank.scale[expert])
    A_RD, B_OR = torch.randn(rank, WIDTH).double(), torch.randn(OUT, rank).double()
    if name in ("dora", "shared_a", "shards"):
        with pytest.raises(ConfigError, match="load"):
            bank.load_expert(expert, "law", LoRA(A_RD, B_OR, scale))
        return
    bank.load_expert(expert, "law", LoRA(A_RD, B_OR, scale))
    torch.testing.assert_close(bank.materialize(expert), scale * B_OR @ A_RD)
    assert bank.names[expert] == "law"
    for e, before in enumerate(others):
        assert torch.equal(bank.materialize(e), before), "another expert changed"
    for wrong_id, wrong_A in ((9, A_RD), (-1, A_RD), (expert, torch.randn(rank + 1, WIDTH))):
        with pytest.raises(ConfigError, match="expert"):
            bank.load_expert(wrong_id, "law", LoRA(wrong_A, B_OR, scale))


@every_kind
def test_an_expert_asked_for_by_name_serves_every_head(name: str) -> None:
    """The routing of a request knows experts, not heads; nobody's tokens get the base."""
    case = case_of(name)
    bank, base = built(case)
    randomised(bank)
    ids_TK = torch.tensor([[0], [-1], [len(case.ranks) - 1]])
    routing = Routing(ids_TK, (ids_TK >= 0).double(), None, len(case.ranks))
    x_TD = torch.randn(3, WIDTH, dtype=torch.float64)
    y_TO = bank(x_TD, base, lambda activations: routing, Planner())
    for x_D, y_O, expert in zip(x_TD, y_TO, ids_TK.flatten().tolist(), strict=True):
        gates_E = torch.zeros(len(case.ranks), dtype=torch.float64)
        if expert >= 0:
            gates_E[expert] = 1
        torch.testing.assert_close(y_O, case.row(bank, base, x_D, gates_E.repeat(case.heads)))


@pytest.mark.parametrize(
    ("config", "ranks", "scales"),
    [
        (SharedAConfig(), (2, 3), (1.0, 1.0)),
        (AveragedConfig(), (2, 3), (1.0, 1.0)),
        (AveragedConfig(), (2, 2), (1.0, 2.0)),
        (AveragedConfig(num_heads=4), (2,), (1.0,)),
        (AveragedConfig(num_heads=0), (2,), (1.0,)),
        (ShardsConfig(), (2, 2), (1.0, 1.0)),
    ],
)
def test_shapes_that_cannot_be_are_refused(config: ExpertsConfig, ranks: Any, scales: Any) -> None:
    with pytest.raises(ConfigError):
        config.build(shape_of(nn.Linear(WIDTH, OUT), ranks, scales))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SparseAConfig(top_k=0),
        lambda: ShardsConfig(pool_rank=1, private_rank=2),
        lambda: ShardsConfig(shards_per_vector=0),
        lambda: LoRAConfig(init="zeros"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def test_initial_factors() -> None:
    base = nn.Linear(1000, 10)
    shape = LayerShape("l", base, 1000, 10, (8, 8), (1.0, 1.0), 0.0, torch.device("cpu"), torch.float32)
    kaiming, gaussian = LoRAConfig().build(shape), LoRAConfig(init="gaussian").build(shape)
    assert isinstance(kaiming, LoRABank)
    assert isinstance(gaussian, LoRABank)
    assert float(kaiming.lora_A.abs().max()) == pytest.approx(1000**-0.5, rel=1e-3)
    assert float(gaussian.lora_A.std()) == pytest.approx(1 / 8, rel=0.05)
    averaged = AveragedConfig(num_heads=2).build(shape)
    assert float(averaged.lora_A.abs().max()) == pytest.approx(1000**-0.5, rel=1e-3)  # type: ignore[union-attr]
    pool = ShardPool(ShardsConfig(), 8, shape)
    assert float(pool.pool_A.abs().max()) == pytest.approx(1000**-0.5, rel=1e-3)


def test_each_gaussian_expert_has_the_spread_of_its_own_rank() -> None:
    shape = LayerShape("l", nn.Linear(1000, 10), 1000, 10, (2, 32), (1.0, 1.0), 0.0, torch.device("cpu"), torch.float32)
    bank = LoRAConfig(init="gaussian").build(shape)
    assert isinstance(bank, LoRABank)
    for rows_RD, rank in zip(bank.lora_A.split((2, 32)), (2, 32), strict=True):
        assert float(rows_RD.std()) == pytest.approx(1 / rank, rel=0.1)
    bank.grow((4,), scale=1.0)
    assert float(bank.lora_A.std()) == pytest.approx(1 / 4, rel=0.1)


def test_flyloras_a_is_sparse_frozen_and_of_the_papers_size() -> None:
    base = nn.Linear(4000, 10)
    shape = LayerShape("l", base, 4000, 10, (1,) * 32, (2.0,) * 32, 0.0, torch.device("cpu"), torch.float32)
    bank = SparseAConfig().build(shape)
    assert isinstance(bank, SparseABank)
    assert (bank.lora_A != 0).sum(1).tolist() == [1000] * 32
    assert float(bank.lora_A[bank.lora_A != 0].std()) == pytest.approx(1 / 32, rel=0.02)
    assert not bank.lora_A.requires_grad
    assert bank.lora_B.requires_grad


@pytest.mark.parametrize(("num_experts", "top_k", "kept"), [(32, 8, 128), (64, 8, 64), (64, 16, 128), (128, 8, 32)])
def test_flyloras_sparsity_follows_what_a_token_uses(num_experts: int, top_k: int, kept: int) -> None:
    """D · k / r non-zeros in a row, at every size."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(512, 8)})])})
    config = molex.preset("flylora", num_experts=num_experts, top_k=top_k, targets="up")
    (layer,) = molex.convert(model, config).layers.values()
    assert (layer.experts.lora_A != 0).sum(1).tolist() == [kept] * num_experts
    assert layer.router.config.top_k == top_k


def test_frozen_experts_stay_and_can_still_be_loaded() -> None:
    bank, base = built(ExpertsCase(LoRAConfig(), EXPERTS["lora"].row, "", ranks=(2, 1)))
    assert isinstance(bank, LoRABank)
    randomised(bank)
    before = [bank.materialize(e) for e in range(2)]
    bank.grow((3, 3), scale=0.3)
    bank.grow((1,), scale=0.7)
    assert bank.ranks == (2, 1, 3, 3, 1)
    assert float(bank.materialize(4).abs().sum()) == 0
    optimizer = torch.optim.AdamW([p for p in bank.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    gates_TE = torch.rand(TOKENS, 5, dtype=torch.float64)
    for _ in range(2):
        run(bank, base, torch.randn(TOKENS, WIDTH, dtype=torch.float64), gates_TE).square().sum().backward()
        optimizer.step()
    for e in range(2):
        torch.testing.assert_close(bank.materialize(e), before[e], rtol=0, atol=0)
    assert float(bank.materialize(4).abs().sum()) > 0
    for e, rank in ((0, 2), (2, 3), (4, 1)):
        A_RD, B_OR = torch.randn(rank, WIDTH).double(), torch.randn(OUT, rank).double()
        bank.load_expert(e, "law", LoRA(A_RD, B_OR, 0.5))
        torch.testing.assert_close(bank.materialize(e), 0.5 * B_OR @ A_RD)


def test_shards_are_drawn_as_the_paper_says() -> None:
    """Public ones without repetition, A and B apart, private ones the layer's own alone."""
    config = ShardsConfig(pool_rank=3, private_rank=1, shards_per_vector=2)
    shape = shape_of(nn.Linear(WIDTH, OUT), (4,), (1.0,))
    pool = ShardPool(config, 4, shape)
    assert pool.pool_A.shape == (4 * 3 * 2, WIDTH // 2)
    banks = [config.build(shape) for _ in range(4)]
    private = []
    for layer, bank in enumerate(banks):
        assert isinstance(bank, ShardBank)
        bank.join_pool(pool, layer)
        drawn = bank.index_A.tolist()
        assert len(drawn) == len(set(drawn)) == 4 * 2
        private.append([i for i in drawn if i < pool.num_private])
        assert drawn != bank.index_B.tolist()
        assert set(private[-1]) == {i for i in bank.index_B.tolist() if i < pool.num_private}
    assert sorted(i for own in private for i in own) == list(range(4 * 1 * 2))
    with pytest.raises(ConfigError, match="public shards"):
        pool.draw(0, 40, config)
    with pytest.raises(ConfigError, match="must divide"):
        ShardPool(ShardsConfig(shards_per_vector=4), 1, shape)


def test_dora_needs_a_float_weight() -> None:
    base = nn.Linear(WIDTH, OUT)
    base.weight = nn.Parameter(torch.zeros(OUT, WIDTH, dtype=torch.int8), requires_grad=False)
    shape = LayerShape("l", base, WIDTH, OUT, (2,), (1.0,), 0.0, torch.device("cpu"), torch.float32)
    with pytest.raises(TargetError, match="float"):
        DoRAConfig().build(shape)
