"""The arithmetic of memory: the paper's published figures, sums by hand, and what the kernel counts."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import harness, serving_memory
from benchmarks.serving_memory import BASE, PAPER_FRAGMENTATION, PAPER_SLOTS, SERVED, cache_tokens, fragmentation
from molex_serve.memory import calculator

GiB = 2**30


def test_shapes_of_deepseek_v2_lite() -> None:
    assert BASE.expert_bytes == 16.5 * 2**20
    assert BASE.cache_bytes == 31_104
    assert calculator.grouped_cache_bytes(32, 8, 128, 2) == 131_072  # an 8 B Llama's 128 KiB


@pytest.mark.parametrize(("num_adapters", "paper"), PAPER_SLOTS.items())
def test_cache_tokens_of_the_paper(num_adapters: int, paper: int) -> None:
    assert cache_tokens(num_adapters)["slots"] == pytest.approx(paper, rel=0.03)


@pytest.mark.parametrize(("num_adapters", "slots", "padded"), [(1, 32.1, 34), (2, 36.2, 39), (3, 38.7, 44.3)])
def test_weights_of_the_paper(num_adapters: int, slots: float, padded: float) -> None:
    """Figure 9, in GiB."""
    own = BASE.slots([adapter.tuned for adapter in SERVED[:num_adapters]])
    assert (BASE.num_bytes + own) / GiB == pytest.approx(slots, rel=0.01)
    assert (BASE.num_bytes + BASE.padded(num_adapters, 12)) / GiB == pytest.approx(padded, rel=0.01)


def test_gains_over_padding_in_the_paper() -> None:
    """22.8 to 63.4% more cached tokens for two and three adapters, 28.9 to 40.4% less overhead; ours come close."""
    two, three = cache_tokens(2), cache_tokens(3)
    assert two["slots"] / two["padded"] == pytest.approx(1.228, rel=0.03)
    assert three["slots"] / three["padded"] == pytest.approx(1.634, rel=0.03)
    assert BASE.slots([SERVED[0].tuned]) / BASE.padded(1, 12) == pytest.approx(1 - 0.404, rel=0.03)


def test_fragmentation_of_the_paper() -> None:
    assert fragmentation() == pytest.approx(PAPER_FRAGMENTATION, rel=0.01)


def test_two_merged_models_do_not_fit() -> None:
    assert cache_tokens(1)["merged"] == serving_memory.PAPER_MERGED
    assert cache_tokens(2)["merged"] < 0


def test_by_hand() -> None:
    """2 layers of 4 experts of 10 bytes; adapters of 1 and 3, and of 2 and 0 experts."""
    base = calculator.SwapBase(num_bytes=100, num_layers=2, num_experts=4, expert_bytes=10, cache_bytes=7)
    adapters = [[1, 3], [2, 0]]
    assert base.slots(adapters) == 60
    assert base.padded(2, 3) == 120
    assert base.fragmentation(adapters, 3) == (2 * (4 + 6)) / (8 + 6)
    assert base.cache_tokens(300, 60) == 20
    assert base.cache_tokens(300, 0, copies=2) == 14
    assert base.usable(20) == 240
    assert calculator.low_rank_bytes(3, [(5, 7), (2, 4)], 2) == 3 * 2 * (5 + 7 + 2 + 4)
    assert calculator.latent_cache_bytes(2, 5, 3, 2) == 32


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
def test_what_the_kernel_counts() -> None:
    """Within a page for each adapter, layer and tensor, as neighbours share the pages at their boundaries."""
    serving_memory.measured(8, 8)
    found = serving_memory.measured(64, 175)
    pages = len(SERVED) * serving_memory.LAYERS * 2 * 4096 / 2**20
    assert found["arithmetic"] <= found["pages"] <= found["arithmetic"] + pages
    assert found["resident"] == pytest.approx(found["pages"], abs=1)
    assert found["unloaded"] == pytest.approx(found["unloaded_arithmetic"], abs=2 * pages / 3 + 1)
    assert found["padded"] > 1.5 * found["resident"]


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["serving_memory", "--hidden", "16", "--inner", "17"])
    serving_memory.main()
    row = json.loads((tmp_path / "serving_memory.jsonl").read_text())
    assert row["tokens"]["2"]["slots"] == cache_tokens(2)["slots"]
    assert row["fragmentation"] == 1.502
    assert f"{cache_tokens(3)['slots']} (477000)" in capsys.readouterr().out
