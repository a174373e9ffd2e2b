"""The middle of a feed-forward block: results and every gradient by name, against autograd in float64, by token."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from molex.kernels.triton import ffn_tiles
from molex.kernels.triton.ffn_ops import ACTIVATIONS, ffn_mix, ffn_mix_backward
from molex.kernels.triton.ffn_plan import first_columns, plan_pairs, plan_tiles
from molex.kernels.triton.token_tiles import ROWS
from tests.close import assert_close
from tests.kernels.triton.problems import DEVICE, DTYPES, Case, embedded

ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class FFNCase(Case):
    """num_out is I; num_in is not used."""

    activation: str = "silu"
    dropped: bool = False
    normalised: bool = False


CASES = [
    FFNCase("plain"),
    FFNCase("odd sizes", num_tokens=31, num_out=41, dropped=True),
    FFNCase("empty experts", chosen="two of them", normalised=True),
    FFNCase("all to one", top_k=1, chosen="one", dropped=True),
    FFNCase("nobody for some", chosen="nobody for some"),
    FFNCase("nobody for all", chosen="nobody", dropped=True),
    FFNCase("one token", num_tokens=1, normalised=True),
    FFNCase("no token", num_tokens=0),
    FFNCase("all experts", top_k=5, normalised=True),
    FFNCase("two tiles", num_tokens=70, num_out=70, ranks=(16, 16, 16), dropped=True),
    FFNCase("unequal ranks", ranks=(2, 8, 5, 1, 11), dropped=True),
    FFNCase("large ranks", ranks=(70, 3, 20)),
    FFNCase("rank-1 experts", num_tokens=11, num_out=20, ranks=(1,) * 20, top_k=6),
    FFNCase("more experts than programs", num_tokens=3, num_out=20, ranks=(1,) * 140),
    FFNCase("an expert without a column", ranks=(4, 0, 6)),
    FFNCase("one expert of rank 1", ranks=(1,), top_k=1),
    FFNCase("zero-stride gradients", summed=True),
    *(FFNCase(activation, activation=activation, dropped=True) for activation in ACTIVATIONS[1:]),
]


@dataclass(frozen=True)
class Problem:
    leaves: dict[str, Tensor]
    expert_ids: Tensor
    expert_of_column: Tensor
    keep: Tensor | None
    activation: str
    grads: tuple[Tensor, Tensor]  # of mixed and down_hidden

    def arguments(self) -> tuple:
        factors = {name: leaf.detach() for name, leaf in self.leaves.items()}
        weights = factors.pop("weights")
        return *factors.values(), weights, self.expert_ids, self.expert_of_column, self.keep, self.activation

    def to(self, dtype: torch.dtype) -> "Problem":
        """Fresh leaves with NaN around them; weights stay at least float32."""
        leaves = {name: embedded(leaf.to(dtype)).requires_grad_() for name, leaf in self.leaves.items()}
        leaves["weights"] = embedded(self.leaves["weights"].to(torch.promote_types(dtype, torch.float32)))
        leaves["weights"].requires_grad_()
        return replace(self, leaves=leaves, grads=(self.grads[0].to(dtype), self.grads[1].to(dtype)))


def make(case: FFNCase, dtype: torch.dtype) -> Problem:
    ids_TK, (num_tokens, inner, num_columns) = case.expert_ids(), (case.num_tokens, case.num_out, sum(case.ranks))
    owner = torch.arange(len(case.ranks)).repeat_interleave(torch.tensor(case.ranks))
    own_TC = (ids_TK[:, :, None] == owner).any(1)
    weights = (0.1 + torch.rand(ids_TK.shape)) * (ids_TK >= 0)
    leaves = {
        "gate": torch.randn(num_tokens, inner),
        "up": torch.randn(num_tokens, inner),
        "gate_gated": torch.randn(num_tokens, num_columns) * own_TC,
        "up_gated": torch.randn(num_tokens, num_columns) * own_TC,
        "gate_B": torch.randn(inner, num_columns) / max(case.ranks) ** 0.5,
        "up_B": torch.randn(inner, num_columns) / max(case.ranks) ** 0.5,
        "down_A": torch.randn(num_columns, inner) / inner**0.5,
        "weights": weights / weights.sum(1, keepdim=True) if case.normalised else weights,
    }
    keep = torch.rand(num_tokens, inner) < 0.7 if case.dropped else None
    grads = [torch.randn(num_tokens, size, device=DEVICE) for size in (inner, num_columns)]
    problem = Problem(
        leaves={name: leaf.to(DEVICE).to(dtype) for name, leaf in leaves.items()},
        expert_ids=ids_TK.to(DEVICE),
        expert_of_column=owner.to(DEVICE),
        keep=None if keep is None else keep.to(DEVICE),
        activation=case.activation,
        grads=(grads[0], grads[1]),
    ).to(dtype)
    if case.summed:
        one = torch.ones((), dtype=dtype, device=DEVICE)
        return replace(problem, grads=(one.expand(grads[0].shape), one.expand(grads[1].shape)))
    return problem


def token_by_token(p: Problem) -> tuple[Tensor, Tensor]:
    """mixed and down_hidden as the equations have them."""
    x, act, owner = p.leaves, ACT[p.activation], p.expert_of_column
    mixed, down_hidden = [x["gate"][:0]], [x["gate_gated"][:0]]
    for t, ids in enumerate(p.expert_ids.tolist()):
        base = act(x["gate"][t]) * x["up"][t]
        row, hidden = base, torch.zeros_like(x["gate_gated"][t])
        for k, expert_id in enumerate(ids):
            columns = (owner == expert_id).nonzero()[:, 0]
            if expert_id < 0:
                continue
            gate = x["gate"][t] + x["gate_B"][:, columns] @ x["gate_gated"][t, columns]
            up = x["up"][t] + x["up_B"][:, columns] @ x["up_gated"][t, columns]
            stream = act(gate) * up
            row = row + x["weights"][t, k] * (stream - base)
            kept = stream if p.keep is None else stream * p.keep[t]
            hidden = hidden.index_add(0, columns, x["down_A"][columns] @ kept)
        mixed.append(row[None])
        down_hidden.append(hidden[None])
    return torch.cat(mixed), torch.cat(down_hidden)


def slot_by_slot(p: Problem) -> tuple[Tensor, Tensor]:
    """What one writes in PyTorch: a stream a slot, in the model's dtype, mixed in the weights'."""
    x, act = p.leaves, ACT[p.activation]
    base = act(x["gate"]) * x["up"]
    mixed, down_hidden = base.to(x["weights"].dtype), torch.zeros_like(x["gate_gated"])
    for k in range(p.expert_ids.shape[1]):
        own_TC = p.expert_ids[:, k, None] == p.expert_of_column
        gate = x["gate"] + (x["gate_gated"] * own_TC) @ x["gate_B"].T
        up = x["up"] + (x["up_gated"] * own_TC) @ x["up_B"].T
        stream = act(gate) * up
        mixed = mixed + x["weights"][:, k, None] * (p.expert_ids[:, k, None] >= 0) * (stream - base)
        down_hidden = down_hidden + ((stream if p.keep is None else stream * p.keep) @ x["down_A"].T) * own_TC
    return mixed.to(base.dtype), down_hidden


def by_autograd(p: Problem, block: Callable[[Problem], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    results = block(p)
    grads = torch.autograd.grad(results, list(p.leaves.values()), p.grads, materialize_grads=True)
    named = dict(zip([f"d_{name}" for name in p.leaves], grads, strict=True))
    return {"mixed": results[0].detach(), "down_hidden": results[1].detach(), **named}


class Mix(torch.autograd.Function):
    """As a backend has it: kept are the operator's inputs alone."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.arguments = arguments
        return ffn_mix(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        d_gate, d_up, d_gate_gated, d_up_gated, d_weights, *d_factors = ffn_mix_backward(*grads, *ctx.arguments)
        assert all(grad.dtype == torch.float32 for grad in (d_weights, *d_factors))
        return d_gate, d_up, d_gate_gated, d_up_gated, *d_factors, d_weights, None, None, None, None


def by_operators(p: Problem) -> dict[str, Tensor]:
    names = ("gate", "up", "gate_gated", "up_gated", "gate_B", "up_B", "down_A", "weights")
    mixed, down_hidden = ffn_mix(*p.arguments())
    d = ffn_mix_backward(*p.grads, *p.arguments())
    named = dict(zip([f"d_{name}" for name in names], [*d[:4], *d[5:], d[4]], strict=True))
    return {"mixed": mixed, "down_hidden": down_hidden, **named}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients(dtype: torch.dtype, case: FFNCase) -> None:
    p = make(case, dtype)
    truth, expected = by_autograd(p.to(torch.float64), token_by_token), by_autograd(p, slot_by_slot)
    for what, got in by_operators(p).items():
        assert_close(what, got, truth[what], expected[what].to(got.dtype), products=dtype)


def test_one_row_of_weights_may_have_any_stride() -> None:
    p = make(FFNCase("one token", num_tokens=1), torch.float32)
    expected = ffn_mix_backward(*p.grads, *p.arguments())
    *factors, weights, ids, owner, keep, activation = p.arguments()
    turned = weights.flatten().clone()[:, None].T
    assert turned.is_contiguous()
    assert turned.stride() == (1, 1)
    for got, wanted in zip(
        ffn_mix_backward(*p.grads, *factors, turned, ids, owner, keep, activation), expected, strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_of_several_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where planes would be large, each sums more than one block of I."""
    monkeypatch.setattr(ffn_tiles, "PLANES", 1)
    p = make(FFNCase("wide", num_tokens=70, num_out=100, ranks=(16, 3, 20), dropped=True), dtype)
    block = ffn_tiles.Block(**{name: leaf.detach() for name, leaf in p.leaves.items()}, keep=None)
    assert ffn_tiles.split_inner(block, 2, 1) == (1, 128)
    truth, expected = by_autograd(p.to(torch.float64), token_by_token), by_autograd(p, slot_by_slot)
    for what, got in by_operators(p).items():
        assert_close(what, got, truth[what], expected[what].to(got.dtype), products=dtype)


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_of_zero_leave_the_base_bit_for_bit(dtype: torch.dtype, activation: str) -> None:
    """Whatever the weights sum to."""
    p = make(FFNCase("B = 0", activation=activation), dtype)
    for name in ("gate_B", "up_B"):
        p.leaves[name].detach().zero_()
    got, _ = ffn_mix(*p.arguments())
    nobody = replace(p, expert_ids=torch.full_like(p.expert_ids, -1))
    assert torch.equal(got, ffn_mix(*nobody.arguments())[0])
    if activation == "relu":
        assert torch.equal(got, (p.leaves["gate"].float().relu() * p.leaves["up"].float()).to(dtype))
    d_weights = ffn_mix_backward(*p.grads, *p.arguments())[4]
    assert bool((d_weights == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_bit_equal(dtype: torch.dtype) -> None:
    p = make(FFNCase("plain", ranks=(8, 20), dropped=True), dtype)
    first, second = by_operators(p), by_operators(p)
    for what, got in first.items():
        assert torch.equal(got, second[what]), what


def test_autograd_through_the_operators() -> None:
    p = make(FFNCase("plain", dropped=True), torch.float32)
    got = by_autograd(
        p, lambda p: Mix.apply(*p.leaves.values(), p.expert_ids, p.expert_of_column, p.keep, p.activation)
    )
    truth = by_autograd(p.to(torch.float64), token_by_token)
    expected = by_autograd(p, slot_by_slot)
    for what, value in got.items():
        assert_close(what, value, truth[what], expected[what])


def test_what_a_token_has_not_chosen_receives_nothing() -> None:
    p = make(FFNCase("nobody for some", chosen="nobody for some"), torch.float32)
    not_own_TC = (p.expert_ids[:, :, None] != p.expert_of_column).all(1)
    got = by_operators(p)
    for what in ("down_hidden", "d_gate_gated", "d_up_gated"):
        assert bool((got[what][not_own_TC] == 0).all()), what
        assert bool((got[what][~not_own_TC] != 0).all()), what
    assert bool((got["d_weights"][p.expert_ids < 0] == 0).all())


def test_nan_is_not_hidden() -> None:
    for activation in ACTIVATIONS:
        p = make(FFNCase("plain", num_tokens=5, activation=activation), torch.float32)
        p.leaves["gate"].detach()[3, 7] = torch.nan
        mixed, down_hidden = ffn_mix(*p.arguments())
        assert mixed.isnan().nonzero().tolist() == [[3, 7]], activation
        assert bool(down_hidden[3].isnan().any()), activation
        assert bool(down_hidden[[0, 1, 2, 4]].isfinite().all()), activation


def test_rows_and_columns_that_are_apart() -> None:
    p = make(FFNCase("plain"), torch.float32)
    apart = {name: leaf.detach().t().contiguous().t() for name, leaf in p.leaves.items()}
    for got, expected in zip(ffn_mix(*replace(p, leaves=apart).arguments()), ffn_mix(*p.arguments()), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("dtype", "dropped"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_opcheck(dtype: torch.dtype, dropped: bool) -> None:
    p = make(FFNCase("plain", num_tokens=9, dropped=dropped), dtype)
    torch.library.opcheck(ffn_mix, p.arguments())
    torch.library.opcheck(ffn_mix_backward, (*p.grads, *p.arguments()))


def test_what_is_refused() -> None:
    p = make(FFNCase("plain"), torch.float32)
    with pytest.raises(AssertionError, match=r"tanh.*known are"):
        ffn_mix(*replace(p, activation="tanh").arguments())
    with pytest.raises(AssertionError, match="different dtypes"):
        ffn_mix(p.leaves["gate"].bfloat16(), *p.arguments()[1:])
    with pytest.raises(AssertionError, match=r"weights are torch\.bfloat16"):
        ffn_mix(*p.arguments()[:7], p.leaves["weights"].bfloat16(), *p.arguments()[8:])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plans(case: FFNCase) -> None:
    """Each pair is there once, after those of earlier experts; a tile has the experts that its tokens have chosen."""
    ids_TK = case.expert_ids().to(DEVICE)
    owner = torch.arange(len(case.ranks)).repeat_interleave(torch.tensor(case.ranks)).to(DEVICE)
    begins = {e: sum(case.ranks[:e]) for e, rank in enumerate(case.ranks) if rank}
    first_TK = first_columns(ids_TK, owner)
    assert first_TK.tolist() == [[begins.get(e, -1) for e in ids] for ids in ids_TK.tolist()]
    tiles, pairs = plan_tiles(first_TK, owner), plan_pairs(first_TK, owner)
    assert pairs.experts[: int(pairs.count)].tolist() == list(begins.values())
    chosen = [(c, number) for number, c in enumerate(first_TK.flatten().tolist()) if c >= 0]
    order = pairs.order.tolist()
    assert [number for _, number in sorted(chosen)] == order[: len(chosen)]
    assert sorted(order) == list(range(ids_TK.numel()))
    for c in begins.values():
        assert int(pairs.ends[c]) == sum(of <= c for of, _ in chosen)
    for tile, (experts, count) in enumerate(zip(tiles.experts.tolist(), tiles.counts.tolist(), strict=True)):
        tokens = tiles.order[tile * ROWS : (tile + 1) * ROWS]
        assert experts[:count] == sorted(set(first_TK[tokens].flatten().tolist()) - {-1})
    for slots, row in zip(tiles.slots.tolist(), first_TK.tolist(), strict=True):
        assert slots == [row.index(c) if c in row else -1 for c in range(len(owner))]
