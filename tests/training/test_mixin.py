"""The losses, gradients and logs of a mixture under Trainer and SFTTrainer, against computations by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

import molex
from molex.errors import ConfigError, StateError
from molex.training import MixtureTrainer
from molex.workbench import load_tokenizer
from tests.models import tiny
from tests.training.small import mixture_of, quick, texts, trainer_of

KINDS = pytest.mark.parametrize("kind", ["trainer", "sft"])
COEFFICIENT, NUM_EXPERTS, TOP_K = 0.5, 4, 2
MIXLORA = {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "rank": 4, "balance_coefficient": COEFFICIENT}


def balance_by_hand(mixture: molex.Mixture, batch: dict[str, Tensor]) -> Tensor:
    """MixLoRA's loss, E Σ_e f_e P_e over the real tokens of all layers, from the base's activations."""
    inputs: dict[str, Tensor] = {}
    routed = {name: layer for name, layer in mixture.layers.items() if name.endswith("gate_proj")}
    hooks = [
        layer.register_forward_hook(lambda module, args, output: inputs.__setitem__(module.name, args[0]))
        for layer in routed.values()
    ]
    mixture.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    probabilities, chosen = [], []
    for name, layer in routed.items():
        real = inputs[name][batch["attention_mask"].bool()].double()
        p = (real @ layer.router.gate.weight.double().T).softmax(-1)
        picks = torch.zeros_like(p)
        for token, row in enumerate(p):
            picks[token, row.topk(TOP_K).indices] = 1
        probabilities.append(p)
        chosen.append(picks)
    return COEFFICIENT * NUM_EXPERTS * (torch.cat(chosen).mean(0) * torch.cat(probabilities).mean(0)).sum()


def routers(mixture: molex.Mixture) -> dict[str, Any]:
    return {name: p for name, p in mixture.model.named_parameters() if ".router." in name}


@KINDS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_router_learns_from_the_auxiliary_loss_alone(kind: str, smoothing: float, tmp_path: Path) -> None:
    mixture = mixture_of("mixlora", awake=False, dropout=0.0, **MIXLORA)  # experts are zero: no task gradient
    arguments = {"gradient_accumulation_steps": 2, "label_smoothing_factor": smoothing, "learning_rate": 0.0}
    trainer = trainer_of(kind, mixture, tmp_path, texts(4), max_steps=1, **arguments)
    trainer.train()
    assert len(trainer.seen) == 2
    by_hand = torch.stack([balance_by_hand(mixture, batch) for batch in trainer.seen]).mean()
    expected = torch.autograd.grad(by_hand, list(routers(mixture).values()))
    for name, gradient in zip(routers(mixture), expected, strict=True):
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(trainer.gradients[name], gradient, rtol=1e-4, atol=1e-6)
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(float(by_hand.detach()), rel=1e-5)


def test_stock_sft_trainer_leaves_the_router_untrained(tmp_path: Path) -> None:
    mixture = mixture_of("mixlora", awake=False, dropout=0.0, **MIXLORA)
    before = {name: p.detach().clone() for name, p in routers(mixture).items()}
    args = SFTConfig(str(tmp_path), max_steps=1, **quick())
    SFTTrainer(mixture.model, args=args, train_dataset=texts(4), processing_class=load_tokenizer()).train()
    assert all(torch.equal(p, before[name]) for name, p in routers(mixture).items())


@KINDS
def test_logged_loss_is_the_task_loss_and_the_auxiliary_loss(kind: str, tmp_path: Path) -> None:
    mixture = mixture_of("mixlora", dropout=0.0, **MIXLORA)
    trainer = trainer_of(kind, mixture, tmp_path, texts(4), max_steps=1, gradient_accumulation_steps=2, learning_rate=0)
    trainer.train()
    with torch.no_grad():
        sums, aux = [], []
        for batch in trainer.seen:
            logits = mixture.model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            aux.append(mixture.aux_loss())
            sums.append(
                F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
            )
    num_tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in trainer.seen)
    assert trainer.losses[0] == pytest.approx(float(sum(sums) / num_tokens + sum(aux) / 2), rel=1e-5)


@KINDS
def test_label_smoothing_smooths_the_task_loss_only(kind: str, tmp_path: Path) -> None:
    mixture = mixture_of("mixlora", dropout=0.0, **MIXLORA)
    trainer = trainer_of(kind, mixture, tmp_path, texts(2), max_steps=1, label_smoothing_factor=0.2, learning_rate=0)
    trainer.train()
    batch = trainer.seen[0]
    with torch.no_grad():
        logits = mixture.model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    real = batch["labels"][:, 1:] != -100
    log_p = logits[:, :-1][real].log_softmax(-1)
    nll = -log_p.gather(1, batch["labels"][:, 1:][real][:, None])
    by_hand = (0.8 * nll[:, 0] + 0.2 * -log_p.mean(-1)).mean() + mixture.aux_loss()
    assert trainer.losses[0] == pytest.approx(float(by_hand), rel=1e-5)


@KINDS
def test_evaluation_reports_the_task_loss_and_the_auxiliary_loss_apart(kind: str, tmp_path: Path) -> None:
    mixture = mixture_of("mixlora", **MIXLORA)
    trainer = trainer_of(kind, mixture, tmp_path, texts(4), texts(2))
    metrics = trainer.evaluate()
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        logits = mixture.model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    task = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert metrics["eval_loss"] == pytest.approx(float(task), rel=1e-5)
    assert metrics["eval_aux_loss"] == pytest.approx(float(balance_by_hand(mixture, batch).detach()), rel=1e-5)
    assert 0 < metrics["eval_routing/entropy"] <= 1


@KINDS
def test_evaluates_while_training_and_predicts(kind: str, tmp_path: Path) -> None:
    mixture = mixture_of("mixlora", **MIXLORA)
    trainer = trainer_of(kind, mixture, tmp_path, texts(4), texts(3), max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    steps = [row for row in trainer.state.log_history if "loss" in row]
    assert len(evaluations) == len(steps) == 2
    assert all(row["aux_loss"] > 0 and "routing/entropy" in row for row in steps)
    output = trainer.predict(trainer.eval_dataset)
    assert output.predictions.shape[0] == 3
    assert output.metrics["test_aux_loss"] > 0


@KINDS
def test_accumulated_gradients_are_those_of_the_big_batch(kind: str, tmp_path: Path) -> None:
    def gradients(batch_size: int) -> dict[str, Tensor]:
        mixture = mixture_of("mixlora", dropout=0.0, **{**MIXLORA, "balance_coefficient": 0.0})
        steps = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        trainer = trainer_of(kind, mixture, tmp_path, texts(4), max_steps=1, **steps)
        trainer.train()
        assert len({int((b["labels"] != -100).sum()) for b in trainer.seen}) == len(trainer.seen)  # unlike lengths
        return trainer.gradients

    whole, parts = gradients(4), gradients(2)
    assert any(".router." in name and gradient.any() for name, gradient in whole.items())
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


@KINDS
def test_activation_checkpointing_changes_no_gradient(kind: str, tmp_path: Path) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        mixture = mixture_of("mixlora", dropout=0.2, **MIXLORA)
        arguments = {"max_steps": 1, "gradient_accumulation_steps": 2, "activation_checkpointing": checkpointing}
        trainer = trainer_of(kind, mixture, tmp_path, texts(4), **arguments)
        trainer.train()
        assert mixture.model.is_activation_checkpointing == checkpointing
        return trainer.gradients

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


@KINDS
@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_reentrant_checkpointing_is_refused_under_both_names(kind: str, name: str, tmp_path: Path) -> None:
    arguments = {"activation_checkpointing": None, name: True, f"{name}_kwargs": {"use_reentrant": True}}
    with pytest.raises(ConfigError, match="re-entrant"):
        trainer_of(kind, mixture_of("mixlora", **MIXLORA), tmp_path, texts(4), **arguments)


@KINDS
def test_balance_biases_move_once_for_each_micro_batch(kind: str, tmp_path: Path) -> None:
    mixture = mixture_of("smora", num_experts=8, top_k=2)
    trainer = trainer_of(
        kind,
        mixture,
        tmp_path,
        texts(6),
        texts(4),
        max_steps=1,
        gradient_accumulation_steps=3,
        activation_checkpointing=True,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    assert len(trainer.loads) == 3
    for name, layer in mixture.layers.items():
        loads = [load[name] for load in trainer.loads]
        expected = sum(layer.router.rate * torch.sign(load.mean() - load) for load in loads)
        torch.testing.assert_close(layer.router.bias, expected)
        assert expected.any()


@KINDS
@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bit_bases_keep_float32_master_weights(kind: str, autocast: bool, tmp_path: Path) -> None:
    mixture = mixture_of("mixlora", torch.float32 if autocast else torch.bfloat16, dropout=0.0, **MIXLORA)
    trainer = trainer_of(kind, mixture, tmp_path, texts(2), max_steps=4, bf16=autocast)
    trainer.train()
    exact = trainer_of(kind, mixture_of("mixlora", dropout=0.0, **MIXLORA), tmp_path, texts(2), max_steps=4)
    exact.train()
    assert {p.dtype for p in mixture.trainable_parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in trainer.gradients.values()} == {torch.float32}
    assert trainer.losses == pytest.approx(exact.losses, rel=0.02)
    assert trainer.losses != exact.losses
    assert trainer.losses[-1] < trainer.losses[0]


def test_without_losses_nothing_is_added(tmp_path: Path) -> None:
    trainer = trainer_of("trainer", mixture_of("lora"), tmp_path, texts(2), max_steps=1)
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0]
    assert "routing/entropy" not in trainer.state.log_history[0]
    assert math.isfinite(trainer.losses[0])


def test_a_model_that_is_no_mixture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="not converted"):
        MixtureTrainer(tiny("llama"))


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_a_quantised_base_trains_and_keeps_float32_experts(kind: str, tmp_path: Path) -> None:
    """What the trainers see of one is a flag. They refuse to train it without PEFT; TRL casts what trains."""
    mixture = mixture_of("mixlora")
    model: Any = mixture.model
    model.is_quantized = model.is_loaded_in_4bit = True
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    trainer = trainer_of(kind, mixture, tmp_path, texts(4), max_steps=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixture.state_dict().items())
    assert {p.dtype for p in mixture.trainable_parameters()} == {torch.float32}
    assert "_hf_peft_config_loaded" not in vars(model)
    model.is_loaded_in_4bit = False  # for what follows bitsandbytes would have to be installed
    trainer.train()
    moved = [name for name, tensor in mixture.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any("lora_B" in name for name in moved)


def test_a_batchs_tasks_end_with_it(tmp_path: Path) -> None:
    rows = texts(4, tasks=[0, 1, 1, 0])
    trainer = trainer_of("sft", mixture_of("mtlora", num_experts=3), tmp_path, rows, rows, max_steps=2)
    trainer.train()
    assert trainer.tasks[0] is not None
    assert trainer.mixture.state.tasks is None
    trainer.evaluate()
    assert trainer.mixture.state.tasks is None


def test_the_card_beside_a_checkpoint_is_the_mixtures(tmp_path: Path) -> None:
    arguments = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of("sft", mixture_of("mixlora"), tmp_path, texts(4), **arguments)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert "molex.load" in (folder / "README.md").read_text()


def test_data_parallel_replicas_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ConfigError, match="torchrun"):
        trainer_of("trainer", mixture_of("mixlora"), tmp_path, texts(4))
