"""What a decoding step launches is counted right, and nothing in it waits for the device."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

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


@torch.library.custom_op("molex::counted_in_tests", mutates_args=())
def whole(x: Tensor) -> Tensor:
    return (x.to(x.dtype) + 1).to(torch.float64).where(x > 0, 0.0)


@torch.no_grad()
def test_inside_of_a_custom_operator() -> None:
    """`whole` is no kernel, what it launches is; and a cast to the same dtype launches nothing."""
    x = torch.tensor([1.0, -1.0])
    with launches.Calls() as calls:
        y = whole(x)
    work = {"add": 1, "_to_copy": 1, "gt": 1, "scalar_tensor": 1, "where": 1}
    assert y.tolist() == [2.0, 0.0]
    assert calls.kernels == work
    assert calls.operators == {**work, "counted_in_tests": 1}


@torch.no_grad()
def test_tritons_launches() -> None:
    """What a launch does on the host is not counted, as Triton's interpreter computes there."""
    interface = pytest.importorskip("triton.runtime.jit").KernelInterface

    class Kernel(interface):
        __name__ = "some_kernel"

        def run(self, x: Tensor, grid: tuple[int], warmup: bool) -> None:
            x.add_(grid[0])

    x = torch.zeros(2)
    with launches.Calls().with_triton() as calls:
        Kernel()[(3,)](x.view(2))
        x.mul_(2)
    assert x.tolist() == [6.0, 6.0]
    assert calls.kernels == {"some_kernel": 1, "mul_": 1}
    assert calls.operators == {"view": 1, "mul_": 1}
