"""MixLoRA's feed-forward: an expert is the whole block with its updates merged in, the block is their weighted sum."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import molex
from molex.errors import StateError, TargetError
from molex.ffn import find_ffn
from molex.layer import MixtureLinear
from tests.close import assert_close
from tests.models import tiny

# model -> its first feed-forward block: two halves gated, fused gate_up, Conv1D with bias, plain with bias
BLOCKS = {"llama": "model.layers.0.mlp", "phi3": "model.layers.0.mlp", "gpt2": "transformer.h.0.mlp"}
BLOCKS["gpt_neox"] = "gpt_neox.layers.0.mlp"
NUM_EXPERTS, TOP_K = 4, 2


def converted_block(architecture: str, dtype: torch.dtype, zero_B: bool = False) -> tuple[nn.Module, nn.Module]:
    """A block before and after conversion, with experts and biases that do something."""
    model = tiny(architecture, num_hidden_layers=1).to(dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    plain = copy.deepcopy(model.get_submodule(BLOCKS[architecture]))
    settings = {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "rank": 4, "dropout": 0.0}
    molex.convert(model, molex.preset("mixlora", plain_targets=(), **settings))
    block = model.get_submodule(BLOCKS[architecture])
    for layer in mixture_layers(block).values():
        if not zero_B:
            nn.init.normal_(layer.experts.lora_B, std=0.3)
        if layer.router is not None:
            nn.init.normal_(layer.router.gate.weight)
    return plain, block


def mixture_layers(block: nn.Module) -> dict[str, MixtureLinear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, MixtureLinear)}


def textbook(plain: nn.Module, block: nn.Module, x: Tensor) -> Tensor:
    """Σ_k w_k FFN_k(x): every expert's whole block, its weights W + s B A written out."""
    layers = mixture_layers(block)
    (gate,) = [layer.router.gate.weight for layer in layers.values() if layer.router is not None]
    probs_TE = (x.flatten(0, 1) @ gate.to(x.dtype).T).softmax(-1)
    weights_TK, ids_TK = probs_TE.topk(TOP_K)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    y = 0
    for expert_id in range(NUM_EXPERTS):
        merged = {}
        for name, layer in layers.items():
            bank, own = layer.experts, slice(4 * expert_id, 4 * expert_id + 4)
            update_OD = bank.scale[expert_id] * (bank.lora_B[:, own] @ bank.lora_A[own])
            transposed = type(layer.base).__name__ == "Conv1D"
            merged[f"{name}.weight"] = layer.weight + (update_OD.T if transposed else update_OD)
        share_T1 = (weights_TK * (ids_TK == expert_id)).sum(-1, keepdim=True)
        y = y + share_T1.view(*x.shape[:-1], 1) * functional_call(plain, merged, (x,))
    return y


def gradients(y: Tensor, block: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    leaves = {"x": x} | {name: p for name, p in block.named_parameters() if p.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(y, [*leaves.values()], grad), strict=True))


@pytest.mark.parametrize("architecture", list(BLOCKS))
def test_equals_the_textbook_form_with_every_gradient(architecture: str) -> None:
    plain, block = converted_block(architecture, torch.float64)
    x = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 7, 32, dtype=torch.float64)
    y, truth = block(x), textbook(plain, block, x)
    assert_close("y", y.detach(), truth.detach(), truth.detach())
    expected = gradients(truth, block, x, grad)
    assert len(expected) == 1 + 2 * len(mixture_layers(block)) + 1
    for name, got in gradients(y, block, x, grad).items():
        assert_close(name, got, expected[name].to(got.dtype).double(), expected[name].to(got.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", list(BLOCKS))
def test_experts_that_add_nothing_leave_the_base_bit_for_bit(architecture: str, dtype: torch.dtype) -> None:
    plain, block = converted_block(architecture, dtype, zero_B=True)
    x = torch.randn(3, 50, 32).to(dtype)
    assert torch.equal(block(x), plain(x))


@pytest.mark.parametrize("architecture", list(BLOCKS))
def test_base_projections_run_once_on_one_stream(architecture: str) -> None:
    _, block = converted_block(architecture, torch.float32)
    calls: list[tuple[int, ...]] = []
    for layer in mixture_layers(block).values():
        layer.base.register_forward_hook(lambda module, args, y: calls.append(tuple(args[0].shape[:-1])))
    block(torch.randn(2, 7, 32))
    assert calls == [(2, 7)] * len(mixture_layers(block))


def test_a_block_routes_once() -> None:
    _, block = converted_block("llama", torch.float32)
    routed: list[nn.Module] = []
    for layer in mixture_layers(block).values():
        if layer.router is not None:
            layer.router.register_forward_hook(lambda module, args, routing: routed.append(module))
    x = torch.randn(2, 7, 32)
    block(x)
    assert len(routed) == 1
    block(x)  # the same tensor is a new call
    assert len(routed) == 2
    assert not next(iter(mixture_layers(block).values())).state.pending


def test_narrow_keeps_no_streams_but_those_it_was_given() -> None:
    _, block = converted_block("llama", torch.float32)
    up, down = block.up_proj, block.down_proj
    streams = up(torch.randn(1, 64, 32)).detach().requires_grad_()
    given = {streams.untyped_storage().data_ptr(), *(p.untyped_storage().data_ptr() for p in block.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = down(streams)
    assert y.requires_grad
    one_stream = streams[0].nbytes
    assert sum(kept.values()) < 1.5 * one_stream, "only rank-wide tensors may be kept"


def test_halves_that_do_not_belong_together() -> None:
    _, block = converted_block("llama", torch.float32)
    with pytest.raises(StateError, match=r"down_proj ran before .*gate_proj"):
        block.down_proj(torch.randn(3, 2, 7, 48))
    streams = block.gate_proj(torch.randn(2, 7, 32))
    with pytest.raises(StateError, match="not elementwise; use scope='linear'"):
        block.down_proj(streams.mean(0))


def test_find_ffn_goes_by_shape() -> None:
    wide, narrow, fused = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 16)
    assert find_ffn("b", [("gate", wide), ("up", wide), ("down", narrow)]).widen == ("gate", "up")
    assert find_ffn("b", [("gate_up", fused), ("down", narrow)]).narrow == "down"
    assert find_ffn("b", [("fc1", nn.Linear(4, 4)), ("fc2", nn.Linear(4, 4))]).narrow == "fc2"
    with pytest.raises(TargetError, match=r"not one feed-forward block.*use scope='linear'"):
        find_ffn("b", [("q", wide), ("k", wide), ("v", wide), ("o", narrow)])
    with pytest.raises(TargetError, match="not one feed-forward block"):
        find_ffn("b", [("down", narrow)])
