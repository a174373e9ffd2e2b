"""Expert-swap adapters on served models: a mixed batch is each adapter's merged model, the base stays the base."""

import copy
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import molex.esft
from molex.errors import BackendError, CheckpointError, StateError, TargetError
from molex.esft import Selection
from molex_serve.adapters.base import ExpertSwap
from molex_serve.adapters.esft import read_esft
from molex_serve.errors import BadAdapter, LoadBusy
from molex_serve.memory.base import Arena
from molex_serve.model.experts import ExpertPool, all_slots, slot_by_slot
from molex_serve.model.reroute import reroute
from molex_serve.model.step import Span, Step
from molex_serve.model.twin import twin_of
from tests.close import assert_close
from tests.esft.models import ARCHITECTURES, moe, tokens
from tests.models import tiny
from tests.serve.expert_swaps import ADAPTERS, greedy, merged, save_swap

HANDLES = dict(zip(ADAPTERS, range(1, 6), strict=True))
LORA = 6  # a handle that has no experts here
FIRST = "model.layers.1.mlp.experts"
ALLOCATOR = "MALLOC_MMAP_THRESHOLD_"
LARGE = "test_the_process_is_as_large_as_what_is_attached"


@contextmanager
def rows_of(pool: ExpertPool, model: nn.Module, handles: list[int]) -> Iterator[None]:
    """Every forward's tokens are of these adapters, row by row."""

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        rows, length = kwargs["input_ids"].shape
        spans = tuple(Span(handles[row], row * length, (row + 1) * length) for row in range(rows))
        pool.step = Step.of(spans, torch.device("cpu"))

    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        pool.step = None


def served(model: PreTrainedModel, folder: Path, num_slots: int = 9) -> ExpertPool:
    """With every adapter attached."""
    swaps = {name: read_esft(save_swap(name, model, folder), model) for name in ADAPTERS}
    pool = ExpertPool(model, num_slots, num_handles=LORA)
    for name, handle in HANDLES.items():
        pool.attach(handle, swaps[name])
    return pool


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mixed_batch_is_every_merged_model_token_for_token(name: str, tmp_path: Path) -> None:
    model = moe(name)
    base = copy.deepcopy(model)
    pool = served(model, tmp_path)
    rows = [0, 1, 2, 3, 4, 5, LORA, 5, 3, 0]
    prompts = tokens(len(rows), 6)
    prompts[7:] = prompts[0]  # the same prompt by different adapters
    with rows_of(pool, model, rows):
        mixed = greedy(model, prompts)
    plain = greedy(base, prompts)
    for name, handle in HANDLES.items():
        own = [row for row, owner in enumerate(rows) if owner == handle]
        assert torch.equal(mixed[own], greedy(merged(base, tmp_path / name), prompts[own])), name
    others = [row for row, owner in enumerate(rows) if owner in (0, LORA)]
    assert torch.equal(mixed[others], plain[others])
    assert (mixed != plain).any(dim=1).sum() >= 5, "the adapters do nothing"


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v2"])
def test_the_base_is_the_unmodified_model_bit_for_bit(name: str, implementation: str, tmp_path: Path) -> None:
    model = moe(name)
    model.set_experts_implementation(implementation)
    ids = tokens(3, 7)
    with torch.no_grad():
        truth = model(input_ids=ids).logits
        pool = served(model, tmp_path)
        assert torch.equal(model(input_ids=ids).logits, truth)
        for rows in ([0, 0, 0], [0, LORA, 0]):
            with rows_of(pool, model, rows):
                assert torch.equal(model(input_ids=ids).logits, truth)
        with rows_of(pool, model, [0, 1, 0]):  # beside others it is the base up to rounding
            mixed = model(input_ids=ids).logits
        torch.testing.assert_close(mixed[[0, 2]], truth[[0, 2]], rtol=1e-5, atol=1e-5)
        assert (mixed[1] - truth[1]).abs().max() > 0.1


