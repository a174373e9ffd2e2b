"""A whole feed-forward block through every backend, against MixLoRA's equations token by token in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molex.kernels import Columns, backends, columns_of
from molex.kernels.block import Block, Projection
from molex.routing import Routing
from tests.close import assert_close
from tests.kernels.cases import DEVICE, HERE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
}


NAMES = [
    name for name in HERE if not name.endswith(("extend", "_grouped", "_skip"))
]  # those have another backend's blocks


@dataclass(frozen=True)
class Case:
    name: str
    num_tokens: int = 13
    hidden: int = 24
    inner: int = 40
    ranks: tuple[int, ...] = (8, 8, 8, 8)
    top_k: int = 2
    activation: str = "silu"
    normalised: bool = True
    nobody: bool = False
    dropped: bool = False

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain"),
    Case("odd sizes", num_tokens=17, hidden=19, inner=35),
    Case("one token", num_tokens=1),
    Case("no token", num_tokens=0),
    Case("one each", top_k=1),
    Case("all of them", top_k=4),
    Case("unequal ranks", ranks=(1, 8, 3, 12)),
    Case("not normalised", normalised=False),
    Case("nobody for some", normalised=False, nobody=True),
    Case("dropped", dropped=True),
    *(Case(activation, activation=activation) for activation in ("gelu", "gelu_tanh", "relu")),
]


# the derivative of relu jumps: where 16 bits have the other sign it is all wrong
RUNS = [(case, dtype) for case in CASES for dtype in DTYPES if case.name != "relu" or dtype == torch.float32]


@dataclass(frozen=True)
class Problem:
    """x (T, D); W, A, B of gate, up, down; scores (T, K), which weights are made of."""

    x: Tensor
    W: dict[str, Tensor]
    A: dict[str, Tensor]
    B: dict[str, Tensor]
    scores: Tensor
    expert_ids: Tensor
    keep: Tensor | None
    source: Tensor
    grad: Tensor
    case: Case

    def leaves(self) -> dict[str, Tensor]:
        factors = {f"{kind}_{name}": t for kind in "AB" for name, t in getattr(self, kind).items()}
        return {"x": self.x, "scores": self.scores, "source": self.source, **factors}

    def weights(self) -> Tensor:
        weights_TK = self.scores.softmax(1) if self.case.normalised else self.scores.sigmoid()
        return weights_TK * (self.expert_ids >= 0)

    def to(self, dtype: torch.dtype) -> "Problem":
        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(DEVICE, dtype).requires_grad_()

        scores = self.scores.detach().to(DEVICE, torch.promote_types(dtype, torch.float32)).requires_grad_()
        factors = {kind: {name: leaf(t) for name, t in getattr(self, kind).items()} for kind in "AB"}
        frozen = {"W": {name: t.to(DEVICE, dtype) for name, t in self.W.items()}, "grad": self.grad.to(DEVICE, dtype)}
        return replace(self, x=leaf(self.x), source=leaf(self.source), scores=scores, **factors, **frozen)


SCALES = {"gate": 0.5, "up": 1.5, "down": 2.0}


def make(case: Case, dtype: torch.dtype) -> Problem:
    num_columns, wide, narrow = sum(case.ranks), case.inner, case.hidden
    sizes = {"gate": (wide, narrow), "up": (wide, narrow), "down": (narrow, wide)}
    ids_TK = torch.rand(case.num_tokens, len(case.ranks)).topk(case.top_k).indices
    if case.nobody:
        ids_TK[::3] = -1
        ids_TK[1::3, 0] = -1
    x = torch.randn(case.num_tokens, narrow)
    return Problem(
        x=x,
        W={name: torch.randn(size) / size[1] ** 0.5 for name, size in sizes.items()},
        A={name: torch.randn(num_columns, size[1]) / size[1] ** 0.5 for name, size in sizes.items()},
        B={name: torch.randn(size[0], num_columns) / max(case.ranks) ** 0.5 for name, size in sizes.items()},
        scores=torch.randn(ids_TK.shape),
        expert_ids=ids_TK.to(DEVICE),
        keep=torch.rand(case.num_tokens, wide).to(DEVICE) < 0.7 if case.dropped else None,
        source=x * (torch.rand_like(x) < 0.7) if case.dropped else x,
        grad=torch.randn(case.num_tokens, narrow),
        case=case,
    ).to(dtype)


def block_of(p: Problem) -> Block:
    ranks, num_experts = p.case.ranks, len(p.case.ranks)
    routing = Routing(p.expert_ids, p.weights(), None, num_experts, p.case.normalised)
    chosen = routing._replace(weights=(p.expert_ids >= 0).to(routing.weights.dtype))

    def projection(name: str, routing: Routing, source: Tensor | None) -> Projection:
        base = nn.Linear(*p.W[name].T.shape, bias=False, dtype=p.x.dtype)
        base.weight = nn.Parameter(p.W[name], requires_grad=False)
        weighted = routing.scaled(torch.full((num_experts,), SCALES[name], device=DEVICE))
        return Projection(base, Columns(p.A[name], p.B[name], ranks, columns_of(ranks).to(DEVICE)), weighted, source)

    source = p.source if p.case.dropped else None
    gate, up = projection("gate", chosen, source), projection("up", chosen, source)
    return Block(gate, up, projection("down", routing, None), p.case.activation, routing, p.keep)


def token_by_token(p: Problem) -> Tensor:
    """MixLoRA: every chosen expert is a whole block of its own, and their results are weighed. Nobody's share, and what
    weights leave over, is the base's."""
    act, weights_TK, rows = ACTIVATIONS[p.case.activation], p.weights(), []
    source = p.source if p.case.dropped else p.x
    for t in range(p.case.num_tokens):
        gate, up = p.W["gate"] @ p.x[t], p.W["up"] @ p.x[t]
        y = (1 - weights_TK[t].sum()) * (p.W["down"] @ (act(gate) * up))
        for k, expert_id in enumerate(p.expert_ids[t].tolist()):
            if expert_id < 0:
                continue
            own = slice(sum(p.case.ranks[:expert_id]), sum(p.case.ranks[: expert_id + 1]))

            def added(name: str, read: Tensor, own: slice = own) -> Tensor:
                return SCALES[name] * p.B[name][:, own] @ (p.A[name][own] @ read)

            inner = act(gate + added("gate", source[t])) * (up + added("up", source[t]))
            kept = inner if p.keep is None else inner * p.keep[t]
            y = y + weights_TK[t, k] * (p.W["down"] @ inner + added("down", kept))
        rows.append(y)
    return torch.stack(rows) if rows else sum(leaf.sum() for leaf in p.leaves().values()) * p.grad  # type: ignore[return-value]


