"""Checkpoints of a run: what they hold, that a resumed run is the uninterrupted one, and the best one at the end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import molex
from molex.training import MixtureTrainer
from molex.training.groups import router_parameters
from molex.workbench.tokenizer import VOCABULARY_SIZE
from tests.models import tiny
from tests.training.small import Recording, mixture_of, texts, trainer_of

KINDS = pytest.mark.parametrize("kind", ["trainer", "sft"])
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def run(
    kind: str, folder: Path, mixture: molex.Mixture, resume_from: Path | None = None, **arguments: Any
) -> "Recording":
    trainer = trainer_of(kind, mixture, folder, texts(8), texts(2), **{**SAVING, **arguments})
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return trainer


def grown(**overrides: Any) -> molex.Mixture:
    mixture = mixture_of("moram", num_experts=4, **overrides)
    mixture.grow(4)
    return mixture


MAKERS = {
    "mixlora": lambda: mixture_of("mixlora", num_experts=4, rank=4, dropout=0.2),
    "smora": lambda: mixture_of("smora", num_experts=8, top_k=2, dropout=0.2),
    "moram, grown": lambda: grown(dropout=0.2),
    "mola, head trained": lambda: mixture_of("mola", allocation=None, num_experts=2, dropout=0.2, also_train="lm_head"),
}


@KINDS
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, make: Any, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"gradient_accumulation_steps": 2}
    if router_parameters(make()):
        arguments["router_learning_rate"] = 5e-2
    whole = run(kind, tmp_path / "whole", make(), **arguments)
    resumed = run(kind, tmp_path / "resumed", make(), tmp_path / "whole" / "checkpoint-2", **arguments)
    assert len(resumed.seen) == 4, "the first two steps were trained again"
    assert resumed.losses == whole.losses
    assert [row.get("aux_loss") for row in resumed.state.log_history] == [
        row.get("aux_loss") for row in whole.state.log_history
    ]
    expected, state = whole.mixture.state_dict(), resumed.mixture.state_dict()
    assert expected.keys() == state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_run_that_does_not_load_its_mixture_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    whole = run("trainer", tmp_path / "whole", MAKERS["mixlora"]())
    monkeypatch.setattr(MixtureTrainer, "_load_mixture", lambda self, directory: None)
    resumed = run("trainer", tmp_path / "resumed", MAKERS["mixlora"](), tmp_path / "whole" / "checkpoint-2")
    assert resumed.losses != whole.losses


@KINDS
def test_a_checkpoint_holds_the_mixture_and_no_base(kind: str, tmp_path: Path) -> None:
    mixture = MAKERS["mola, head trained"]()
    run(kind, tmp_path, mixture)
    files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert files >= {"molex.safetensors", "molex_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert files >= {"trainer_state.json", "tokenizer.json", "training_args.json"}
    assert not files & {"model.safetensors", "pytorch_model.bin", "config.json", "training_args.bin"}
    with safe_open(tmp_path / "checkpoint-4" / "molex.safetensors", "pt") as saved:
        names = set(saved.keys())
    assert names == set(mixture.state_dict())
    assert "lm_head.weight" in names
    assert not [name for name in names if ".base." in name]
    assert json.loads((tmp_path / "checkpoint-4" / "training_args.json").read_text())["max_steps"] == 4


@KINDS
def test_a_checkpoint_loads_on_a_fresh_base(kind: str, tmp_path: Path) -> None:
    trainer = run(kind, tmp_path, MAKERS["mixlora"]())
    trainer.save_model(str(tmp_path / "final"))
    batch = torch.arange(3, 12).view(1, 9)
    for folder in ("checkpoint-4", "final"):
        base = tiny("llama", vocab_size=VOCABULARY_SIZE, max_position_embeddings=256)
        loaded = molex.load(base, tmp_path / folder)
        torch.testing.assert_close(
            loaded.model.eval()(batch).logits, trainer.mixture.model.eval()(batch).logits, rtol=0, atol=0
        )


@KINDS
def test_the_best_mixture_is_loaded_at_the_end(kind: str, tmp_path: Path) -> None:
    trainer = run(
        kind,
        tmp_path,
        MAKERS["smora"](),
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        greater_is_better=True,  # training makes the loss fall, so the best is an early one
        save_total_limit=1,
    )
    evaluations = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    best = evaluations.index(max(evaluations)) + 1
    assert best < 4, "the last step is the best: this shows nothing"
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert left == {f"checkpoint-{best}"}, "save_total_limit keeps the best"
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    _assert_holds(trainer.mixture, load_file(tmp_path / f"checkpoint-{best}" / "molex.safetensors"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(evaluations), rel=1e-6)


@KINDS
def test_save_only_model_and_save_total_limit(kind: str, tmp_path: Path) -> None:
    run(kind, tmp_path, MAKERS["mixlora"](), save_steps=1, save_only_model=True, save_total_limit=2)
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert left == ["checkpoint-3", "checkpoint-4"]
    assert not (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
    assert (tmp_path / "checkpoint-4" / "molex.safetensors").exists()


def test_a_checkpoint_of_another_mixture_is_refused(tmp_path: Path) -> None:
    run("trainer", tmp_path / "small", MAKERS["mixlora"]())
    other = mixture_of("mixlora", num_experts=8, rank=4)
    with pytest.raises(molex.MolexError, match="experts"):
        run("trainer", tmp_path / "other", other, tmp_path / "small" / "checkpoint-2")


def _assert_holds(mixture: molex.Mixture, tensors: dict[str, Tensor]) -> None:
    state = mixture.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
