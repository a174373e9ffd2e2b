"""Statistics of a logging interval, against counts by hand."""

import math
from pathlib import Path

import pytest
import torch

from molex.routing import Decision, RouteContext, Routing
from molex.training.routing_log import RoutingLog
from tests.training.small import mixture_of, texts, trainer_of


def decision(ids: list[list[int]], mask: list[bool] | None = None, num_experts: int = 4) -> Decision:
    ids_TK = torch.tensor(ids)
    token_mask = None if mask is None else torch.tensor(mask)
    routing = Routing(ids_TK, (ids_TK >= 0).float(), None, num_experts)
    return Decision(routing, RouteContext(shape=(1, len(ids)), token_mask=token_mask))


def test_numbers_of_two_forwards_without_padding() -> None:
    log = RoutingLog()
    even = [[0, 1], [2, 3]]
    log.add({"layers.0.a": decision(even), "layers.0.b": decision([[0, 1], [0, 1]])}, torch.tensor(1.0))
    log.add({"layers.0.a": decision(even), "layers.0.b": decision([[0, 2], [3, 3]], [True, False])}, torch.tensor(3.0))
    logs = log.read("summary")
    load = [3 / 6, 2 / 6, 1 / 6, 0]
    entropy_b = -sum(p * math.log(p) for p in load if p) / math.log(4)
    assert logs == pytest.approx(
        {"aux_loss": 2.0, "routing/entropy": (1 + entropy_b) / 2, "routing/max_load": 2.0, "routing/dead": 1.0}
    )
    assert log.read("summary") == {}


def test_details_name_blocks_or_layers() -> None:
    trace = {"layers.0.a": decision([[0], [0]]), "layers.0.b": decision([[1], [2]]), "layers.1.a": decision([[3], [3]])}
    log = RoutingLog()
    log.add(trace, None)
    blocks = log.read("blocks")
    assert {key: value for key, value in blocks.items() if key.endswith("/dead")} == {
        "routing/dead": 8.0,
        "routing/layers.0/dead": 5.0,
        "routing/layers.1/dead": 3.0,
    }
    log.add(trace, None)
    layers = log.read("layers")
    assert layers["routing/layers.0.b/entropy"] == pytest.approx(0.5)
    assert layers["routing/layers.1.a/max_load"] == 4.0
    assert len(layers) == 3 * (1 + len(trace))


def test_layers_with_one_expert_are_left_out() -> None:
    log = RoutingLog()
    log.add({"layers.0.a": decision([[0], [0]], num_experts=1)}, None)
    assert log.read("layers") == {}


def test_an_interval_sums_its_micro_batches(tmp_path: Path) -> None:
    mixture = mixture_of("mixlora", num_experts=4, top_k=2)
    trainer = trainer_of(
        "sft",
        mixture,
        tmp_path,
        texts(8),
        max_steps=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        routing_logs="layers",
    )
    trainer.train()
    logged = next(row for row in trainer.state.log_history if "loss" in row)
    for name in (name for name in mixture.layers if name.endswith("gate_proj")):
        counts = torch.stack([load[name] for load in trainer.loads]).sum(0)
        assert len(trainer.loads) == 4
        assert counts.sum() == 2 * sum(int(batch["attention_mask"].sum()) for batch in trainer.seen)
        assert logged[f"routing/{name}/max_load"] == pytest.approx(float(counts.max() / counts.mean()))
