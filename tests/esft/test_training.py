"""Training moves the chosen experts and nothing else, in any loop; the model comes back as it was."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

import molex.esft
from molex.errors import ConfigError, StateError
from molex.esft import ExpertWeights, Selection
from molex.esft.layers import weigh
from molex.esft.tuned import Pairs, by_experts, by_groups
from tests.close import assert_close
from tests.esft.models import ARCHITECTURES, moe, tokens

CHOSEN = Selection({1: (5, 0), 2: (3,)})


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train(model: PreTrainedModel, parameters: list[nn.Parameter], steps: int = 8) -> list[float]:
    """AdamW with decay, which moves every parameter that it is given."""
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)
    ids, losses = tokens(4, 12), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_the_chosen_experts_change(name: str) -> None:
    model = moe(name).train()
    before = snapshot(model)
    tuning = molex.esft.tune(model, CHOSEN)
    losses = train(model, [p for p in model.parameters() if p.requires_grad])
    assert losses[-1] < losses[0] - 0.05
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    trained = {number: tuning.tuned(number).weights(torch.float32) for number in (1, 2)}
    tuning.merge()
    merged = model.state_dict()
    assert merged.keys() == before.keys()
    for key, value in before.items():
        layer = key.removesuffix(".gate_up_proj").removesuffix(".down_proj")
        number = next((n for n in (1, 2) if layer == f"model.layers.{n}.mlp.experts"), None)
        if number is None:
            assert torch.equal(merged[key], value), key
            continue
        for expert in range(len(value)):
            same = torch.equal(merged[key][expert], value[expert])
            assert same == (expert not in CHOSEN.experts[number]), (key, expert)
    for number, own in trained.items():
        for expert, weights in own.items():
            assert torch.equal(merged[f"model.layers.{number}.mlp.experts.gate_up_proj"][expert], weights.gate_up)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_at_first_it_is_the_base_and_after_merging_it_stays_itself(name: str) -> None:
    model = moe(name)
    batch = {"input_ids": tokens(2, 9)}
    with torch.no_grad():
        base = model(**batch).logits
        tuning = molex.esft.tune(model, CHOSEN)
        torch.testing.assert_close(model(**batch).logits, base, rtol=1e-5, atol=1e-5)
        for p in tuning.trainable_parameters():
            p += 0.3 * torch.randn_like(p)
        tuned = model(**batch).logits
        assert (tuned - base).abs().max() > 0.1
        torch.testing.assert_close(tuning.merge()(**batch).logits, tuned, rtol=1e-5, atol=1e-5)


def test_revert_gives_the_same_objects_back() -> None:
    model = moe("qwen3_moe")
    model.lm_head.requires_grad_(False)
    before, objects = snapshot(model), {name: id(p) for name, p in model.named_parameters()}
    modules, configs = [*map(id, model.modules())], [id(getattr(m, "config", None)) for m in model.modules()]
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    tuning = molex.esft.tune(model, CHOSEN)
    train(model, tuning.trainable_parameters(), steps=2)
    assert tuning.revert() is model
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert [*map(id, model.modules())] == modules
    assert [id(getattr(m, "config", None)) for m in model.modules()] == configs
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(StateError, match="reverted or merged"):
        tuning.revert()
    molex.esft.tune(model, CHOSEN).revert()


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2"])  # the first saves its layers under other names
def test_the_ordinary_trainer_trains_saves_and_resumes(name: str, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 8)]

    def run(steps: int, resume: bool) -> tuple[molex.esft.Tuning, float]:
        model = moe(name).train()
        tuning = molex.esft.tune(model, CHOSEN)
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            save_steps=3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": False},
            seed=1,
        )
        loss = Trainer(model=model, args=args, train_dataset=rows).train(resume_from_checkpoint=resume or None)  # type: ignore[arg-type]
        return tuning, loss.training_loss

    whole, _ = run(6, resume=False)
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed, _ = run(6, resume=True)
    for mine, other in zip(whole.trainable_parameters(), resumed.trainable_parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    with pytest.raises(StateError, match="has no model"):
        resumed.model.load_state_dict(moe(name).state_dict(), strict=False)
    before = moe(name).state_dict()
    assert all(torch.equal(resumed.model.state_dict()[name], value) for name, value in before.items())
    assert not torch.equal(whole.tuned(2).down[0], before["model.layers.2.mlp.experts.down_proj"][3])


def test_a_base_in_16_bits_trains_in_float32_and_computes_in_its_own() -> None:
    model = moe("olmoe").to(torch.bfloat16).train()
    tuning = molex.esft.tune(model, CHOSEN)
    assert {p.dtype for p in tuning.trainable_parameters()} == {torch.float32}
    assert train(model, tuning.trainable_parameters(), steps=3)[-1] > 0
    logits = model(input_ids=tokens(1, 5)).logits
    assert logits.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=tokens(1, 5)).logits.isfinite().all()


def test_copies_that_nobody_chose_have_zero_gradients() -> None:
    model = moe("mixtral", num_local_experts=6, num_experts_per_tok=1)
    tuning = molex.esft.tune(model, Selection({0: tuple(range(6))}))
    model(input_ids=tokens(1, 1), labels=None).logits.sum().backward()
    grads = tuning.tuned(0).gate_up.grad
    assert grads is not None
    assert sorted(bool(grad.any()) for grad in grads) == [False] * 5 + [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compute", [by_experts, by_groups])
def test_both_ways_of_multiplying(compute: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Forward and every gradient against float64, with experts that nobody chose; fresh memory is NaN in tests."""
    E, n, I, H, T, K = 6, 2, 16, 24, 13, 3  # noqa: E741
    place_E = torch.tensor([-1, 1, -1, -1, 0, -1])
    ids_TK = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])
    drawn = [torch.randn(shape).to(dtype) for shape in ((T, H), (E, 2 * I, H), (E, H, I), (n, 2 * I, H), (n, H, I))]
    weights_TK = torch.rand(T, K)

    def run(forward: Callable[..., Tensor], wide: torch.dtype) -> list[Tensor]:
        x, *matrices = [tensor.to(wide, copy=True) for tensor in drawn]
        base, tuned = ExpertWeights(*matrices[:2]), ExpertWeights(*matrices[2:])
        leaves = [x.requires_grad_(), *(own.requires_grad_() for own in tuned)]
        pairs = Pairs(x, ids_TK.flatten(), place_E[ids_TK.flatten()])
        out = weigh(forward(pairs, base, tuned, gate), weights_TK.to(wide), wide)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    rows = zip(run(compute, dtype), run(one_by_one, torch.float64), run(one_by_one, dtype), strict=True)
    for name, (got, truth, plain) in zip(("y", "dx", "dgate_up", "ddown"), rows, strict=True):
        assert_close(name, got.detach(), truth.detach(), plain.detach(), depth=4)


