"""Benchmarks run at small sizes, refuse to time what is wrong, and write what they say. No time is looked at."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ceilings, contestants, gpu, harness, layer, linears, mixture_ffn, problem, stack, training_step
from molex.kernels.dense import Dense
from molex.losses import LoadBalance


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
    flags = "--shapes 32x16x24 --experts 4x8x2,32x1x4 --rounds 2 --threads 1 --routing zipf"
    found = rows(monkeypatch, tmp_path, layer.main, flags)
    passes = ("forward", "backward", "forward and backward")
    assert [(row["timed"], row["ExRxK"]) for row in found] == [
        (what, experts) for experts in ("4x8x2", "32x1x4") for what in passes
    ]
    wanted = {"lora", "lora, C", "meteora", "dense", "preload", "grouped"}
    loops = {"loop", "meteora_loop", "every_expert", "xlora"}
    assert all(row["times_base"].keys() >= wanted | loops for row in found[:3])
    assert all(row["times_base"].keys() >= wanted and not row["times_base"].keys() & loops for row in found[3:])


@pytest.mark.parametrize("name", [*contestants.LOOPS, "meteora"])
def test_every_code_computes_the_equation(name: str) -> None:
    """y_t = W x_t + Σ_k w_tk B_e A_e x_t, token by token."""
    drawn = problem.Layer.draw((13, 8, 12), (4, 3, 2), "cpu", torch.float64, "zipf")
    expected = []
    for t, x_D in enumerate(drawn.x):
        y_O = drawn.base(x_D)
        for k, e in enumerate(drawn.expert_ids[t].tolist()):
            own = slice(3 * e, 3 * e + 3)
            y_O = y_O + drawn.weights[t, k] * (drawn.B[:, own] @ (drawn.A[own] @ x_D))
        expected.append(y_O)
    torch.testing.assert_close(contestants.CODES[name](drawn), torch.stack(expected))


def test_routing_patterns() -> None:
    random = torch.Generator().manual_seed(0)
    ids = {pattern: problem.choose(pattern, 4000, 4, 2, random) for pattern in problem.PATTERNS}
    assert all((row_TK[:, 0] != row_TK[:, 1]).all() for row_TK in ids.values())
    shares = {pattern: row_TK.flatten().bincount(minlength=4) / 4000 for pattern, row_TK in ids.items()}
    torch.testing.assert_close(shares["uniform"], torch.full((4,), 0.5), atol=0.05, rtol=0)
    assert shares["zipf"].diff().max() < -0.05
    assert shares["hot"][0] == 1
    assert shares["empty"][0] == 0
    assert shares["one_set"].tolist() == [1, 1, 0, 0]
    first = problem.choose("zipf", 40000, 4, 1, random).flatten().bincount() / 40000
    torch.testing.assert_close(first, torch.tensor([12, 6, 4, 3]) / 25, atol=0.02, rtol=0)


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = Dense.linear
    monkeypatch.setattr(Dense, "linear", lambda *call: 1.01 * right(*call))
    with pytest.raises(AssertionError, match=r"dense y: 0\.01"):
        rows(monkeypatch, tmp_path, layer.main, "--shapes 32x16x24 --experts 4x8x2 --rounds 2 --threads 1")
    assert not list(tmp_path.iterdir())


def test_floors() -> None:
    """By hand: 10 tokens, 4 -> 8, 2 of 3 experts of rank 2, so 4 ranks at work and 6 stored; 4 bytes a number."""
    drawn = problem.Layer.draw((10, 4, 8), (3, 2, 2), "cpu", torch.float32)
    forward, backward = 10 * (4 * 8 + 4 * 12), 10 * (4 * 8 + 2 * 4 * 12)
    arithmetic = ceilings.Ceilings(flops_per_second=2.0, bytes_per_second=float("inf"))
    timed = ("forward", "backward", "forward and backward")
    assert [ceilings.floor_seconds(drawn, what, arithmetic) for what in timed] == [
        forward,
        backward,
        forward + backward,
    ]
    factors, x, y, W = 6 * 12, 40, 80, 32
    forward, backward = 4 * (x + W + factors + y), 4 * (2 * x + W + 2 * factors + y)
    traffic = ceilings.Ceilings(flops_per_second=float("inf"), bytes_per_second=1.0)
    assert [ceilings.floor_seconds(drawn, what, traffic) for what in timed] == [forward, backward, forward + backward]


def test_only_the_second_part_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def pass_time(seconds: float) -> float:
        now[0] += seconds
        return seconds

    monkeypatch.setattr(harness.time, "process_time", lambda: now[0])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    step = harness.Prepared(lambda: pass_time(7), lambda made: pass_time(made / 7))
    assert harness.interleave({"step": step}, rounds=3)["step"] == [1, 1, 1]
    assert len(harness.interleave({"step": step}, rounds=50, warmup=0, seconds=90)["step"]) == 12


def test_steps_rotate_through_their_sets() -> None:
    calls: list[str] = []
    named = harness.rotating([{n: (lambda n=n, i=i: calls.append(f"{n}{i}")) for n in "ab"} for i in range(3)])
    for name in "abab":
        harness.ready(named[name])()
    assert calls == ["a0", "b1", "a2", "b0"]


def test_decoder_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = "--hidden 16 --inner 24 --layers 1 --tokens 8 --experts 2 --rank 2 --rounds 2 --threads 1"
    found = rows(monkeypatch, tmp_path, stack.main, flags)
    assert [row["timed"] for row in found] == ["training", "decoding"]
    wanted = {"lora", "lora, C", "molex, auto", "molex, dense", "molex, preload", "loop", "meteora", "every_expert"}
    assert all(row["times_base"].keys() >= wanted for row in found)


def test_a_wrong_decoder_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = "--hidden 16 --inner 24 --layers 1 --tokens 8 --experts 4 --rank 2 --rounds 2 --threads 1"
    wrong = linears.Way(lambda drawn: 1.01 * contestants.loop(drawn), contestants.loop)
    monkeypatch.setattr(stack, "ways", lambda device, dtype: {"wrong": wrong})
    with pytest.raises(AssertionError, match="wrong: relative error"):
        rows(monkeypatch, tmp_path, stack.main, flags)
    assert not list(tmp_path.iterdir())


def test_a_feed_forward_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = "--num_tokens 32 --hidden 16 --inner 24 --num_experts 4 --rank 2 --rounds 2 --threads 1"
    (found,) = rows(monkeypatch, tmp_path, mixture_ffn.main, flags)
    ours = {f"{backend}{whole}" for backend in ("dense", "preload") for whole in ("", ", block")}
    assert found["milliseconds"].keys() == {"base", "shared", "textbook", *ours}
    base, expert = 2 * 3 * 16 * 24, 3 * 2 * 3 * 2 * (16 + 24)  # multiplications a token, by hand
    assert found["flops"]["shared"] == round((base * 4 / 3 + expert) / (base + expert), 3)


STEP = "--hidden 16 --inner 24 --layers 1 --tokens 8 --experts 4 --rank 2 --rounds 2 --threads 1"


def test_a_training_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (found,) = rows(monkeypatch, tmp_path, training_step.main, STEP)
    ours = {"molex, dense", "molex, preload"}
    assert found["times_base"].keys() >= {"shared", "textbook"} | ours
    assert found["shared_over"].keys() >= ours
    assert found["textbook_over"].keys() >= ours


@pytest.mark.parametrize("wrong", ["RoutedBlock.forward", "LoadBalance.__call__"])
def test_a_wrong_training_step_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str) -> None:
    """One of the two sides 1% off: the block of the others, or the loss of ours."""
    owner: Any = {"RoutedBlock": training_step.RoutedBlock, "LoadBalance": LoadBalance}[wrong.partition(".")[0]]
    method = wrong.partition(".")[2]
    right = getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda *call: 1.01 * right(*call))
    with pytest.raises(AssertionError, match="relative error"):
        rows(monkeypatch, tmp_path, training_step.main, STEP)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_check_wants_a_gpu() -> None:
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu.main()


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch, proofs: Path) -> list[str]:
    """Returns the modules that are run."""
    ran: list[str] = []

    def measure(table: gpu.Table, seconds: float) -> int | None:
        ran.append(table.module)
        return 1 if table.module == "benchmarks.stack" else None if table.module == "benchmarks.memory" else 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "PROOFS", proofs)
    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **settings: ran.append(command[-1]))
    return ran


def test_nothing_is_timed_where_a_proof_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "test_right.py").write_text("def test_it(): pass")
    (tmp_path / "test_wrong.py").write_text("def test_it(): assert False")
    ran = pretend_a_gpu(monkeypatch, tmp_path)
    with pytest.raises(SystemExit, match="nothing was timed"):
        gpu.main()
    assert not ran


def test_tables_follow_what_is_proven(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "test_right.py").write_text("def test_it(): pass")
    ran = pretend_a_gpu(monkeypatch, tmp_path)
    with pytest.raises(SystemExit, match=r"failed: benchmarks\.stack$"):
        gpu.main()
    assert ran == [*(table.module for table in gpu.TABLES), "benchmarks.tables"]


def test_no_proof_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder proves nothing, nor do tests that are all skipped or take too long."""
    monkeypatch.setattr(gpu, "PROOFS", tmp_path)
    assert not gpu.prove(20)
    (tmp_path / "test_slow.py").write_text("import time\n\ndef test_it(): time.sleep(60)")
    assert not gpu.prove(3)


def test_the_gpus_time_is_enough() -> None:
    assert gpu.PROOF_SECONDS + sum(table.seconds for table in gpu.TABLES[:-1]) < 60 * gpu.MINUTES < 9 * 60


@pytest.mark.parametrize("table", gpu.TABLES, ids=lambda table: table.module)
def test_the_gpus_tables_take_their_arguments(table: gpu.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed, and then stopped: nothing is computed."""
    module = importlib.import_module(table.module)
    parsed: list[argparse.Namespace] = []

    def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
        parsed.append(parse_args(parser, list(table.arguments)))
        raise KeyboardInterrupt

    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(KeyboardInterrupt):
        module.main()
    assert parsed[0].device == "cuda"
