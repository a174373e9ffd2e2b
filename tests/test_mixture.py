"""The handle: named experts for each sequence, the base alone, plain LoRAs, balance biases, dead experts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import molex
from molex.errors import ConfigError, StateError
from tests.models import SMALL, batch_for, mixture_of, tiny, wake_experts


@pytest.mark.parametrize("method", ["mola", "mixlora", "hydralora", "poly", "mhr", "lora-mixer", "arrow", "dynmole"])
def test_each_sequence_under_an_expert_of_its_own(method: str) -> None:
    mixture = mixture_of(method=method, **({"top_k": 2} if method in ("lora-mixer", "arrow") else {}))
    model, ids_BS = mixture.model, torch.arange(3, 11).view(2, 4).repeat(2, 1)
    with torch.no_grad():
        with mixture.using(adapters=["2", None, "0", "1"]):
            mixed = model(ids_BS).logits
        with mixture.disabled():
            base = model(ids_BS).logits
        torch.testing.assert_close(mixed[1], base[1])
        with mixture.using(adapters=[None] * 4):
            assert torch.equal(model(ids_BS).logits, base)
        for row, name in ((0, "2"), (2, "0"), (3, "1")):
            with mixture.using(adapters=name):
                alone = model(ids_BS[row : row + 1]).logits
            torch.testing.assert_close(mixed[row : row + 1], alone)
            assert not torch.allclose(mixed[row], base[row])


@pytest.mark.parametrize("method", ["mola", "mixlora"])
def test_one_expert_is_its_weights_added_to_the_base(method: str) -> None:
    mixture = mixture_of(method=method)
    ids_BS = batch_for(mixture.model)["input_ids"]
    merged = tiny("llama")
    with torch.no_grad():
        for name, layer in mixture.layers.items():
            expert_id = 2 if layer.experts.num_experts > 1 else 0
            merged.get_submodule(name).weight += layer.experts.materialize(expert_id)
        with mixture.using(adapters="2"):
            torch.testing.assert_close(mixture.model(ids_BS).logits, merged(ids_BS).logits)


def test_an_expert_that_is_not_there() -> None:
    mixture = mixture_of()
    with pytest.raises(ConfigError, match=r"no expert 'law'; this mixture has: 0, 1, 2"), mixture.using(adapters="law"):
        pass
    layered = mixture_of(allocation=(2, 3))
    with pytest.raises(ConfigError, match=r"layers\.0\.\S* has no expert '2', only 2"), layered.using(adapters="2"):
        pass
    assert mixture.state.request is None
    with mixture.using(adapters=["0", "1"]), pytest.raises(StateError, match="adapters for 2 sequences"):
        mixture.model(torch.full((3, 2), 5))


@pytest.mark.parametrize("method", ["mola", "mixlora", "xlora", "smora", "mos"])
def test_disabled_is_the_base_bit_for_bit(method: str) -> None:
    model = tiny("llama", num_hidden_layers=8).requires_grad_(False)
    batch = batch_for(model)
    base = model(**batch).logits
    small = {} if method in ("smora", "mos") else SMALL
    mixture = molex.convert(model, molex.preset(method, **small))
    with torch.no_grad():
        for parameter in mixture.trainable_parameters():
            parameter.normal_(std=0.1)
    wake_experts(model)
    for training in (False, True):
        model.train(training)
        loss = model(**batch).loss
        trace = mixture.state.trace
        with mixture.disabled(), torch.no_grad():
            assert torch.equal(model(**batch).logits, base)
        assert mixture.state.trace is trace
        assert trace
        assert not torch.equal(model(**batch).logits, base)
        (loss + mixture.aux_loss()).backward()


def test_plain_loras_are_no_experts_of_the_mixture() -> None:
    """MixLoRA's attention: left alone when an expert is loaded, and out of the statistics."""
    mixture = mixture_of(method="mixlora")
    plain = {name: layer.experts.lora_B.clone() for name, layer in mixture.layers.items() if "attn" in name}
    routed = {name: layer for name, layer in mixture.layers.items() if name not in plain}
    factors = {
        name: molex.LoRA(torch.ones(4, x.in_features), torch.ones(x.out_features, 4), 1.0) for name, x in routed.items()
    }
    mixture.load_expert(2, "law", factors)
    assert mixture.experts == ["0", "1", "law"]
    assert all(torch.equal(mixture.layers[name].experts.lora_B, B) for name, B in plain.items())
    mixture.model(torch.full((2, 3), 5))
    assert set(mixture.stats()) < set(routed)
    with pytest.raises(ConfigError, match="expert 3 of a bank of 3"):
        mixture.load_expert(3, "art", {})


