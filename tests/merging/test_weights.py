"""Weights by number, depth, pattern and name; and the merge over several linears that uses them."""

import pytest
import torch

from molex.errors import ConfigError, TargetError
from molex.experts import LoRA
from molex.merging import make_rule, merge_factors
from molex.merging.weights import Depths, by_adapter, weights_in
from tests.merging.loras import dense, random_lora

LAYERS = [f"model.layers.{i}.{end}" for i in range(5) for end in ("attn.q_proj", "mlp.up_proj")]


@pytest.mark.parametrize(
    ("weight", "layer", "value"),
    [
        (0.5, "model.layers.3.mlp.up_proj", 0.5),
        ([0.0, 1.0], "model.layers.0.mlp.up_proj", 0.0),
        ([0.0, 1.0], "model.layers.1.mlp.up_proj", 0.25),
        ([0.0, 1.0], "model.layers.4.mlp.up_proj", 1.0),
        ([0.0, 1.0, 0.0], "model.layers.3.mlp.up_proj", 0.5),
        ([0.7], "model.layers.3.mlp.up_proj", 0.7),
        ([{"filter": "up_proj", "value": 2}, {"value": 3}], "model.layers.3.mlp.up_proj", 2.0),
        ([{"filter": "mlp.*", "value": [0, 4]}, {"value": 3}], "model.layers.3.mlp.up_proj", 3.0),
        ([{"filter": "up_proj", "value": 2}, {"value": 3}], "model.layers.3.attn.q_proj", 3.0),
        ([{"filter": "3.*.*", "value": 2}, {"filter": "q_proj", "value": 5}], "model.layers.0.attn.q_proj", 5.0),
        ({"model.layers.0.attn.q_proj": 0.2}, "model.layers.0.attn.q_proj", 0.2),
    ],
)
def test_value(weight: object, layer: str, value: float) -> None:
    (known,) = by_adapter([weight], ["a"])  # type: ignore[list-item]
    assert weights_in(layer, [known], Depths(LAYERS)) == [pytest.approx(value)]


@pytest.mark.parametrize(
    "weights",
    [
        ["much"], [True], [float("nan")], [[]],
        [[0.1, "x"]], [[{"value": "x"}]], [[{"filtre": "a", "value": 1}]], [None],
        [1, 2], {"b": 1}, {}, "a", [{}],
    ],
)  # fmt: skip
def test_what_is_no_weight(weights: object) -> None:
    with pytest.raises(ConfigError):
        by_adapter(weights, ["a"])  # type: ignore[arg-type]


def experts() -> dict[str, dict[str, LoRA]]:
    return {
        "a": {layer: random_lora(2, seed) for seed, layer in enumerate(LAYERS)},
        "b": {layer: random_lora(3, 90 + seed) for seed, layer in enumerate(LAYERS[:5])},
    }


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": [{"filter": "upproj", "value": 1}, {"value": 1}], "b": 1}, "did you mean 'up_proj'"),
        ({"a": [{"filter": "up_proj", "value": 1}], "b": 1}, "end the list with"),
        ({"a": 1, "c": 1}, "an adapter 'c'"),
        ({"a": {LAYERS[0]: 1.0}, "b": 1}, "leave out"),
        ({"a": {"no.such": 1.0}, "b": 1}, "'no.such'"),
    ],
)
def test_weights_that_do_not_fit(weights: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge_factors(experts(), make_rule("linear"), weights)


def test_gradients_need_blocks() -> None:
    with pytest.raises(ConfigError, match="lies in no block"):
        merge_factors({"a": {"head": random_lora()}}, make_rule("linear"), [[0.0, 1.0]])


def test_a_linear_that_one_adapter_lacks_counts_as_zero() -> None:
    given = experts()
    merged = merge_factors(given, make_rule("linear"))
    assert list(merged.factors) == LAYERS
    torch.testing.assert_close(dense(merged.factors[LAYERS[9]]), dense(given["a"][LAYERS[9]]) / 2)
    assert merged.layers[9].ranks == (2, 0)
    assert merged.layers[0].from_sum == pytest.approx(0, abs=1e-6)


def test_depth_is_the_bases() -> None:
    names = [f"model.layers.{i}" for i in range(11)]
    merged = merge_factors({"a": experts()["a"]}, make_rule("linear"), [[0.0, 1.0]], names=names)
    assert [report.weights[0] for report in merged.layers[::2]] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert LAYERS[0] not in merged.factors, "a zero update is left out"


def test_the_cut_reports_its_error_over_all_linears() -> None:
    given = experts()
    whole, cut = merge_factors(given, make_rule("linear")), merge_factors(given, make_rule("linear"), rank=2)
    lost = sum((dense(whole.factors[n]) - dense(cut.factors[n])).square().sum() for n in LAYERS)
    everything = sum(dense(whole.factors[n]).square().sum() for n in LAYERS)
    assert cut.truncation == pytest.approx(float(lost / everything) ** 0.5, rel=1e-6)
    assert max(report.rank for report in cut.layers) == 2


def test_adapters_of_other_bases_are_refused() -> None:
    small = LoRA(torch.zeros(2, 3), torch.zeros(4, 2), 1.0)
    with pytest.raises(TargetError, match="a: 14 -> 11, b: 3 -> 4"):
        merge_factors({"a": {"x": random_lora()}, "b": {"x": small}}, make_rule("linear"))
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_factors({}, make_rule("linear"))
