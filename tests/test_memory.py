"""The counter of live bytes, against sums by hand and against what the allocator itself reports."""

import argparse
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness, memory, stack
from benchmarks.live_bytes import LiveBytes, pretended

TINY = argparse.Namespace(hidden=64, inner=96, layers=2, tokens=96, dtype="float32", device="cpu")
IDS = torch.zeros(1, TINY.tokens, dtype=torch.int64)


def test_storages_count_while_they_live() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        c = b * 2
        assert live.now == live.peak == 12_000
        del b
        view = c.view(10, 100).t()
        assert live.now == 8_000
        b = view.contiguous()
        d = torch.zeros(500, dtype=torch.float64)
        d.mul_(2)
    assert live.peak == live.now == 16_000
    del a, b, c, view
    assert live.now == 4_000
    assert live.peak == 16_000
    del d
    assert live.now == 0


def test_a_training_step_by_hand() -> None:
    """loss = Σ relu(x Wᵀ) with 10 rows, 6 -> 8: y and its relu are 320 bytes each, dW 192."""
    x, W = torch.randn(10, 6), torch.randn(8, 6, requires_grad=True)
    with LiveBytes() as live:
        loss = F.linear(x, W).relu().sum()
        assert live.peak == 320 + 320
        loss.backward()
    assert live.peak == 320 + 4 + 4 + 320  # relu's result, the loss, its gradient, and the gradient of y
    assert live.now == 4 + 192
    found = {(holder.operator, holder.shape): num_bytes for holder, num_bytes in live.holders().items()}
    assert found["relu", (10, 8)] == found["threshold_backward", (10, 8)] == 320


def tiny(preset: str, checkpointing: bool) -> nn.Module:
    base = stack.build(TINY)
    memory.without_mask(base)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return memory.converted(base, preset, "dense", dropout=0.0)


@pytest.mark.parametrize("preset", ["mola", "mixlora"])
def test_peaks_are_the_allocators(preset: str) -> None:
    model = tiny(preset, checkpointing=False)
    with LiveBytes() as live:
        stack.train_step(model, IDS)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        stack.train_step(model, IDS)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    allocated = max(itertools.accumulate(event.nbytes() for event in events))
    assert 0.999 * allocated <= live.peak <= allocated  # the rest are single numbers inside operators


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tensors_without_numbers_count_the_same(checkpointing: bool) -> None:
    model = tiny("mola", checkpointing)
    with LiveBytes() as live:
        stack.train_step(model, IDS)
    with pretended(), LiveBytes() as counted:
        stack.train_step(model, IDS)
    assert counted.peak == live.peak > 0


def test_holders_know_their_module() -> None:
    model = tiny("mola", checkpointing=False)
    with LiveBytes() as live, live.naming(model, memory.short_name):
        stack.train_step(model, IDS)
    assert sum(live.holders().values()) == live.peak
    assert any(holder.module == "mlp.down_proj.experts" for holder in live.holders())
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("_proj"))


def test_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Our own degenerate mixture is PEFT's LoRA, and peaks where it does."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    flags = "--presets lora,mixlora --hidden 32 --inner 48 --layers 1 --tokens 16 --dtype float32"
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags.split(), "--real", "--blame", "--named"])
    memory.main()
    found = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert [(row["preset"], row["checkpointing"]) for row in found] == [
        (preset, checkpointing) for checkpointing in (False, True) for preset in ("lora", "mixlora")
    ]
    assert all(
        row["times_lora"].keys() == {"lora, C", "lora, narrow", "molex, dense", "molex, preload"} for row in found
    )
    assert found[0]["times_lora"]["molex, dense"] < 1.05
    assert "mlp.down_proj" in capsys.readouterr().out


def test_lora_of_as_many_columns() -> None:
    model = tiny("mixlora", checkpointing=False)
    like = memory.lora_like(stack.build(TINY), model.molex_mixture, 0.0)
    ranks = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): len(parameter)
        for name, parameter in like.named_parameters()
        if "lora_A" in name
    }
    assert {rank for name, rank in ranks.items() if ".mlp." in name} == {8 * 16}
    assert {rank for name, rank in ranks.items() if ".self_attn." in name} == {16}
    assert len(ranks) == 2 * 7
