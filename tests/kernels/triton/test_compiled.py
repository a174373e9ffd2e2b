"""What the operators launch, compiled for Ampere and Hopper from real arguments: tensor cores, memory, no spills."""

import math
import os
import re
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from molex.kernels.triton import (
    expand_add,
    expand_add_tiles,
    gate_backward,
    route_shrink,
    self_gated_shrink,
    shrink_extend,
    shrink_gate,
    skinny_wgrad,
    tile_tokens,
)
from molex.kernels.triton.ffn_ops import ACTIVATIONS, ffn_mix, ffn_mix_backward
from molex.kernels.triton.grouped_ops import grouped_expand_add, grouped_shrink, grouped_wgrad
from molex.kernels.triton.pair_tiles import tile_pairs
from tests.kernels.triton.ahead import Launch, launches

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block can have
IN_FLOAT32 = ("gate_backward_kernel", "gate_planes_kernel", "route_gate_kernel", "self_gate_kernel")
SHAPES = [  # capability, dtype, tokens (decoding, a few, training), experts, their rank
    (90, torch.bfloat16, 1, 8, 16),
    (90, torch.bfloat16, 8192, 8, 16),
    (90, torch.bfloat16, 8192, 64, 1),
    (90, torch.float32, 8192, 8, 16),
    (80, torch.bfloat16, 48, 3, 5),
    (80, torch.bfloat16, 8192, 64, 1),
    (80, torch.float32, 1, 8, 16),
]

MORE = [(90, torch.bfloat16, 8192, 8, 8), (90, torch.float16, 8192, 4, 64)]  # of feed-forward blocks


def every_operator(num_tokens: int, num_experts: int, rank: int, dtype: torch.dtype) -> dict[str, Callable]:
    width, num_columns = 4096, num_experts * rank
    x, y = torch.zeros(2, num_tokens, width, dtype=dtype)
    A, B = torch.zeros(num_columns, width, dtype=dtype), torch.zeros(width, num_columns, dtype=dtype)
    gates, narrow = torch.zeros(num_tokens, num_experts), torch.zeros(num_tokens, num_columns, dtype=dtype)
    expert_of_column = torch.arange(num_columns) // rank
    router, scale, bias = torch.zeros(num_experts, width), torch.ones(num_experts), torch.zeros(num_columns)
    ids = torch.arange(num_tokens)[:, None] % num_experts
    tiles, pairs = (plan(ids, expert_of_column, num_experts) for plan in (tile_tokens, tile_pairs))
    weights, wide = torch.ones(num_tokens, 1), torch.zeros(1, num_tokens, rank, dtype=dtype)
    return {
        "shrink": lambda: shrink_gate(x, A, gates, expert_of_column),
        "shared A": lambda: shrink_gate(x, A[:rank], gates, expert_of_column, torch.arange(num_columns) % rank),
        "extend": lambda: shrink_extend(x, A, gates, expert_of_column, None, width + num_columns),
        "gate_backward": lambda: gate_backward(narrow, narrow, gates, expert_of_column),
        "wgrad": lambda: skinny_wgrad(narrow, x),
        "expand": lambda: expand_add(y, narrow, B),
        "expand tiles": lambda: expand_add_tiles(y, narrow, B, tiles),
        "grouped shrink": lambda: grouped_shrink(x, A, weights, pairs, rank),
        "grouped shrink of dy": lambda: grouped_shrink(y, B.T, weights, pairs, rank),
        "grouped expand": lambda: grouped_expand_add(y, wide, B, pairs),
        "grouped expand of dh": lambda: grouped_expand_add(x, wide, A.T, pairs),
        "grouped wgrad": lambda: grouped_wgrad(wide, x, pairs, num_columns),
        "route": lambda: route_shrink(x, A, router, scale, expert_of_column, top_k=2),
        "self": lambda: self_gated_shrink(x, A, bias, bias, 2, False),
    }


