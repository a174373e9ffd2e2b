"""What a decoding step launches is counted right, and nothing in it waits for the device."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import harness, launches


def test_one_layer_of_each_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["launches", "--dtype", "bfloat16"])
    launches.main()
    (row,) = [json.loads(line) for line in (tmp_path / "launches.jsonl").read_text().splitlines()]
    wanted = {
        "base",
        "lora",
        *(f"{preset}, dense" for preset in launches.MIXTURES),
        "mola, preload",
        "mixlora, preload",
    }
    assert wanted <= row["kernels"].keys() == row["operators"].keys()
    assert set(row["waits"].values()) == {0}
    assert row["kernels"]["lora"] - row["kernels"]["base"] == 7 * 6  # to float32, A, B, times scale, added, and back
    assert row["kernels"]["mola, dense"] > row["kernels"]["base"] + 7 * 4


@torch.no_grad()
def test_calls_are_counted() -> None:
    x = torch.ones(2, 3)
    with launches.Calls() as calls:
        torch.empty(2)
        x.view(3, 2)
        float(x.sum())
        (x + 1).nonzero()
        x[:, :1] = True
        torch.tensor([1, 2])
    work = {"sum": 1, "_local_scalar_dense": 1, "add": 1, "nonzero": 1, "fill_": 1}
    assert calls.kernels == work
    assert calls.operators == {**work, "empty": 1, "view": 1, "slice": calls.operators["slice"], "lift_fresh": 2}
    assert calls.waits == {"_local_scalar_dense": 1, "nonzero": 1, "lift_fresh": 1}
