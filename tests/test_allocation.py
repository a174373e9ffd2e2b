"""Experts per layer: MoLA's shapes, explicit lists, and a budget split by what a mixture really used."""

import math

import pytest
import torch
from torch import Tensor

import molex
from molex import allocate, usage_budget
from molex.errors import ConfigError
from molex.presets import presets
from molex.stats import LayerStats
from tests.models import batch_for, tiny

SHAPES = {
    "rectangle": [5, 5, 5, 5],
    "triangle": [8, 6, 4, 2],
    "inverted_triangle": [2, 4, 6, 8],
    "hourglass": [8, 2, 2, 8],
    "diamond": [2, 8, 8, 2],
}
# presets whose every layer decides, or is made, alike
UNIFORM = {"xlora": "same number of experts", "mos": "one update per layer"}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shapes_of_mola(shape: str) -> None:
    counts = SHAPES[shape]
    assert allocate(4, 1, shape) == counts
    assert allocate(32, 1, shape) == [count for count in counts for _ in range(8)]


@pytest.mark.parametrize(
    ("num_layers", "sizes"), [(1, "1000"), (2, "1100"), (3, "1110"), (5, "2111"), (6, "2211"), (7, "2221"), (9, "3222")]
)
def test_the_first_groups_get_the_layers_that_are_left(num_layers: int, sizes: str) -> None:
    counts = allocate(num_layers, 1, "inverted_triangle")
    assert counts == [count for count, size in zip([2, 4, 6, 8], sizes, strict=True) for _ in range(int(size))]


def test_numbers_and_lists() -> None:
    assert allocate(3, 7) == [7, 7, 7]
    assert allocate(3, 7, [1, 2, 3]) == [1, 2, 3]
    assert allocate(8, 7, (1, 2, 3, 4)) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert allocate(4, 7, (4, 3, 2, 1)) == [4, 3, 2, 1]


@pytest.mark.parametrize("allocation", ["pyramid", [1, 2], [1, 2, 3, 4], [1, 0, 2], [1, 2.5, 2], [], [True, "2", 3]])
def test_what_is_no_allocation_of_three_layers(allocation: object) -> None:
    with pytest.raises(ConfigError):
        allocate(3, 4, allocation)  # type: ignore[arg-type]


def test_a_number_of_experts_replaces_a_presets_shape() -> None:
    assert molex.preset("mola").allocation == "inverted_triangle"
    assert molex.preset("mola", num_experts=3).allocation is None
    assert molex.preset("mola", num_experts=3, allocation="diamond").allocation == "diamond"


def entropy(load: Tensor) -> float:
    return -sum(p * math.log(p) for p in (load / load.sum()).tolist() if p > 0)


def test_a_budget_follows_effective_experts() -> None:
    even, skewed, collapsed = torch.ones(8), torch.tensor([70.0, 10, 10, 5, 5, 0, 0, 0]), torch.eye(8)[0]
    loads = [collapsed, even, skewed]
    needs = [math.exp(entropy(load)) for load in loads]
    counts = usage_budget(loads, 20)
    assert sum(counts) == 20
    for count, need in zip(counts, needs, strict=True):
        assert abs(count - 1 - 17 * need / sum(needs)) < 1
    assert usage_budget(loads, 3) == [1, 1, 1]
    assert usage_budget([even] * 4, 20) == [5, 5, 5, 5]


def test_a_budget_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="cannot give each of 3 layers one"):
        usage_budget([torch.ones(2)] * 3, 2)
    with pytest.raises(ConfigError, match="run some batches first"):
        usage_budget([torch.zeros(2)], 2)
    with pytest.raises(ConfigError, match="no usage was measured"):
        usage_budget({}, 2)
    for loads, total in (([torch.ones(2)], 4.5), ([], 4)):
        with pytest.raises(ConfigError, match="give a whole number and measured layers"):
            usage_budget(loads, total)  # type: ignore[arg-type]


def test_linears_of_a_block_count_together() -> None:
    stats = {
        "layers.0.q": LayerStats(torch.tensor([4.0, 0.0]), 4),  # one effective expert
        "layers.0.v": LayerStats(torch.tensor([2.0, 2.0]), 4),  # two
        "layers.0.plain": LayerStats(torch.tensor([4.0]), 4),
        "layers.1.q": LayerStats(torch.tensor([1.0, 1.0, 1.0]), 3),  # three
        "layers.1.v": LayerStats(torch.tensor([1.0, 1.0, 1.0]), 3),
    }
    assert usage_budget(stats, 2 + 9) == [4, 7]


@pytest.mark.parametrize("method", ["mola", "mixlora", "smora"])
def test_from_measured_usage_to_a_new_conversion(method: str) -> None:
    model = tiny("llama", num_hidden_layers=4)
    batch = batch_for(model)
    sizes = {"top_k": 1} if method == "smora" else {"top_k": 1, "rank": 2}
    mixture = molex.convert(model, molex.preset(method, num_experts=6, **sizes))
    with torch.no_grad():
        for name, layer in mixture.layers.items():
            if name.startswith("model.layers.0.") and layer.router is not None:
                for parameter in layer.router.parameters():
                    parameter.zero_()  # ties: every token to one expert
        model(**batch)
    counts = usage_budget(mixture.stats(), 24)
    mixture.revert()
    assert sum(counts) == 24
    assert counts[0] == min(counts) < max(counts)
    again = molex.convert(model, molex.preset(method, allocation=counts, **sizes))
    for name, layer in again.layers.items():
        assert layer.experts.num_experts in (counts[int(name.split(".")[2])], 1)
    model(**batch)
    assert {len(s.counts) for s in again.stats().values()} - {1} == set(counts) - {1}


@pytest.mark.parametrize("method", presets)
def test_every_preset_takes_an_allocation(method: str) -> None:
    model = tiny("llama", num_hidden_layers=4)
    config = molex.preset(method)
    counts = [2, 4, 6, 8]
    small = {"top_k": 2} if getattr(config.router, "top_k", None) else {}
    if method in UNIFORM:
        with pytest.raises(ConfigError, match=UNIFORM[method]):
            molex.convert(model, molex.preset(method, allocation=counts))
        return
    mixture = molex.convert(model, molex.preset(method, allocation=counts, **small))
    mixture.set_tasks([0, 0])  # the lowest layer of mtlora has one task's expert
    routed = [name for name, layer in mixture.layers.items() if ".mlp." in name or not config.plain_targets]
    for name in routed:
        assert mixture.layers[name].experts.num_experts == counts[int(name.split(".")[2])]
    loss = model.train()(**batch_for(model)).loss + mixture.aux_loss()
    assert loss.requires_grad == bool(mixture.trainable_parameters())