def slot_by_slot(p: Problem) -> Tensor:
    """What one writes in plain PyTorch: every token's slot through its own expert's factors."""
    act, weights_TK = getattr(F, p.case.activation.removesuffix("_tanh")), p.weights().to(p.x.dtype)
    extra = {"approximate": "tanh"} if p.case.activation == "gelu_tanh" else {}
    source = p.source if p.case.dropped else p.x
    gate, up = F.linear(p.x, p.W["gate"]), F.linear(p.x, p.W["up"])
    mixed = (1 - weights_TK.sum(1, keepdim=True)) * (act(gate, **extra) * up)
    added = torch.zeros_like(p.x)
    for k in range(p.case.top_k):
        own_TC = (columns_of(p.case.ranks).to(DEVICE) == p.expert_ids[:, k, None]).to(p.x.dtype)

        def update(name: str, read: Tensor, own_TC: Tensor = own_TC) -> Tensor:
            return F.linear(F.linear(read, p.A[name]) * own_TC * SCALES[name], p.B[name])

        inner = act(gate + update("gate", source), **extra) * (up + update("up", source))
        mixed = mixed + weights_TK[:, k, None] * inner
        added = added + weights_TK[:, k, None] * update("down", inner if p.keep is None else inner * p.keep)
    return F.linear(mixed, p.W["down"]) + added


