"""The rooflines against figures worked out by hand for one H200: 790 TFLOP/s, 4.3 TB/s, T=8192, bfloat16."""

import pytest

from molex.kernels import backends
from molex.kernels.cost import Ceilings, Shape, Step, product, seconds
from molex.kernels.triton_skip import experts_of_tile

H200 = Ceilings(half=790e12, single=50e12, bandwidth=4.3e12, latency=0)
UP, SQUARE, DOWN = (4096, 14336), (4096, 4096), (14336, 4096)


def microseconds(
    name: str, layer: tuple[int, int], experts: tuple[int, int, int] = (8, 16, 2), backward: bool = False
) -> float:
    num_experts, rank, top_k = experts
    steps = backends[name]().steps(Shape(8192, *layer, num_experts * rank, top_k, num_experts, rank, 2, backward))
    assert steps is not None
    return 1e6 * seconds(steps, 2, H200)


def base(layer: tuple[int, int]) -> float:
    return 1e6 * seconds([product(8192, layer[1], layer[0], 2)], 2, H200)


def test_a_product_takes_what_it_computes_or_what_it_moves() -> None:
    assert base(UP) == pytest.approx(1217.8, rel=1e-3)
    assert base(SQUARE) == pytest.approx(347.9, rel=1e-3)
    assert 1e6 * seconds([product(8192, 128, 4096, 2)], 2, H200) == pytest.approx(16.5, rel=0.02)  # reads x
    assert 1e6 * seconds([product(8192, 14336, 128, 2, onto=True)], 2, H200) == pytest.approx(110.6, rel=0.01)


@pytest.mark.parametrize(("layer", "expected"), [(UP, 71.4), (SQUARE, 33.2), (DOWN, 72.8)])
def test_experts_forward(layer: tuple[int, int], expected: float) -> None:
    assert microseconds("triton", layer) - base(layer) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("layer", "percent"), [(UP, 8.8), (SQUARE, 14.4), (DOWN, 9.0)])
def test_experts_forward_and_backward_over_the_base(layer: tuple[int, int], percent: float) -> None:
    over = microseconds("triton", layer, backward=True) / (2 * base(layer)) - 1
    assert 100 * over == pytest.approx(percent, rel=0.05)


@pytest.mark.parametrize(("layer", "expected"), [(UP, 31.7 + 219.3), (SQUARE, 31.7 + 62.7), (DOWN, 110.3 + 62.7)])
def test_sorted_pairs_forward(layer: tuple[int, int], expected: float) -> None:
    assert microseconds("triton_grouped", layer) - base(layer) == pytest.approx(expected, rel=0.05)


def test_many_columns_of_which_few_are_used_are_for_the_sorted_form() -> None:
    few, many, many_used = (8, 16, 2), (128, 16, 2), (128, 16, 16)
    assert microseconds("triton", UP, few) < microseconds("triton_grouped", UP, few)
    assert microseconds("triton", UP, many) > microseconds("triton_grouped", UP, many)
    assert microseconds("triton", UP, many_used) < microseconds("triton_grouped", UP, many_used)


def test_plain_dense_moves_more_than_preload() -> None:
    for layer in (UP, SQUARE, DOWN):
        assert microseconds("dense", layer, backward=True) > microseconds("preload", layer, backward=True)


def test_launches_count_where_there_is_little_to_do() -> None:
    slow = H200._replace(latency=4e-6)
    assert seconds([Step(launches=3), Step(bytes=4.3e6)], 2, slow) == pytest.approx(17e-6)
    assert seconds([Step(operations=50e6)], 4, slow) == pytest.approx(5e-6)  # float32 has a peak of its own


@pytest.mark.parametrize(
    ("experts", "top_k", "expected"),
    [(8, 1, 1.05), (8, 2, 2.25), (8, 4, 4.73), (16, 2, 3.0), (32, 2, 6.0), (64, 2, 17.3)],
)
def test_experts_of_a_tile_of_like_tokens(experts: int, top_k: int, expected: float) -> None:
    """Against counts in simulated random routings of 8192 tokens."""
    shape = Shape(8192, 4096, 4096, 16 * experts, top_k, experts, 16, 2, False)
    assert experts_of_tile(shape) == pytest.approx(expected, rel=0.2)


def test_many_columns_forward_are_for_the_skipping_form() -> None:
    many = (64, 16, 2)
    assert microseconds("triton_skip", UP, many) < microseconds("triton_grouped", UP, many)
    assert microseconds("triton_skip", UP, many) < microseconds("triton", UP, many)
    assert microseconds("triton_skip", UP, (8, 16, 2)) > microseconds("triton", UP, (8, 16, 2))