def test_the_base_follows_the_models_choice_of_implementation(tmp_path: Path) -> None:
    """`generate` changes it for decoding on a GPU."""
    model = moe("mixtral")
    pool = served(model, tmp_path)
    called = []
    for name in ("eager", "batched_mm"):
        model.set_experts_implementation(name)
        own = type(pool.layers[FIRST].layer.module)._apply_gate
        with patch.object(torch, "bmm", wraps=torch.bmm) as bmm, torch.no_grad():
            model(input_ids=tokens(1, 3))
        called.append(bmm.call_count)
        assert own is not None
    assert called[0] == 0
    assert called[1] > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 29])
def test_every_token_goes_to_its_own_experts(dtype: torch.dtype, num_tokens: int, tmp_path: Path) -> None:
    """One layer against a loop over tokens in float64, with an adapter of its own for each token."""
    model = moe("deepseek_v2").to(dtype)
    layer = model.get_submodule(FIRST)
    weights_of = {0: layer_weights(layer)}
    for name, handle in HANDLES.items():
        weights_of[handle] = layer_weights(merged(model, save_swap(name, model, tmp_path)).get_submodule(FIRST))
    pool = served(model, tmp_path)
    handles = torch.randint(0, 6, (num_tokens,))
    handles[0] = 1
    pool.step = Step(tuple(Span(int(h), t, t + 1) for t, h in enumerate(handles)), handles)
    x, ids = torch.randn(num_tokens, 32).to(dtype), torch.rand(num_tokens, 8).topk(3).indices
    weights = torch.rand(num_tokens, 3)
    got = layer(x, ids, weights)
    truth = one_by_one(x, ids, weights, handles, weights_of, torch.float64)
    assert_close("y", got, truth, one_by_one(x, ids, weights, handles, weights_of, dtype), depth=3)
    chosen = {
        (int(h) if weights_differ(h, e) else 0, e) for h, row in zip(handles, ids.tolist(), strict=True) for e in row
    }
    assert int((pool.layers[FIRST].counts > 0).sum()) == len(chosen)
    assert pool.distinct() == len(chosen)


def weights_differ(handle: Tensor, expert: int) -> bool:
    name = next((own for own, number in HANDLES.items() if number == handle), None)
    return name is not None and expert in ADAPTERS[name].get(1, ())


def layer_weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.gate_up_proj.detach().clone(), layer.down_proj.detach().clone()  # type: ignore[operator, union-attr]


def one_by_one(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    handles: Tensor,
    weights_of: dict[int, tuple[Tensor, Tensor]],
    dtype: torch.dtype,
) -> Tensor:
    rows = []
    for t, handle in enumerate(handles.tolist()):
        gate_up, down = (own.to(dtype) for own in weights_of[handle])
        total = 0
        for expert, weight in zip(ids[t].tolist(), weights[t], strict=True):
            gate, up = (gate_up[expert] @ x[t].to(dtype)).chunk(2)
            y = down[expert] @ (nn.functional.silu(gate) * up)
            total = total + y * weight.to(torch.promote_types(dtype, torch.float32))
        rows.append(total.to(dtype))  # type: ignore[union-attr]
    return torch.stack(rows)


def test_one_grouped_product_over_all_slots_is_the_loop(tmp_path: Path) -> None:
    """As on a GPU: slots that nobody has are there, and are holes."""
    model = moe("mixtral")
    layer = served(model, tmp_path).layers[FIRST]
    handles, ids = torch.tensor([1, 0, 4, 4, 2]), torch.tensor([[0, 3], [5, 1], [4, 0], [5, 2], [3, 1]])
    routed = reroute(layer.table, handles, ids, layer.num_slots)
    x = torch.randn(10, 32)
    experts = molex.esft.ExpertWeights(layer.gate_up.tensor, layer.down.tensor)
    both = [multiply(x, routed, experts, layer.layer.module) for multiply in (all_slots, slot_by_slot)]
    torch.testing.assert_close(*both)