def results(y: Tensor, p: Problem) -> dict[str, Tensor]:
    leaves = p.leaves()
    grads = torch.autograd.grad(y, [*leaves.values()], p.grad, materialize_grads=True)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


@pytest.fixture(autouse=True)
def blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones are otherwise computed as streams, which `test_backends` and `test_ffn` are for."""
    monkeypatch.setattr("molex.kernels.dense.WORTH", 0)


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_output_and_gradients(name: str, dtype: torch.dtype, case: Case) -> None:
    p = make(case, dtype)
    if name == "grouped" and (case.hidden % 8 or case.inner % 8):
        pytest.skip("grouped_mm takes no such rows")
    p64, plain = p.to(torch.float64), p.to(dtype)
    truth, same_dtype = results(token_by_token(p64), p64), results(slot_by_slot(plain), plain)
    for what, got in results(backends[name]().ffn(p.x, block_of(p)), p).items():
        assert_close(what, got, truth[what], same_dtype[what], products=dtype, depth=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_experts_of_zero_leave_the_base_bit_for_bit(name: str, normalised: bool, dtype: torch.dtype) -> None:
    p = make(replace(CASES[0], top_k=3, normalised=normalised), dtype)
    for B in p.B.values():
        B.data.zero_()
    block = block_of(p)
    expected = block.down.base(F.silu(block.gate.base(p.x)) * block.up.base(p.x))
    got = backends[name]().ffn(p.x, block)
    (d_scores,) = torch.autograd.grad(got, [p.scores], p.grad)
    assert bool((d_scores == 0).all()), "equal experts moved the router: of noise, Adam makes whole steps"
    if name == "triton":  # act(gate) ⊙ up is rounded once in its kernel, twice by the base
        torch.testing.assert_close(got, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
    else:
        assert torch.equal(got, expected)


@pytest.mark.skipif("dense" not in HERE, reason="the interpreter's process runs the backends on Triton alone")
@pytest.mark.parametrize("case", [CASES[0], CASES[6], CASES[8], CASES[9]], ids=lambda case: case.name)
def test_gradcheck(case: Case) -> None:
    p = make(replace(case, num_tokens=3, hidden=5, inner=6), torch.float64)
    names = [*p.leaves()]

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        factors = {kind: {name: given[f"{kind}_{name}"] for name in getattr(p, kind)} for kind in "AB"}
        changed = replace(p, x=given["x"], scores=given["scores"], source=given["source"], **factors)
        return backends["dense"]().ffn(changed.x, block_of(changed))

    assert torch.autograd.gradcheck(function, [*p.leaves().values()])


@pytest.mark.skipif("dense" not in HERE, reason="the interpreter's process runs the backends on Triton alone")
def test_what_is_saved_does_not_grow_with_the_experts_of_a_token() -> None:
    """Two I-wide tensors between the projections, however many experts; streams would be K of each."""

    def saved(top_k: int) -> int:
        wide: set[int] = set()

        def pack(tensor: Tensor) -> Tensor:
            if tensor.shape[-1] == 40 and tensor.shape[-2] == 13:
                wide.add(tensor.data_ptr())
            return tensor

        p = make(replace(CASES[0], top_k=top_k), torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = backends["dense"]().ffn(p.x, block_of(p))
        assert kept.requires_grad
        return len(wide)

    assert saved(1) == saved(4) == 2


@pytest.mark.skipif("dense" not in HERE, reason="the interpreter's process runs the backends on Triton alone")
def test_few_numbers_are_not_worth_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    small, large = (make(replace(CASES[0], num_tokens=n, inner=256), torch.float32) for n in (500, 520))
    assert backends["dense"]().core(small.x, 256) is None  # type: ignore[attr-defined]
    assert backends["dense"]().core(large.x, 256) is not None  # type: ignore[attr-defined]
