"""Scores against ones computed by hand from the router's own outputs, and the published rule on tables."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import molex.esft
from molex.errors import ConfigError, StateError, TargetError
from molex.esft.selecting import choose, measure
from tests.esft.models import ARCHITECTURES, moe, tokens
from tests.models import tiny


def routers(model: nn.Module) -> dict[int, nn.Module]:
    return {
        int(name.split(".")[2]): module
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("TopKRouter", "TopkRouter"))
    }


def by_hand(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[dict[int, list], dict[int, list]]:
    """Gate scores and token ratios from what the router modules returned, token by token."""
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {number: [] for number in routers(model)}
    hooks = []
    for number, router in routers(model).items():

        def keep(module: nn.Module, args: Any, out: Any, number: int = number) -> None:
            seen[number].append((out[1], out[2]))

        hooks.append(router.register_forward_hook(keep))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    gate, ratio = {}, {}
    for number, outputs in seen.items():
        sums, counts, num_tokens, num_slots = [0.0] * 16, [0] * 16, 0, 1
        for batch, (weights, ids) in zip(batches, outputs, strict=True):
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().tolist()
            for token, is_real in enumerate(real):
                if is_real:
                    num_tokens, num_slots = num_tokens + 1, len(ids[token])
                    for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
                        sums[expert] += weight
                        counts[expert] += 1
        gate[number] = [total / num_tokens for total in sums]
        ratio[number] = [count / (num_tokens * num_slots) for count in counts]
    return gate, ratio


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_computed_by_hand(name: str) -> None:
    model = moe(name)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    batches = [{"input_ids": tokens(2, 7), "attention_mask": mask}, {"input_ids": tokens(3, 5, seed=2)}]
    gate, ratio = by_hand(model, batches)
    for score, truth in (("gate", gate), ("token", ratio)):
        p = 0.5 * min(map(sum, truth.values()))
        selection = molex.esft.select(model, batches, score=score, p=p)
        assert selection.scores.keys() == truth.keys()
        for number, own in selection.scores.items():
            assert own == pytest.approx(truth[number][: len(own)], abs=1e-7)
            assert selection.experts[number] == choose(own, p)
    assert all(sum(usage.token()) == pytest.approx(1) for usage in measure(model, batches).values())


def test_the_published_rule() -> None:
    """From the largest down until the sum reaches p: what reaches it exactly ends it, equals come in their order."""
    scores = [0.05, 0.3, 0.05, 0.25, 0.0, 0.2, 0.1, 0.05]
    assert choose(scores, 0.2) == (1,)
    assert choose(scores, 0.3) == (1,)
    assert choose(scores, 0.31) == (1, 3)
    assert choose(scores, 0.8) == (1, 3, 5, 6)
    assert choose(scores, 0.87) == (1, 3, 5, 6, 0)
    assert choose(scores, 0.91) == (1, 3, 5, 6, 0, 2)
    assert choose(scores, 1.0) == (1, 3, 5, 6, 0, 2, 7)  # and nobody whom no token chose
    assert choose([0.0123, 0.0907, 0.0411, 0.0618, 0.0470], 0.2) == (1, 3, 4, 2)


def test_what_is_by_default() -> None:
    model, batches = moe("mixtral"), [{"input_ids": tokens(2, 9)}]
    assert molex.esft.select(model, batches) == molex.esft.select(model, batches, score="token", p=0.2)
    assert molex.esft.select(model, batches, score="gate") == molex.esft.select(model, batches, score="gate", p=0.1)


def test_it_leaves_the_model_as_it_was() -> None:
    model = moe("olmoe").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    molex.esft.select(model, [{"input_ids": tokens(1, 4)}])
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_it_refuses() -> None:
    model, batches = moe("deepseek_v2"), [{"input_ids": tokens(2, 9)}]
    with pytest.raises(ConfigError, match="sum to"):
        molex.esft.select(model, batches, score="gate", p=0.99)  # weights are not renormalised here
    with pytest.raises(ConfigError, match="more than 0"):
        molex.esft.select(model, batches, p=0)
    with pytest.raises(ConfigError, match="choose from 'gate', 'token'"):
        molex.esft.select(model, batches, score="gates")  # type: ignore[arg-type]
    with pytest.raises(StateError, match="saw no token"):
        molex.esft.select(model, [])
    with pytest.raises(TargetError, match="has no layer with gate_up_proj"):
        molex.esft.select(tiny("llama"), batches)


def test_experts_of_another_form_are_refused_with_the_reason() -> None:
    fields = {**ARCHITECTURES["mixtral"], "num_local_experts": 4, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **fields))
    with pytest.raises(TargetError, match=r"model\.layers\.0\.mlp\.experts .*is_transposed is True"):
        molex.esft.find_layers(model)
