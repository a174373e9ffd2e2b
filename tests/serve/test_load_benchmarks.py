"""Benchmarks of serving run at small sizes, and refuse to time what is wrong. No time is looked at."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, serving_experts, serving_load, serving_mixed, serving_registered
from benchmarks.serving_trace import Shape, at_once, poisson
from molex_serve.model.experts import SlotLayer

SHAPE = Shape(prompt=3, new=2, vocabulary=64)


def rows(monkeypatch: pytest.MonkeyPatch, folder: Path, main: Callable[[], None], flags: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(harness, "RESULTS", folder)
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags.split()])
    threads = torch.get_num_threads()
    try:
        main()
    finally:
        torch.set_num_threads(threads)
    return [json.loads(line) for path in folder.iterdir() for line in path.read_text().splitlines()]


LOAD = "--hidden 64 --layers 1 --batch 4 --requests 4 --prompt 8 --new 4 --rounds 2 --threads 1 --adapters 0,3"


@pytest.mark.parametrize("kind", ["lora", "esft"])
def test_serving_under_load(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = rows(monkeypatch, tmp_path, serving_load.main, f"--kind {kind} --load 5 {LOAD}")
    assert [(row["loop"], row["adapters"]) for row in found] == [
        (loop, number) for number in (0, 3) for loop in ("closed", "open")
    ]
    none, three = (row["step_adapters"] for row in found if row["loop"] == "closed")
    assert none == 0
    assert 2 < three <= 3
    assert all(row["served_over_base"].keys() == {"ttft", "tpot", "whole", "cpu"} for row in found)
    if kind == "esft":
        none, many = (row["step_experts"] for row in found if row["loop"] == "closed")
        assert none["served"] == none["base"]
        assert many["served"] > many["base"], "adapters' own experts are others"


def test_an_adapter_that_is_another_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    attach = serving_load.attach
    monkeypatch.setattr(serving_load, "attach", lambda way, served, folders: attach(way, served, folders[::-1]))
    with pytest.raises(AssertionError, match="what its merged model would not"):
        rows(monkeypatch, tmp_path, serving_load.main, LOAD)


def test_shares_of_adapters() -> None:
    """The first of N has N^-α, all the same at α = 1."""
    for alpha in (1.0, 0.3, 0.1):
        trace = poisson(4000, 50.0, 20, alpha, SHAPE, seed=0)
        shares = Counter(arrival.adapter for arrival in trace)
        assert shares[0] / 4000 == pytest.approx(20**-alpha, abs=0.03)
        assert set(shares) <= set(range(20))
        assert trace[-1].seconds == pytest.approx(4000 / 50, rel=0.1)
    assert [arrival.adapter for arrival in at_once(5, 2, SHAPE, seed=0)] == [0, 1, 0, 1, 0]
    assert {arrival.adapter for arrival in poisson(5, 1.0, 0, 1.0, SHAPE, seed=0)} == {None}


SMALL_EXPERTS = "--hidden 32 --inner 16 --experts 8 --top_k 2 --tuned 3 --rounds 2 --threads 1"


def test_rerouting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = f"--tokens 1,40 --adapters 1,4 {SMALL_EXPERTS}"
    found = rows(monkeypatch, tmp_path, serving_experts.main, flags)
    assert [(row["adapters"], row["tokens"]) for row in found] == [(1, 1), (1, 40), (4, 1), (4, 40)]
    assert [row["distinct"]["base"] for row in found] == [2, 8, 2, 8]
    assert found[-1]["distinct"]["served"] > 12


def test_wrong_slots_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(SlotLayer, "point", lambda self, handle: None)
    forward = serving_experts.check
    monkeypatch.setattr(
        serving_experts,
        "check",
        lambda found, layer, x, slots, weights: forward(found, layer, x, (slots + 1) % layer.num_slots, weights),
    )
    with pytest.raises(AssertionError, match="relative error"):
        rows(monkeypatch, tmp_path, serving_experts.main, f"--tokens 4 --adapters 1 {SMALL_EXPERTS}")


def test_a_mixed_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = "--hidden 64 --layers 1 --adapters 3 --rank 4 --length 5 --rounds 2 --threads 1"
    found = rows(monkeypatch, tmp_path, serving_mixed.main, flags)
    assert [row["timed"] for row in found] == ["decoding", "prefill"]
    assert all(row["times_served"].keys() == {"base", "peft", "merged"} for row in found)


def test_registered_adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = "--registered 20 --resident 3 --hidden 64 --layers 1 --rank 4 --host_mib 1 --asks 30"
    (row,) = rows(monkeypatch, tmp_path, serving_registered.main, flags)
    assert row["resident"] == 3
    assert sum(row["hits"].values()) == 30
    assert row["mib_of"]["adapters on the host"] <= 1
    assert row["mib"].keys() == {"registered", "2 used", "10 used", "20 used", "30 more asks"}
