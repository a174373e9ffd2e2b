"""Benchmarks run at small sizes, refuse to time what is wrong, and write what they say. No time is looked at."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, harness, layer, mixture_ffn, stack
from molex.kernels.dense import Dense


def rows(monkeypatch: pytest.MonkeyPatch, folder: Path, main: Callable[[], None], flags: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(harness, "RESULTS", folder)
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags.split()])
    threads = torch.get_num_threads()
    try:
        main()
    finally:
        torch.set_num_threads(threads)
    return [json.loads(line) for path in folder.iterdir() for line in path.read_text().splitlines()]


def test_a_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = "--shapes 32x16x24 --experts 4x8x2,16x1x4 --rounds 2 --threads 1"
    found = rows(monkeypatch, tmp_path, layer.main, flags)
    assert [(row["timed"], row["ExRxK"]) for row in found] == [
        (what, experts) for experts in ("4x8x2", "16x1x4") for what in ("forward", "forward and backward")
    ]
    wanted = {"lora", "lora, C", "loop", "every_expert", "dense", "preload", "grouped"}
    assert all(row["times_base"].keys() == wanted for row in found)


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = Dense.linear
    monkeypatch.setattr(Dense, "linear", lambda *call: 1.01 * right(*call))
    with pytest.raises(AssertionError, match=r"dense y: 0\.01"):
        rows(monkeypatch, tmp_path, layer.main, "--shapes 32x16x24 --experts 4x8x2 --rounds 2 --threads 1")
    assert not list(tmp_path.iterdir())


def test_decoder_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = "--hidden 16 --inner 24 --layers 1 --tokens 8 --experts 2 --rank 2 --rounds 2 --threads 1"
    found = rows(monkeypatch, tmp_path, stack.main, flags)
    assert [row["timed"] for row in found] == ["training", "decoding"]
    assert found[0]["times_base"].keys() == {"lora", "lora, C", "molex, auto", "molex, dense", "molex, preload"}


def test_a_feed_forward_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = "--num_tokens 32 --hidden 16 --inner 24 --num_experts 4 --rank 2 --rounds 2 --threads 1"
    (found,) = rows(monkeypatch, tmp_path, mixture_ffn.main, flags)
    assert found["milliseconds"].keys() == {"base", "shared", "textbook", "dense", "preload"}
    base, expert = 2 * 3 * 16 * 24, 3 * 2 * 3 * 2 * (16 + 24)  # multiplications a token, by hand
    assert found["flops"]["shared"] == round((base * 4 / 3 + expert) / (base + expert), 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_check_wants_a_gpu() -> None:
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu.main()
