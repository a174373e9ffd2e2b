"""A mixture into a dense model: exact where routing is constant, by rule elsewhere; losses of candidates; learned and
measured weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

import molex
from molex.errors import ConfigError, StateError, TargetError
from molex.merging import compare_merges, learn_soup, merge, merge_experts, merge_mixture, offered, rules, usage_weights
from molex.mixture import Mixture
from tests.cases import PRESETS
from tests.merging.adapters import adapter_for
from tests.merging.loras import dense
from tests.models import batch_for, mixture_of, tiny, wake_experts


def logits(mixture_or_model: Any) -> Tensor:
    model = mixture_or_model.model if isinstance(mixture_or_model, Mixture) else mixture_or_model
    with torch.no_grad():
        return model.eval()(**batch_for(model)).logits


def with_static(**overrides: Any) -> Mixture:
    mixture = mixture_of("llama", "mola", router="static", **overrides)
    with torch.no_grad():
        for layer in mixture.layers.values():
            layer.router.weights.normal_()
    return mixture


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("make", ["constant", "static"])
def test_constant_routing_merges_exactly(kind: str, make: str) -> None:
    mixture = mixture_of(kind, "mola", router=make)
    for layer in mixture.layers.values():
        if make == "static":
            torch.nn.init.normal_(layer.router.weights)
    before, model = logits(mixture), mixture.model
    assert offered(mixture)["exact"].startswith("yes")
    merged = merge_mixture(mixture)
    assert merged is model
    assert not hasattr(model, "molex_mixture")
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
    assert (before - logits(tiny(kind))).abs().max() > 1e-2, "the experts do something"


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("mos", PRESETS["mos"].overrides),
        ("hydralora", {"router": "static", "num_experts": 3}),
        ("smora", {"router": "static", "num_experts": 8}),
        ("flylora", {"router": "static", "num_experts": 8}),
    ],
)
def test_every_kind_of_columns_merges_exactly(method: str, settings: dict[str, Any]) -> None:
    """Shared A, shards of pools, single ranks and sparse A are LoRAs as soon as routing is constant."""
    mixture = molex.convert(tiny("llama"), molex.preset(method, **settings))
    wake_experts(mixture.model)
    before = logits(mixture)
    torch.testing.assert_close(logits(merge_mixture(mixture)), before, rtol=1e-4, atol=1e-5)
    assert (before - logits(tiny("llama"))).abs().max() > 1e-3


def test_one_plain_lora_merges_exactly() -> None:
    mixture = mixture_of("llama", "lora", num_experts=1)
    before = logits(mixture)
    torch.testing.assert_close(logits(merge_mixture(mixture)), before, rtol=1e-4, atol=1e-5)


def test_uneven_layers_merge_exactly() -> None:
    mixture = with_static(allocation=(2, 3), num_experts=3)
    before = logits(mixture)
    torch.testing.assert_close(logits(merge_mixture(mixture)), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["mixlora", "mola", "loramoe"])
def test_routing_by_token_has_no_exact_equivalent(method: str) -> None:
    mixture = mixture_of("llama", method)
    before = logits(mixture)
    with pytest.raises(ConfigError, match=r"routes each token .* no exact dense equivalent; merge by a rule: .*linear"):
        merge_mixture(mixture)
    assert torch.equal(logits(mixture), before)
    assert offered(mixture)["exact"].startswith("no")


def test_a_nonlinearity_between_experts_has_no_exact_equivalent() -> None:
    mixture = mixture_of("llama", "mixlora", router="static")
    with pytest.raises(ConfigError, match="behind a nonlinearity"):
        merge_mixture(mixture)


def test_mixlora_by_mean_folds_experts_and_plain_layers() -> None:
    """Every weight of the result against dense arithmetic, in both kinds of layers."""
    mixture = mixture_of("llama", "mixlora")
    wanted = {}
    for name, layer in mixture.layers.items():
        own = [layer.experts.materialize(e) for e in range(layer.experts.num_experts)]
        wanted[name] = (layer.weight + sum(own) / len(own)).detach()
    assert any(layer.plain for layer in mixture.layers.values())
    model = merge_mixture(mixture, "linear")
    for name, weight in wanted.items():
        torch.testing.assert_close(model.get_submodule(name).weight.data, weight, rtol=1e-4, atol=1e-5)


def test_also_trained_modules_stay_trained() -> None:
    mixture = mixture_of("llama", "mola", router="static", also_train=("norm",))
    with torch.no_grad():
        mixture.model.model.norm.weight.fill_(3.0)
    assert (merge_mixture(mixture).model.norm.weight == 3).all()


@pytest.mark.parametrize("rule", rules)
def test_every_rule_takes_a_mixture(rule: str) -> None:
    mixture = mixture_of("llama", "mola", allocation=(2, 3), num_experts=3)
    assert logits(merge_mixture(mixture, rule)).isfinite().all()


def test_uneven_layers_are_averaged_over_their_own_experts() -> None:
    mixture = mixture_of("llama", "mola", allocation=(2, 3), num_experts=3)
    merged = merge_experts(mixture, "linear")
    for report in merged.layers:
        count = mixture.layers[report.name].experts.num_experts
        assert report.weights == (1 / count,) * count + (0.0,) * (3 - count)


def test_experts_that_are_no_loras_pass_their_error_on() -> None:
    mixture = mixture_of("llama", "mola", experts="dora")
    with pytest.raises(ConfigError, match="a DoRA expert"):
        merge_mixture(mixture, "linear")
    assert offered(mixture)["linear"].startswith("no")
    averaged = mixture_of("llama", "poly")
    with pytest.raises(ConfigError, match="no exact dense equivalent"):
        merge_mixture(averaged)


def test_a_refused_fold_leaves_the_mixture() -> None:
    mixture = with_static()
    name, layer = list(mixture.layers.items())[-1]
    layer.base.weight = torch.nn.Parameter(layer.base.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TargetError, match=name):
        merge_mixture(mixture)
    assert Mixture.of(mixture.model) is mixture


def test_a_merged_mixture_is_gone() -> None:
    mixture = with_static()
    merge_mixture(mixture)
    with pytest.raises(StateError, match="reverted already"):
        merge_mixture(mixture)


def test_comparison_measures_what_a_fold_has_and_changes_nothing() -> None:
    mixture = mixture_of("llama", "mola")
    batch = batch_for(mixture.model)
    before = {name: tensor.clone() for name, tensor in mixture.model.state_dict().items()}
    mixture.model.train()
    losses = compare_merges(mixture, ["linear", "ties", merge_rule_svd()], [batch])
    assert mixture.model.training
    assert list(losses) == ["base", "mixture", "linear", "ties", "svd (rank=1)"]
    after = mixture.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    mixture.model.eval()
    with torch.no_grad():
        assert losses["mixture"] == pytest.approx(float(mixture.model(**batch).loss), rel=1e-6)
        assert losses["base"] == pytest.approx(float(tiny("llama")(**batch).loss), rel=1e-6)
        assert losses["ties"] == pytest.approx(float(merge_mixture(mixture, "ties")(**batch).loss), rel=1e-5)
    assert len(set(losses.values())) == 5


def merge_rule_svd() -> Any:
    return rules["svd"](rank=1)


def test_comparison_needs_labels() -> None:
    with pytest.raises(ConfigError, match="there are none"):
        compare_merges(mixture_of(), ["linear"], [])


def test_usage_is_the_mean_gate_over_real_tokens() -> None:
    mixture = mixture_of("llama", "mixlora")
    batch = batch_for(mixture.model)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 4:] = 0
    weights = usage_weights(mixture, [batch, batch])
    with torch.no_grad():
        mixture.model(**batch)
    decision = mixture.state.trace["model.layers.1.mlp.gate_proj"]
    real = batch["attention_mask"].flatten().bool()
    for e, expert in enumerate(mixture.experts):
        total = 0.0
        for t in real.nonzero()[:, 0]:
            for k, chosen in enumerate(decision.routing.expert_ids[t]):
                total += float(decision.routing.weights[t, k]) * (int(chosen) == e)
        for end in ("gate_proj", "down_proj"):  # a block routes once
            assert weights[expert][f"model.layers.1.mlp.{end}"] == pytest.approx(total / int(real.sum()), rel=1e-5)
    assert logits(merge_mixture(mixture, "linear", weights)).isfinite().all()
    with pytest.raises(ConfigError, match="there are none"):
        usage_weights(mixture_of(), [])


def test_usage_of_constant_routing_is_the_exact_merge() -> None:
    mixture = with_static()
    weights = usage_weights(mixture, [batch_for(mixture.model)])
    before = logits(mixture)
    torch.testing.assert_close(logits(merge_mixture(mixture, "linear", weights)), before, rtol=1e-4, atol=1e-5)


def test_a_soup_lowers_the_loss_and_leaves_the_model() -> None:
    model = tiny("llama")
    adapters = {name: adapter_for(model, ("q_proj", "up_proj"), seed=seed) for seed, name in enumerate("xy")}
    batch, before = batch_for(model), {n: p.clone() for n, p in model.named_parameters()}
    weights = learn_soup(model, adapters, [batch], steps=20, learning_rate=0.05)
    assert all(torch.equal(before[n], p) and p.requires_grad for n, p in model.named_parameters())
    assert set(weights) == {"x", "y"}
    with torch.no_grad():
        mean = float(merge(tiny("llama"), adapters)(**batch).loss)
        soup = float(merge(model, adapters, weights=weights)(**batch).loss)
    assert soup < mean - 0.01


def test_a_soup_of_constants_is_what_the_mixture_computes() -> None:
    model = tiny("llama")
    adapters = {name: adapter_for(model, ("q_proj",), seed=seed) for seed, name in enumerate("xy")}
    mixture = molex.from_peft(model, adapters, router="static")
    with torch.no_grad():
        for layer in mixture.layers.values():
            layer.router.weights.copy_(torch.tensor([0.3, -0.8]))
    factors = merge_experts(mixture).factors
    for name in factors:
        wanted = 0.3 * dense(adapters["x"].factors[name]) - 0.8 * dense(adapters["y"].factors[name])
        torch.testing.assert_close(dense(factors[name]), wanted, rtol=1e-5, atol=1e-6)


def test_soups_need_something_to_learn_from() -> None:
    adapters = {"x": adapter_for(tiny("llama"), ("q_proj",))}
    with pytest.raises(ConfigError, match="0 batches"):
        learn_soup(tiny("llama"), adapters, [])