def test_slots_and_memory_come_back(tmp_path: Path) -> None:
    model = moe("qwen3_moe", moe_intermediate_size=64)  # experts are whole pages
    swaps = {name: read_esft(save_swap(name, model, tmp_path), model) for name in ADAPTERS}
    pool = ExpertPool(model, 9, LORA)
    empty, identity = pool.committed_bytes(), pool.layers[FIRST].table.clone()
    assert pool.free_slots() == 9
    for name, handle in HANDLES.items():
        pool.attach(handle, swaps[name])
    assert [len(layer.free) for layer in pool.layers.values()] == [9, 1, 0]
    assert pool.handles() == {*HANDLES.values()}
    table = pool.layers[FIRST].table
    assert torch.equal(table[0], torch.arange(8, dtype=torch.int32))
    assert table[HANDLES["law"]].tolist() == [8, 1, 2, 9, 4, 5, 6, 7]
    assert table.max() < pool.layers[FIRST].num_slots
    full = pool.committed_bytes()
    assert full - empty == sum(swap.num_bytes for swap in swaps.values())
    pool.detach(HANDLES["code"])
    assert full - pool.committed_bytes() == swaps["code"].num_bytes
    assert torch.equal(table[HANDLES["code"]], identity[0])
    pool.attach(HANDLES["code"], swaps["code"])
    assert pool.committed_bytes() == full
    for handle in HANDLES.values():
        pool.detach(handle)
    assert pool.committed_bytes() == empty
    assert torch.equal(pool.layers[FIRST].table, identity)
    assert pool.free_slots() == 9


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_process_is_as_large_as_what_is_attached() -> None:
    """6 MiB an expert; 64 free slots of them cost nothing. In a process whose allocator gives back what is freed,
    whatever it had before."""
    if ALLOCATOR not in os.environ:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{LARGE}"]
        run = subprocess.run(
            command, env={**os.environ, ALLOCATOR: "65536"}, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stdout[-3000:]
        return
    expert = 6 << 20
    model = moe("mixtral", hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_local_experts=4)
    name = "model.layers.0.mlp.experts"
    own = molex.esft.find_layers(model)[0]
    weights = molex.esft.ExpertWeights(own.gate_up[0].detach().clone(), own.down[0].detach().clone())
    assert weights.nbytes == expert
    gc.collect()
    before = resident()
    pool = ExpertPool(model, 64, num_handles=3)
    assert abs(resident() - before) < expert / 2, "the base is in memory twice, or free slots are"
    swap = partial(ExpertSwap, kind="esft", generation="", num_bytes=0, source="")
    empty = resident()
    pool.attach(1, swap(experts={name: dict.fromkeys((0, 2), weights)}))
    pool.attach(2, swap(experts={name: dict.fromkeys((1, 2, 3), weights)}))
    assert abs(resident() - empty - 5 * expert) < expert / 2
    pool.detach(1)
    assert abs(resident() - empty - 3 * expert) < expert / 2
    pool.attach(3, swap(experts={name: {1: weights}}))
    pool.detach(2)
    assert abs(resident() - empty - expert) < expert / 2
    pool.close()
    assert abs(resident() - before) < expert / 2


def test_nothing_is_stored_twice_and_the_parameters_stay_themselves(tmp_path: Path) -> None:
    model = moe("olmoe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objects = {name: id(p) for name, p in model.named_parameters()}
    configs = [id(getattr(module, "config", None)) for module in model.modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    pool = served(model, tmp_path)
    for layer in pool.layers.values():
        assert layer.layer.gate_up.data_ptr() == layer.gate_up.tensor.data_ptr()
        assert layer.layer.down.data_ptr() == layer.down.tensor.data_ptr()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    pool.close()
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert [id(getattr(module, "config", None)) for module in model.modules()] == configs
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    ExpertPool(model, 1, 1).close()


def test_a_full_pool_refuses_and_stays_as_it_was(tmp_path: Path) -> None:
    model = moe("mixtral")
    swaps = {name: read_esft(save_swap(name, model, tmp_path), model) for name in ADAPTERS}
    pool = ExpertPool(model, 3, LORA)
    pool.attach(1, swaps["law"])
    before = state_of(pool)
    with pytest.raises(LoadBusy, match=r"needs 3 expert slots of model\.layers\.2.*, 2 of 3 are free"):
        pool.attach(2, swaps["code"])
    with pytest.raises(BadAdapter, match=r"replaces 4 experts .* there are 3 slots: raise expert_slots"):
        pool.attach(2, swaps["poem"])
    assert state_of(pool) == before
    pool.detach(1)
    pool.attach(2, swaps["code"])


def state_of(pool: ExpertPool) -> object:
    layers = pool.layers.values()
    return (
        pool.committed_bytes(),
        [(sorted(layer.free), layer.table.tolist(), layer.gate_up.tensor.sum().item()) for layer in layers],
        pool.handles(),
    )


@pytest.mark.parametrize("nth", [0, 1, 2, 3])
def test_memory_that_ends_in_the_middle_undoes_what_was_done(nth: int, tmp_path: Path) -> None:
    model = moe("mixtral")
    swap = read_esft(save_swap("law", model, tmp_path), model)
    pool = ExpertPool(model, 4, LORA)
    before = state_of(pool)
    with patch.object(Arena, "commit", failing_at(nth, Arena.commit)), pytest.raises(BackendError, match="no memory"):
        pool.attach(1, swap)
    assert state_of(pool) == before
    pool.attach(1, swap)


@pytest.mark.parametrize("nth", [0, 1, 2, 3])
def test_a_pool_for_which_there_is_no_memory_leaves_the_model_as_it_was(nth: int) -> None:
    model = moe("mixtral")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with patch.object(Arena, "commit", failing_at(nth, Arena.commit)), pytest.raises(BackendError, match="no memory"):
        ExpertPool(model, 4, LORA)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not any(hasattr(module, "molex_slots") for module in model.modules())
    ExpertPool(model, 4, LORA)


def failing_at(nth: int, commit: Callable[[Arena, int, int], None]) -> Callable[[Arena, int, int], None]:
    calls = iter(range(100))

    def commit_or_fail(self: Arena, start: int, stop: int) -> None:
        if next(calls) == nth:
            raise BackendError("no memory is left")
        commit(self, start, stop)

    return commit_or_fail


def test_copies_of_the_modules_share_the_pool(tmp_path: Path) -> None:
    """As routed mixtures have them, over the same weights."""
    model = moe("mixtral")
    pool, twin = served(model, tmp_path), twin_of(model)
    with torch.no_grad(), rows_of(pool, twin, [2, 0]):
        mixed = twin(input_ids=tokens(2, 5)).logits
    with torch.no_grad(), rows_of(pool, model, [2, 0]):
        assert torch.equal(model(input_ids=tokens(2, 5)).logits, mixed)
    pool.close()
    with torch.no_grad():
        assert torch.equal(twin(input_ids=tokens(2, 5)).logits, model(input_ids=tokens(2, 5)).logits)


def test_what_is_read(tmp_path: Path) -> None:
    model = moe("deepseek_v2").to(torch.bfloat16)
    folder = save_swap("code", moe("deepseek_v2"), tmp_path)
    swap = read_esft(folder, model)
    assert (swap.kind, swap.source) == ("esft", str(folder))
    assert {name: [*own] for name, own in swap.experts.items()} == {FIRST: [3], FIRST.replace("1", "2"): [1, 5, 2]}
    assert {own.dtype for weights in swap.experts[FIRST].values() for own in weights} == {torch.bfloat16}
    assert swap.num_bytes == 4 * 3 * 32 * 24 * 2
    assert len(swap.generation) == 12
    assert read_esft(folder, model).generation == swap.generation
    config = json.loads((folder / "expert_cfg.json").read_text())
    (folder / "expert_cfg.json").write_text(json.dumps({**config, "non_expert_modules": True}))
    with pytest.raises(CheckpointError, match="non_expert_modules"):
        read_esft(folder, model)
    (folder / "expert_cfg.json").write_text(json.dumps({**config, "experts": {**config["experts"], "1": [3, 4]}}))
    with pytest.raises(CheckpointError, match="expert 4 of layer 1 has no gate_proj"):
        read_esft(folder, model)
    with pytest.raises(TargetError, match="has no layer with gate_up_proj"):
        read_esft(folder, tiny("llama"))


def test_experts_have_one_owner(tmp_path: Path) -> None:
    model = moe("mixtral")
    tuning = molex.esft.tune(model, Selection({1: (0,)}))
    with pytest.raises(StateError, match="tuned or served already"):
        ExpertPool(model, 1, 1)
    tuning.revert()
    ExpertPool(model, 1, 1)
    with pytest.raises(StateError, match="tuned or served already"):
        ExpertPool(model, 1, 1)
