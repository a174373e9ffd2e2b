"""Benchmarks run at small sizes, refuse to time what is wrong, and write what they say. No time is looked at."""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    ceilings,
    contestants,
    expert_loop,
    gpu,
    harness,
    layer,
    linears,
    mixture_ffn,
    mixture_linear,
    problem,
    stack,
    training_step,
)
from molex.kernels.dense import Dense
from molex.losses import LoadBalance
from molex.routers.base import Gate


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
    kept = contestants.as_kept(name, drawn)
    torch.testing.assert_close(contestants.CODES[name](kept), torch.stack(expected))


def numbers_of(leaves: Sequence[torch.Tensor]) -> list[int]:
    return [leaf.numel() for leaf in leaves]


def test_parameters_lie_as_the_codes_have_them() -> None:
    """What a code does not do, autograd must not do for it: fill up gradients of slices, or lay factors out anew."""
    drawn = problem.Layer.draw((5, 8, 12), (4, 3, 2), "cpu", torch.float32)
    for name in ("loop", "every_expert", "xlora"):
        leaves = contestants.as_kept(name, drawn).factors()
        assert numbers_of(leaves) == [3 * 8] * 4 + [12 * 3] * 4
        assert all(leaf.is_leaf and leaf.is_contiguous() for leaf in leaves)
    assert contestants.as_kept("meteora_loop", drawn) is drawn
    A, B = contestants.as_kept("meteora", drawn).factors()
    assert (A.shape, A.data_ptr(), B.shape, B.is_contiguous()) == ((4, 8, 3), drawn.A.data_ptr(), (4, 3, 12), True)
    lora = contestants.as_kept("lora", drawn).factors()
    assert numbers_of(lora) == [6 * 8, 12 * 6]
    assert all(leaf.is_leaf for leaf in lora)


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
    wrong, right = (lambda drawn: 1.01 * contestants.loop(drawn)), contestants.loop
    for way, what in ((linears.Way(wrong, right), "logits"), (linears.Way(right, wrong), "logits in evaluation")):
        with pytest.raises(AssertionError, match=f"wrong, {what}: relative error"):
            time_stack_with(way, monkeypatch, tmp_path)
        assert not list(tmp_path.iterdir())


def time_stack_with(way: linears.Way, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[dict[str, Any]]:
    flags = "--hidden 16 --inner 24 --layers 1 --tokens 8 --experts 8 --rank 8 --rounds 2 --threads 1"
    monkeypatch.setattr(stack, "ways", lambda device, dtype: {"wrong": way})
    return rows(monkeypatch, folder, stack.main, flags)


def five_percent_more(A: torch.Tensor) -> torch.Tensor:
    """A, whose gradient is then 1.05 times the right one."""
    return A + 0.05 * (A - A.detach())


def without_a_row(A: torch.Tensor) -> torch.Tensor:
    """A, the gradient of whose first row, of 64, is then zero."""
    return torch.cat([A[:1].detach(), A[1:]])


@pytest.mark.parametrize("spoilt", [five_percent_more, without_a_row])
def test_one_wrong_gradient_is_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoilt: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Only in the layer's widest linear, of one of seven A."""

    def wrong(drawn: problem.Layer) -> torch.Tensor:
        return contestants.loop(replace(drawn, A=spoilt(drawn.A)) if drawn.x.shape[1] == 24 else drawn)

    with pytest.raises(AssertionError, match=r"wrong, model\.layers\.0\.mlp\.down_proj\.lora_A: relative error"):
        time_stack_with(linears.Way(wrong, contestants.loop), monkeypatch, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_layout_for_inference_is_made_once() -> None:
    sizes = {"hidden": 16, "inner": 24, "layers": 1, "experts": 4, "rank": 2, "top_k": 2}
    flags, seen = argparse.Namespace(**sizes, device="cpu", dtype="bfloat16"), []
    way = linears.ways("cpu", torch.bfloat16)["meteora"]._replace(inference=lambda drawn: seen.append(drawn) or drawn.x)
    linear = stack.with_way(stack.build(flags), flags, way).get_submodule("model.layers.0.self_attn.q_proj").eval()
    for _ in range(2):
        linear(torch.ones(1, 3, 16, dtype=torch.bfloat16))
    assert seen[0].A is seen[1].A
    assert seen[0].B.dtype == torch.bfloat16
    torch.testing.assert_close(seen[0].B.permute(2, 0, 1).flatten(1), linear.lora_B.bfloat16())
    with torch.no_grad():
        linear.train().lora_A.zero_()
    linear.eval()(torch.ones(1, 3, 16, dtype=torch.bfloat16))
    assert not seen[2].A.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*expert_loop.METHODS])
def test_wrong_experts_are_not_timed(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    drawn = expert_loop.Inputs.draw(expert_loop.Shape(48, 24, 32, 4, 4, 2), dtype, torch.float32)
    expert_loop.check(drawn)
    right = expert_loop.METHODS[name]
    monkeypatch.setitem(expert_loop.METHODS, name, lambda i: 1.02 * right(i) if i.x.dtype == dtype else right(i))
    with pytest.raises(AssertionError, match="relative RMS error"):
        expert_loop.check(drawn)


def test_a_wrong_mixture_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose gate receives 1% more than its gradient."""
    for name, size in {"num_tokens": 48, "num_in": 24, "num_out": 32, "num_experts": 4, "rank": 4}.items():
        monkeypatch.setitem(mixture_linear.SHAPE, name, size)
    _, mixture = mixture_linear.build(torch.float32)
    x, grad = torch.randn(48, 24, requires_grad=True), torch.randn(48, 32)
    mixture_linear.check(mixture, x, grad)
    right = Gate.forward

    def wrong(gate: Gate, x: torch.Tensor) -> torch.Tensor:
        logits_TE = right(gate, x)
        return logits_TE + 0.01 * (right(gate, x.detach()) - logits_TE.detach())

    monkeypatch.setattr(Gate, "forward", wrong)
    with pytest.raises(AssertionError, match=r"d router\.gate\.weight: relative RMS error 0\.01"):
        mixture_linear.check(mixture, x.detach().requires_grad_(), grad)


def test_a_row_says_that_its_commit_was_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By what is measured, not by rows."""
    files = [tmp_path / name for name in ("benchmarks/results/layer.jsonl", "benchmarks/layer.py", "molex/a/b.py")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "All"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "benchmarks" / "harness.py"))
    for file, changed in zip(files, (False, True, True), strict=True):
        file.write_text("changed")
        assert harness.machine()["commit"].endswith("+changes") == changed, file
        file.write_text("")


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