def one_by_one(pairs: Pairs, base: ExpertWeights, tuned: ExpertWeights, gate: Callable[[Tensor], Tensor]) -> Tensor:
    """Pair after pair."""
    num_slots = len(pairs.ids) // len(pairs.x)
    out = []
    for number, (expert, place) in enumerate(zip(pairs.ids.tolist(), pairs.places.tolist(), strict=True)):
        own, index = (tuned, place) if place >= 0 else (base, expert)
        x = pairs.x[number // num_slots]
        out.append(own.down[index] @ gate(own.gate_up[index] @ x))
    return torch.stack(out)


def gate(h: Tensor) -> Tensor:
    left, right = h.chunk(2, dim=-1)
    return F.silu(left) * right


def test_a_copy_of_the_model_is_its_own() -> None:
    model = moe("mixtral")
    tuning = molex.esft.tune(model, CHOSEN)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = twin(input_ids=tokens(1, 6)).logits
        for p in tuning.trainable_parameters():
            p += 1
        assert torch.equal(twin(input_ids=tokens(1, 6)).logits, before)
        assert not torch.equal(model(input_ids=tokens(1, 6)).logits, before)


def test_it_refuses() -> None:
    model = moe("deepseek_v2")
    for experts, message in (
        ({0: (1,)}, "layer 0 has no experts here"),
        ({1: (8,)}, "from 0 to 7"),
        ({1: (2, 2)}, "different numbers"),
        ({1: ()}, "no expert"),
    ):
        with pytest.raises(ConfigError, match=message):
            molex.esft.tune(model, Selection(experts))
    assert all(p.requires_grad for p in model.parameters())
    molex.esft.tune(model, CHOSEN)
    with pytest.raises(StateError, match="being tuned already"):
        molex.esft.tune(model, CHOSEN)