def feed_forward(
    num_tokens: int, num_experts: int, rank: int, dtype: torch.dtype, activation: str = "silu", dropped: bool = True
) -> dict[str, Callable]:
    """Of Llama-3-8B's width."""
    inner, num_columns = 14336, num_experts * rank
    wide, narrow = torch.zeros(num_tokens, inner, dtype=dtype), torch.zeros(num_tokens, num_columns, dtype=dtype)
    B, A = torch.zeros(inner, num_columns, dtype=dtype), torch.zeros(num_columns, inner, dtype=dtype)
    ids = torch.rand(num_tokens, num_experts).topk(2).indices
    keep = torch.ones(num_tokens, inner, dtype=torch.bool) if dropped else None
    tables = (torch.ones(ids.shape), ids, torch.arange(num_columns) // rank)
    block = (wide, wide, narrow, narrow, B, B, A, *tables, keep, activation)
    return {"mix": lambda: ffn_mix(*block), "mix backward": lambda: ffn_mix_backward(wide, narrow, *block)}


def check(launch: Launch, capability: int, dtype: torch.dtype) -> None:
    assert launch.shared <= SHARED_MEMORY[capability], f"{launch.name}: {launch.shared} bytes of shared memory"
    # ptxas gives up a word or two a thread for occupancy
    assert launch.spilled <= 16, f"{launch.name}: {launch.spilled} bytes a thread spilled"
    if dtype == torch.float32 or launch.name in IN_FLOAT32:
        assert not re.search(r"\bw?g?mma\.", launch.ptx), f"{launch.name}: float32 is to stay float32"
    else:
        assert re.search(r"\b(wgmma\.mma_async|mma\.sync)\.", launch.ptx), f"{launch.name}: no tensor cores"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_fits(shape: tuple[int, torch.dtype, int, int, int]) -> None:
    capability, dtype, *sizes = shape
    for name, call in every_operator(*sizes, dtype).items():
        with launches(capability) as launched:
            call()
        assert launched, f"{name} launched nothing"
        for launch in launched:
            check(launch, capability, dtype)


@pytest.mark.parametrize(
    "shape", [*SHAPES, (90, torch.bfloat16, 8192, 8, 8), (90, torch.float16, 8192, 4, 64)], ids=str
)
def test_feed_forward_fits(shape: tuple[int, torch.dtype, int, int, int]) -> None:
    capability, dtype, *sizes = shape
    for call in feed_forward(*sizes, dtype).values():
        with launches(capability) as launched:
            call()
        assert launched
        for launch in launched:
            check(launch, capability, dtype)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_fits(activation: str, dropped: bool) -> None:
    for call in feed_forward(8192, 8, 16, torch.bfloat16, activation, dropped).values():
        with launches(90) as launched:
            call()
        for launch in launched:
            check(launch, 90, torch.bfloat16)


def test_feed_forward_adds_in_a_fixed_order_and_rounds_products() -> None:
    """No atomics; and no product fused into a difference, which would leave a rounding error where a zero should be."""
    for call in feed_forward(8192, 8, 16, torch.bfloat16).values():
        with launches(90) as launched:
            call()
        for launch in launched:
            assert not re.search(r"\b(atom|red)\.", launch.ptx), launch.name
            assert "fma.rn.f32" not in launch.ptx, launch.name


def test_feed_forward_keeps_processors_busy_and_planes_small() -> None:
    with launches(90) as launched, patch.object(torch, "zeros", wraps=torch.zeros) as zeros:
        for call in feed_forward(8192, 8, 16, torch.bfloat16).values():
            call()
    mix, backward, *wgrad = launched
    assert [launch.name for launch in wgrad] == ["ffn_mix_wgrad_kernel"] * 2
    assert min(launch.grid[0] for launch in launched) >= 4 * 132
    sizes = [math.prod(call.args) for call in zeros.call_args_list if call.kwargs.get("dtype") == torch.float32]
    assert len(sizes) == 3
    assert 4 * max(sizes) < 150e6
    assert mix.grid == backward.grid


@pytest.mark.parametrize("name", ["shrink", "extend", "wgrad", "expand", "expand tiles"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_uses_hoppers_warp_groups_and_wide_accesses(dtype: torch.dtype, name: str) -> None:
    with launches(90) as launched:
        every_operator(8192, 8, 16, dtype)[name]()
    assert "wgmma.mma_async" in launched[0].ptx
    assert "cp.async.cg.shared.global" in launched[0].ptx, "loads are not 16 bytes wide"
    assert "st.global.v4.b32" in launched[0].ptx, "stores are not 16 bytes wide"


def test_training_reads_x_once_and_needs_no_second_launch() -> None:
    with launches(90) as launched:
        every_operator(8192, 8, 16, torch.bfloat16)["shrink"]()
    assert [launch.grid for launch in launched] == [(128, 1)]


def test_decoding_keeps_processors_busy() -> None:
    with launches(90) as launched:
        every_operator(1, 8, 16, torch.bfloat16)["shrink"]()
    assert [launch.name for launch in launched] == ["shrink_kernel", "gate_planes_kernel"]
    assert launched[0].grid[0] * launched[0].grid[1] >= 100


def test_launches_are_on_the_device_of_their_tensors() -> None:
    """The current device is another one where a model is spread over GPUs."""
    operators = every_operator(16, 8, 16, torch.bfloat16) | feed_forward(16, 8, 16, torch.bfloat16)
    for name, call in operators.items():
        with launches(90) as launched, patch.object(torch.cuda, "device_of", wraps=torch.cuda.device_of) as guard:
            call()
        assert launched
        assert guard.called, f"{name} launches on whatever device is current"