@pytest.mark.parametrize("method", ["mola", "arrow", "poly"])
def test_an_expert_that_does_not_fit_everywhere_changes_nothing(method: str) -> None:
    """The last layer's B has a row too many: the error names the layer, and the earlier ones are as they were."""
    mixture = mixture_of(method=method)
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    factors = {
        n: molex.LoRA(torch.ones(4, x.in_features), torch.ones(x.out_features, 4), float(x.experts.scale[0]))
        for n, x in mixture.layers.items()
    }
    *_, last = mixture.layers
    taller = factors[last]._replace(B=torch.cat([factors[last].B, factors[last].B[:1]]))
    with pytest.raises(ConfigError, match=rf"{last}: expert 2 takes A \(4, \d+\) and B \(\d+, 4\), got"):
        mixture.load_expert(2, "law", {**factors, last: taller})
    assert mixture.experts == ["0", "1", "2"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixture.state_dict().items())
    mixture.load_expert(2, "law", factors)
    assert mixture.experts == ["0", "1", "law"]
    changed = {name for name, tensor in mixture.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {f"{name}.experts.lora_A" for name in mixture.layers} <= changed


def test_biases_move_only_in_step() -> None:
    mixture = mixture_of(method="smora", num_experts=8, top_k=2, rank=1)
    model = mixture.model.train()
    batch = batch_for(model)
    biases = {name: layer.router.bias.clone() for name, layer in mixture.layers.items()}
    model(**batch).loss.backward()
    assert all(torch.equal(mixture.layers[name].router.bias, bias) for name, bias in biases.items())
    mixture.step()
    assert not any(torch.equal(mixture.layers[name].router.bias, bias) for name, bias in biases.items())


@pytest.mark.parametrize("method", ["mola", "mixlora"])
@pytest.mark.parametrize("backend", ["reference", "dense", "grouped"])
def test_experts_that_nobody_chose(method: str, backend: str) -> None:
    mixture = mixture_of(method=method, top_k=1, rank=8, backend=backend)
    with torch.no_grad():
        for layer in mixture.layers.values():
            if layer.router is not None:
                for parameter in layer.router.parameters():
                    parameter.zero_()  # ties: every token to one expert
    model = mixture.model.train()
    (model(**batch_for(model)).loss + mixture.aux_loss()).backward()
    routed = [stats for stats in mixture.stats().values() if len(stats.counts) > 1]
    assert all(len(stats.dead) == 2 and stats.entropy == 0 for stats in routed)
    assert all(p.grad.isfinite().all() for p in mixture.trainable_parameters())


def test_a_reverted_mixture_does_nothing_silently(tmp_path: Path) -> None:
    mixture = mixture_of()
    mixture.model(torch.full((2, 3), 5))
    mixture.revert()
    calls: list[Callable[[], object]] = [
        mixture.revert,
        mixture.aux_loss,
        mixture.state_dict,
        lambda: mixture.save(tmp_path / "out"),
        lambda: mixture.load_expert(0, "law", {}),
        lambda: mixture.using(adapters="0").__enter__(),
        lambda: mixture.disabled().__enter__(),
        lambda: mixture.record().__enter__(),
        lambda: mixture.factors(0),
        lambda: mixture.grow(1),
        lambda: mixture.set_tasks([0]),
        mixture.step,
        mixture.stats,
    ]
    for call in calls:
        with pytest.raises(StateError, match=r"reverted already; .* call molex\.convert or molex\.load"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("ids", "word"), [("ab", "'ab'"), (["a"], "'a'"), ([0.5, 1], "float32"), (5, "shape")])
def test_task_ids_are_whole_numbers(ids: Any, word: str) -> None:
    mixture = mixture_of(method="mtlora", num_experts=3)
    with pytest.raises(ConfigError, match=rf"{word}.*; give (a whole number|one task id) for each sequence or token"):
        mixture.set_tasks(ids)
    assert mixture.state.tasks is None


def test_an_expert_by_number_or_by_a_name_twice() -> None:
    mixture = mixture_of()
    with pytest.raises(ConfigError, match="no expert 1; this mixture has: 0, 1, 2"), mixture.using(adapters=1):  # type: ignore[arg-type]
        pass
    mixture.load_expert(0, "law", mixture.factors(1))
    mixture.load_expert(0, "law", mixture.factors(2))
    with pytest.raises(ConfigError, match="expert 0 is called 'law' already"):
        mixture.load_expert(1, "law", mixture.factors(1))


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("lora", {}),
        ("mola", {"top_k": 1}),
        ("mixlora", {"top_k": 1}),
        ("xlora", {}),
        ("mos", {"rank": 2, "pool_rank": 3}),
    ],
)
def test_active_parameters_are_what_one_token_uses(method: str, overrides: dict[str, Any]) -> None:
    mixture = mixture_of(method=method, **({"num_experts": 1} if method in ("lora", "mos") else {}), **overrides)
    mixture.model(torch.full((2, 3), 5))
    expected = sum(p.numel() for n, p in mixture.model.named_parameters() if mixture.owns(n) and "router." in n)
    for layer in mixture.layers.values():
        used = 1 if method in ("mola", "mixlora") else layer.experts.num_experts
        expected += used * layer.experts.ranks[0] * (layer.in_features + layer.out_features)
    assert mixture.active_parameters() == expected


