"""What the optimizer holds, and at which rates."""

from pathlib import Path

import pytest
import torch

from molex.errors import ConfigError, StateError
from molex.training import MixtureTrainer, MixtureTrainingArguments
from molex.training.groups import router_parameters
from tests.training.small import mixture_of, quick, texts, tokenised, trainer_of

RATES = {"learning_rate": 1e-3, "router_learning_rate": 5e-2, "weight_decay": 0.1}


@pytest.mark.parametrize("kind", ["trainer", "sft"])
@pytest.mark.parametrize("preset", ["mixlora", "loramoe", "xlora"])
def test_routers_have_a_rate_of_their_own(kind: str, preset: str, tmp_path: Path) -> None:
    mixture = mixture_of(preset, num_experts=4, localized_coefficient=0) if preset == "loramoe" else mixture_of(preset)
    trainer = trainer_of(kind, mixture, tmp_path, texts(4), **RATES)
    optimizer = trainer.create_optimizer()
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in mixture.model.named_parameters() if p.requires_grad}
    assert len(rate_of) == len(trainable) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in trainable.items():
        is_router = ".router." in name or name.startswith("molex.router")
        assert rate_of[id(parameter)] == (5e-2 if is_router else 1e-3), name
    assert {5e-2} <= set(rate_of.values())


def test_weight_decay_is_the_trainers_own(tmp_path: Path) -> None:
    mixture = mixture_of("xlora")  # its head has biases, which do not decay
    split = trainer_of("trainer", mixture, tmp_path, texts(4), **RATES).create_optimizer()
    whole = trainer_of("trainer", mixture, tmp_path, texts(4), weight_decay=0.1).create_optimizer()
    decays = [{id(p): g["weight_decay"] for g in o.param_groups for p in g["params"]} for o in (split, whole)]
    assert decays[0] == decays[1]
    assert set(decays[0].values()) == {0.0, 0.1}


def test_the_scheduler_moves_both_rates(tmp_path: Path) -> None:
    trainer = trainer_of("trainer", mixture_of("mixlora"), tmp_path, texts(4), lr_scheduler_type="linear", **RATES)
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    for _ in range(2):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert sorted({group["lr"] for group in trainer.optimizer.param_groups}) == pytest.approx([5e-4, 2.5e-2])


def test_training_twice_keeps_the_groups(tmp_path: Path) -> None:
    trainer = trainer_of("trainer", mixture_of("mixlora"), tmp_path, texts(4), max_steps=1, **RATES)
    trainer.train()
    trainer.train()
    assert len({id(p) for group in trainer.optimizer.param_groups for p in group["params"]}) == len(
        trainer.mixture.trainable_parameters()
    )


def test_grown_experts_train_and_frozen_ones_stay(tmp_path: Path) -> None:
    mixture = mixture_of("moram", num_experts=4)
    mixture.grow(4)
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    trainer_of("trainer", mixture, tmp_path, texts(4), max_steps=2, weight_decay=0.1).train()
    for name, tensor in mixture.state_dict().items():
        if "frozen" in name:
            assert torch.equal(tensor, before[name]), name
        elif name.endswith(("lora_A", "lora_B")):
            assert not torch.equal(tensor, before[name]), name


def test_experts_that_came_after_the_optimizer_are_noticed(tmp_path: Path) -> None:
    mixture = mixture_of("moram", num_experts=4)
    trainer = trainer_of("trainer", mixture, tmp_path, texts(4), max_steps=1)
    trainer.train()
    mixture.grow(2)
    with pytest.raises(StateError, match=r"after mixture\.grow make a new trainer"):
        trainer.train()


def test_an_optimizer_of_the_users_own_is_not_split(tmp_path: Path) -> None:
    mixture = mixture_of("mixlora")
    args = MixtureTrainingArguments(str(tmp_path), max_steps=1, **quick(router_learning_rate=1e-3))
    own = torch.optim.SGD(mixture.trainable_parameters(), lr=0.1)
    trainer = MixtureTrainer(mixture.model, args, train_dataset=tokenised(texts(4)), optimizers=(own, None))
    with pytest.raises(ConfigError, match="router_learning_rate"):
        trainer.train()


def test_a_method_without_router_parameters_has_none(tmp_path: Path) -> None:
    mixture = mixture_of("flylora", num_experts=8, top_k=2)
    assert router_parameters(mixture) == []
    trainer = trainer_of("trainer", mixture, tmp_path, texts(4), **RATES)
    with pytest.raises(ConfigError, match="flylora has no router that trains"):
        trainer.create_optimizer()


def test_values_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="router_learning_rate"):
        MixtureTrainingArguments(str(tmp_path), router_learning_rate=-1.0)
    with pytest.raises(ConfigError, match="routing_logs"):
        MixtureTrainingArguments(str(tmp_path), routing_logs="everything")  # type: ignore[arg-type]
