"""MegaBlocks' product behind the `grouped` plan: all but the product itself, which needs a GPU.

A stand-in takes the place of the package `grouped_gemm`: a loop that refuses what the real one refuses in one of its
builds, and leaves NaN where the real one leaves memory as it was.
"""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from molex.errors import BackendError
from molex.kernels import Columns, Form, Planner, columns_of
from molex.kernels.cost import Shape
from molex.kernels.grouped import Plan
from molex.kernels.megablocks import MegaBlocks
from molex.routing import Routing
from tests.close import assert_close
from tests.kernels.cases import CASES, Case, expert_by_expert, make, token_by_token
from tests.kernels.test_backends import FORMS, results, run


def checked(a: Tensor, b: Tensor, sizes: Tensor, dims: int) -> None:
    """What grouped_gemm 0.3.0 asks of its arguments, but for the device."""
    assert (a.dim(), b.dim(), sizes.dim()) == (2, dims, 1)
    assert a.dtype == b.dtype == torch.bfloat16
    assert (sizes.device.type, sizes.dtype) == ("cpu", torch.int64)
    assert a.is_contiguous()
    assert b.is_contiguous()
    assert all(width % 8 == 0 for width in (*a.shape[1:], *b.shape[1:])), "rows of 16 bytes"
    assert 0 < sizes.sum() <= len(a), "the build for CUTLASS has nothing to launch"


def groups(sizes: Tensor) -> list[slice]:
    ends = sizes.cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes.tolist(), strict=True)]


def by_rows(a: Tensor, b: Tensor, sizes: Tensor, trans_b: bool) -> Tensor:
    checked(a, b, sizes, dims=3)
    assert len(b) == len(sizes)
    assert a.shape[1] == b.shape[2 if trans_b else 1]
    out = torch.full((len(a), b.shape[1 if trans_b else 2]), torch.nan, dtype=a.dtype, device=a.device)
    for own, factor in zip(groups(sizes), b, strict=True):
        out[own] = a[own] @ (factor.T if trans_b else factor)
    return out


def by_groups(a: Tensor, b: Tensor, sizes: Tensor) -> Tensor:
    checked(a, b, sizes, dims=2)
    assert len(a) == len(b)
    return torch.stack([a[own].T @ b[own] for own in groups(sizes)])


class Gmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, sizes: Tensor, trans_b: bool) -> Tensor:
        ctx.save_for_backward(a, b, sizes)
        ctx.trans_b = trans_b
        return by_rows(a, b, sizes, trans_b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (a, b, sizes) = grads[0].contiguous(), ctx.saved_tensors
        left, right = (grad, a) if ctx.trans_b else (a, grad)
        d_a = by_rows(grad, b, sizes, not ctx.trans_b) if ctx.needs_input_grad[0] else None
        return d_a, by_groups(left, right, sizes) if ctx.needs_input_grad[1] else None, None, None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The module in place; the sizes of every call."""
    calls: list[Tensor] = []

    def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
        calls.append(batch_sizes)
        return Gmm.apply(a, b, batch_sizes, trans_b)

    package, ops = ModuleType("grouped_gemm"), ModuleType("grouped_gemm.ops")
    package.ops, ops.gmm = ops, gmm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "grouped_gemm", package)
    monkeypatch.setitem(sys.modules, "grouped_gemm.ops", ops)
    return calls


@pytest.mark.parametrize("case", [case for case in CASES if case.num_in % 8 == 0], ids=lambda case: case.name)
@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradients(stand_in: list[Tensor], form: Form, case: Case) -> None:
    p = make(case, form, torch.bfloat16)
    p64, plain = p.to(torch.float64), p.to(torch.bfloat16)
    truth = results(token_by_token(p64, form), p64, form)
    same_dtype = results(expert_by_expert(plain, form), plain, form)
    for what, got in results(run("megablocks", p, form), p, form).items():
        assert_close(what, got, truth[what], same_dtype[what], products=torch.bfloat16)
    assert len(stand_in) == (2 if (p.expert_ids >= 0).any() else 0)


def test_the_device_is_waited_for_once_a_layer(stand_in: list[Tensor]) -> None:
    run("megablocks", make(CASES[0], "linear", torch.bfloat16), "linear")
    first, second = stand_in
    assert first is second


def test_nobody_has_gradients_of_zero(stand_in: list[Tensor]) -> None:
    """And not none, which distributed training takes for an error."""
    p = make(CASES[5], "linear", torch.bfloat16)
    assert (p.expert_ids < 0).all()
    grads = torch.autograd.grad(run("megablocks", p, "linear"), [p.A, p.B, p.weights], p.grad)
    assert not any(grad.any() for grad in grads)


def test_sizes_are_read_on_the_host() -> None:
    with FakeTensorMode():
        ends = torch.empty(2, dtype=torch.int32, device="cuda")
        sizes = MegaBlocks().groups(Plan(ends, ends, ends))
    assert (sizes.device.type, sizes.dtype) == ("cpu", torch.int64)


def test_column_major_tensors_are_laid_anew(stand_in: list[Tensor]) -> None:
    p = make(CASES[0], "linear", torch.bfloat16)
    x, A, B = (tensor.detach().T.contiguous().T for tensor in (p.x, p.A, p.B))
    columns = p.columns()._replace(A=A, B=B)
    got = MegaBlocks().delta(x, columns, p.routing())
    assert torch.equal(got, MegaBlocks().delta(p.x, p.columns(), p.routing()))


def layer_on(
    device: str, dtype: torch.dtype = torch.bfloat16, num_in: int = 16
) -> tuple[Tensor, Columns, Routing, nn.Module]:
    """Its tensors have a device and no numbers, so that no GPU is needed."""
    with FakeTensorMode(), torch.device(device):
        ids_TK = torch.zeros(3, 1, dtype=torch.int64)
        columns = Columns(torch.zeros(16, num_in), torch.zeros(16, 16), (8, 8), columns_of((8, 8))).to(dtype)
        routing = Routing(ids_TK, torch.ones(3, 1), None, 2)
        return torch.zeros(3, num_in, dtype=dtype), columns, routing, nn.Identity()


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Whether a CUDA graph is being recorded."""
    state = {"on": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["on"])
    return state


def refusal(problem: tuple[Tensor, Columns, Routing, nn.Module]) -> str | None:
    return MegaBlocks().supports(*problem)


def test_what_it_runs_and_what_it_refuses(stand_in: list[Tensor], recording: dict[str, bool]) -> None:
    assert refusal(layer_on("cuda")) is None
    assert refusal(layer_on("cuda", torch.float16)) == "grouped_gemm takes bfloat16, not torch.float16"
    assert "rows of 12 and 16" in str(refusal(layer_on("cuda", num_in=12)))
    recording["on"] = True
    assert "a CUDA graph is being recorded" in str(refusal(layer_on("cuda")))


def test_a_cpu_is_refused(stand_in: list[Tensor]) -> None:
    with pytest.raises(BackendError, match=r"'megablocks' cannot run this layer: .*GPU, x is on cpu; use .*auto"):
        Planner("megablocks").pick(*layer_on("cpu"))


def test_a_compiler_is_refused(stand_in: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = layer_on("cuda")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "torch.compile" in str(refusal(problem))


class Broken:
    """Finds nothing, and says why in the way of a package that lacks its compiled part, or has another torch's."""

    def __init__(self, error: ImportError):
        self.error = error

    def find_spec(self, name: str, *_: object) -> None:
        if name == "grouped_gemm":
            raise self.error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'grouped_gemm'", name="grouped_gemm"), "is not installed: pip install"),
        (ModuleNotFoundError("No module named 'x'", name="x"), r"is incomplete \(No module named 'x'\): pip install"),
        (
            ImportError("undefined symbol: _ZN3c10"),
            r"not built for this torch \(undefined .*c10\): pip install",
        ),
    ],
)
def test_a_package_that_is_not_there_is_named(
    error: ImportError, reason: str, recording: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "meta_path", [Broken(error), *sys.meta_path])
    for name in ("grouped_gemm", "grouped_gemm.ops"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(BackendError, match=reason):
        Planner("megablocks").pick(*layer_on("cuda"))


def test_auto_never_picks_it() -> None:
    x, columns, routing, _ = layer_on("cuda")
    assert MegaBlocks().steps(Shape.of(x, columns, routing, 4096)) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the real product needs a GPU")
@pytest.mark.parametrize("case", CASES[2:6], ids=lambda case: case.name)
def test_the_real_product(case: Case) -> None:
    pytest.importorskip("grouped_gemm.ops")
    p = make(case, "linear", torch.bfloat16)
    p64, plain = p.to(torch.float64), p.to(torch.bfloat16)
    truth = results(expert_by_expert(p64, "linear"), p64, "linear")
    same_dtype = results(expert_by_expert(plain, "linear"), plain, "linear")
    for what, got in results(run("megablocks", p, "linear"), p, "linear").items():
        assert_close(what, got, truth[what], same_dtype[what], products=torch.bfloat16)