def test_using_changes_nothing_where_it_is_refused() -> None:
    mixture = mixture_of(method="mtlora")
    with pytest.raises(ConfigError, match="no expert 'nope'"), mixture.using(tasks=[0], adapters="nope"):
        pass
    assert mixture.state.tasks is None
    with pytest.raises(RuntimeError, match="inside"), mixture.using(tasks=[0], adapters="1"):
        raise RuntimeError("inside")
    assert mixture.state.tasks is mixture.state.request is None


def test_factors_carry_each_layers_scale() -> None:
    """From a mixture whose experts have one scale into one that starts with another."""
    source, target = mixture_of(alpha=20.0), mixture_of(alpha=2.0)
    target.load_expert(2, "law", source.factors(1))
    for name, layer in target.layers.items():
        assert torch.equal(layer.experts.materialize(2), source.layers[name].experts.materialize(1))
    with pytest.raises(ConfigError, match="the scale nan"):
        target.load_expert(
            2, "law", {name: lora._replace(scale=float("nan")) for name, lora in source.factors(1).items()}
        )


def test_a_bases_weights_are_refused_under_a_mixture() -> None:
    """A stock trainer that resumes loads them, not strict, and would go on with experts that never changed."""
    mixture = mixture_of()
    base = tiny("llama").state_dict()
    with pytest.raises(StateError, match="this state_dict is a base's: model"):
        mixture.model.load_state_dict(base, strict=False)
    own = {name: tensor + 1 for name, tensor in mixture.model.state_dict().items()}
    mixture.model.load_state_dict(own)
    assert all(torch.equal(tensor, own[name]) for name, tensor in mixture.model.state_dict().items())
    mixture.revert().load_state_dict(base)


def test_growth_does_not_take_a_name_twice() -> None:
    mixture = mixture_of(method="moram", num_experts=3, rank=1)
    mixture.load_expert(0, "3", mixture.factors(0))
    with pytest.raises(ConfigError, match="an expert is called '3'"):
        mixture.grow(1)
    assert mixture.experts == ["3", "1", "2"]


def test_factors_and_growth_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="expert 3 of a bank of 3"):
        mixture_of().factors(3)
    with pytest.raises(ConfigError, match="more than one A and one B"):
        mixture_of(experts="dora").factors(0)
    with pytest.raises(ConfigError, match="num_experts=0: growing adds at least 1"):
        mixture_of(method="moram", rank=1).grow(0)
    with pytest.raises(ConfigError, match="an expert is a name and a LoRA for each layer"):
        mixture_of().load_expert(0, "law", "path/of/an/adapter")  # type: ignore[arg-type]
