"""Every backend x dtype x shape against float64: the output and every gradient, by name."""

import pytest
import torch
from torch import Tensor, nn

from molex.kernels import Form, backends
from tests.close import assert_close
from tests.kernels.cases import CASES, HERE, Case, Problem, expert_by_expert, make, token_by_token

FORMS: list[Form] = ["linear", "widen", "narrow"]
OWN_LINEAR_ALONE = (
    "extend",
    "triton_extend",
    "triton_grouped",
    "triton_skip",
)  # their other forms are another backend's
RUNS = [(name, form) for name in HERE for form in FORMS if form == "linear" or name not in OWN_LINEAR_ALONE]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
if "dense" in HERE:
    DTYPES.append(torch.float64)


def base_of(p: Problem) -> nn.Linear:
    base = nn.Linear(p.W.shape[1], p.W.shape[0], dtype=p.W.dtype, device=p.W.device)
    base.weight.data, base.bias.data = p.W, p.bias
    return base.requires_grad_(False)


def run(name: str, p: Problem, form: Form) -> Tensor:
    backend, base = backends[name](), base_of(p)
    if form == "linear":
        return backend.linear(p.x, base, p.columns(), p.routing())
    if form == "widen":
        return backend.widen(p.x, base, p.columns(), p.routing())
    return backend.narrow(p.x, base, p.columns(), p.routing(), p.shares())


def results(y: Tensor, p: Problem, form: Form) -> dict[str, Tensor]:
    """The output and the gradients of the leaves that the form reads; a single share of 1 is nothing to read."""
    mixes = form == "narrow" and not (p.normalised and p.mix.shape[1] == 1)
    leaves = [name for name in p.LEAVES if name != "mix" or mixes]
    grads = torch.autograd.grad(y, [getattr(p, name) for name in leaves], p.grad, materialize_grads=True)
    return {"y": y.detach(), **dict(zip([f"d{name}" for name in leaves], grads, strict=True))}


def skip_unsupported(name: str, p: Problem) -> None:
    reason = backends[name]().supports(p.x, p.columns(), p.routing(), base_of(p))
    if reason:
        allowed = name == "grouped" and p.x.shape[-1] % 8 > 0
        allowed |= p.x.dtype == torch.float64 and (name == "grouped" or name.startswith("triton"))
        assert allowed, f"{name} refuses what it should run: {reason}"
        pytest.skip(reason)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "form"), RUNS)
def test_output_and_gradients(name: str, dtype: torch.dtype, form: Form, case: Case) -> None:
    p = make(case, form, dtype)
    skip_unsupported(name, p)
    p64, plain = p.to(torch.float64, torch.device("cpu")), p.to(dtype)
    truth = results(token_by_token(p64, form), p64, form)
    same_dtype = results(expert_by_expert(plain, form), plain, form)
    for what, got in results(run(name, p, form), p, form).items():
        assert_close(what, got.cpu(), truth[what], same_dtype[what].cpu(), products=dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["reference", "dense", "preload", "extend"])
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[10], CASES[12]], ids=lambda case: case.name)
def test_gradcheck(name: str, form: Form, case: Case) -> None:
    small = Case(case.name, 3, 4, 6, case.ranks, case.top_k, case.choose, case.share_A)
    p = make(small, form, torch.float64)
    leaves = [leaf for leaf in p.LEAVES if leaf != "mix" or form == "narrow"]

    def function(*tensors: Tensor) -> Tensor:
        fields = {
            **{field: getattr(p, field) for field in p.__dataclass_fields__},
            **dict(zip(leaves, tensors, strict=True)),
        }
        return run(name, Problem(**fields), form)

    assert torch.autograd.gradcheck(function, [getattr(p, leaf) for leaf in leaves])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "form"), RUNS)
def test_experts_of_zero_leave_the_base_bit_for_bit(name: str, dtype: torch.dtype, form: Form) -> None:
    p = make(CASES[0], form, dtype)
    p.B.data.zero_()
    if form == "narrow":
        p.x.data[:] = p.x.data[0]  # a base's activations: no expert has changed any stream
    y = run(name, p, form)
    expected = base_of(p)(p.x[0] if form == "narrow" else p.x).expand_as(y)
    if name.endswith("extend") and form == "linear":  # sums zeros with the base's products, in another order
        torch.testing.assert_close(y, expected)
    else:
        assert torch.equal(y, expected)


@pytest.mark.parametrize("name", HERE)
def test_batch_dimensions_and_dropped_rows(name: str) -> None:
    """x keeps its own shape, and the experts alone read what dropout left."""
    p = make(CASES[0], "linear", torch.float32)
    tokens, (x, dropped) = p.x.shape[0] - 1, (p.x[:-1], (p.x * 2)[:-1])
    routing = p.routing()._replace(expert_ids=p.expert_ids[:-1], weights=p.weights[:-1])
    shaped = (x.view(3, tokens // 3, -1), dropped.view(3, tokens // 3, -1))
    y = backends[name]().linear(shaped[0], base_of(p), p.columns(), routing, dropped=shaped[1])
    assert y.shape == (3, tokens // 3, p.W.shape[0])
    delta_TO = backends[name]().delta(dropped, p.columns(), routing)
    torch.testing.assert_close(y.flatten(0, 1), base_of(p)(x) + delta_TO)


@pytest.mark.parametrize("name", HERE)
def test_gradients_of_a_transposed_input_and_of_what_dropout_left(name: str) -> None:
    """A row of x need not lie together, which its gradient must not take over. x and dropped are other leaves."""
    p = make(CASES[0], "linear", torch.float32)
    x, dropped = (part.detach().T.contiguous().T.requires_grad_() for part in (p.x, p.x * 2))
    y = backends[name]().linear(x, base_of(p), p.columns(), p.routing(), dropped=dropped)
    d_x, d_dropped = torch.autograd.grad(y, (x, dropped), p.grad)
    torch.testing.assert_close(d_x, p.grad @ p.W)
    delta_TO = backends["reference"]().delta(dropped, p.columns(), p.routing())
    torch.testing.assert_close(d_dropped, torch.autograd.grad(delta_TO, dropped, p.grad)[0])


@pytest.mark.parametrize("name", HERE)
def test_activations_at_hand_are_used(name: str) -> None:
    p = make(CASES[0], "linear", torch.float32)
    given = backends[name]().delta(p.x, p.columns(), p.routing(), hidden=p.columns().shrink(p.x))
    torch.testing.assert_close(given, backends[name]().delta(p.x, p.columns(), p.routing()))
