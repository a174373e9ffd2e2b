"""Draws: equal to transformers' processors where those exist, distributed as the softmax says, each by its own seed."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from molex_serve.engine import sampling as module
from molex_serve.engine.base import Request, Sampling
from molex_serve.engine.noise import gumbel, noise_keys
from molex_serve.engine.sampling import Row, draw, pack
from tests.serve.engine.serving import CRAMPED, ROOMY, Adapted, greedy, prompt, running, serve

VOCABULARY = 40
WARM = Sampling(max_tokens=1)


def logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def row(sampling: Sampling, seed: int = 1, position: int = 7, tokens: tuple[int, ...] = (1, 2, 3), **more: Any) -> Row:
    return Row(sampling, seed, position, tokens, num_prompt=more.pop("num_prompt", 2), **more)


def drawn(logits_RV: Tensor, rows: list[Row], last: tuple[int, ...] | None = None) -> list[int]:
    last_R = torch.tensor(last or [r.tokens[-1] for r in rows])
    return draw(logits_RV, last_R, pack(rows), rows).argmax(-1).tolist()


def kept(logits_RV: Tensor, settings: list[Sampling]) -> Tensor:
    """What rows are drawn from."""
    return module._narrowed(logits_RV, pack([row(s) for s in settings]), settings)


def test_greedy_rows_are_untouched_beside_drawn_ones() -> None:
    logits_RV = logits(3)
    rows = [row(replace(WARM, temperature=0)), row(WARM), row(replace(WARM, temperature=1e-6))]
    scores_RV = draw(logits_RV, torch.zeros(3, dtype=torch.long), pack(rows), rows)
    assert torch.equal(scores_RV[[0, 2]], logits_RV[[0, 2]])
    assert torch.equal(logits_RV, logits(3)), "the model's output was written to"
    alone = draw(logits_RV[:1], torch.zeros(1), pack(rows[:1]), rows[:1])
    assert alone.data_ptr() == logits_RV.data_ptr(), "greedy rows alone need no copy"


@pytest.mark.parametrize("spoiled", [math.nan, math.inf])
def test_logits_that_are_no_numbers_end_nothing(spoiled: float) -> None:
    """An adapter whose activations overflow has such; the rows beside it are what they are."""
    logits_RV = logits(2)
    logits_RV[0] = spoiled
    for fields in ({"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.2}, {"presence_penalty": 1.0}):
        rows = [row(replace(WARM, **fields)), row(replace(WARM, **fields), seed=2)]
        tokens = drawn(logits_RV, rows)
        assert 0 <= tokens[0] < VOCABULARY
        assert tokens[1:] == drawn(logits_RV[1:], rows[1:])


@pytest.mark.parametrize(
    ("fields", "theirs"),
    [
        ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        (
            {"temperature": 1.4, "top_k": 12, "top_p": 0.8, "min_p": 0.02},
            [TemperatureLogitsWarper(1.4), TopKLogitsWarper(12), TopPLogitsWarper(0.8), MinPLogitsWarper(0.02)],
        ),
    ],
)
def test_narrowing_equals_transformers(fields: dict[str, Any], theirs: list[Any]) -> None:
    logits_RV = logits(50)
    ours_RV = kept(logits_RV, [replace(WARM, **fields)] * 50)
    theirs_RV = LogitsProcessorList(theirs)(torch.zeros(50, 1, dtype=torch.long), logits_RV.clone())
    assert torch.equal(ours_RV.isinf(), theirs_RV.isinf())
    torch.testing.assert_close(ours_RV, theirs_RV)


def test_a_row_is_narrowed_as_if_it_were_alone() -> None:
    settings = [
        WARM,
        replace(WARM, top_k=3),
        replace(WARM, top_k=1 << 30),
        replace(WARM, top_p=0.4),
        replace(WARM, min_p=0.2),
        replace(WARM, temperature=50.0, top_k=7, top_p=0.9),
    ]
    logits_RV = logits(len(settings))
    together_RV = kept(logits_RV, settings)
    for r, one in enumerate(settings):
        assert torch.equal(together_RV[r : r + 1], kept(logits_RV[r : r + 1], [one])), one
    assert torch.equal(together_RV[[0, 2]], logits_RV[[0, 2]])


def test_equally_likely_tokens_at_an_edge_all_stay() -> None:
    logits_RV = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]).repeat(2, 1)
    found_RV = kept(logits_RV, [replace(WARM, top_k=2), replace(WARM, top_p=0.6)])
    assert found_RV.isfinite().tolist() == [[True, True, True, True, False]] * 2


def test_penalties_equal_transformers_and_openais_formula() -> None:
    logits_RV, history = logits(1), (3, 4, 4, 9, 11, 11, 11)
    repeated = [row(replace(WARM, temperature=0, repetition_penalty=1.3), tokens=history)]
    theirs_RV = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([history]), logits_RV.clone())
    assert torch.equal(draw(logits_RV, torch.tensor([11]), pack(repeated), repeated), theirs_RV)

    counted = [
        row(replace(WARM, temperature=0, presence_penalty=0.5, frequency_penalty=0.25), tokens=history, num_prompt=3)
    ]
    found_V = draw(logits_RV, torch.tensor([11]), pack(counted), counted)[0]
    expected_V = logits_RV[0].clone()
    expected_V[9] -= 0.5 + 0.25  # 3 and 4 are the prompt's
    expected_V[11] -= 0.5 + 3 * 0.25
    torch.testing.assert_close(found_V, expected_V)


def test_a_last_token_that_only_the_device_knows_counts() -> None:
    sampling = replace(WARM, temperature=0, presence_penalty=1.0, repetition_penalty=1.7)
    logits_RV = logits(1)
    known = [row(sampling, tokens=(3, 4, 9, 11))]
    pending = [row(sampling, tokens=(3, 4, 9), pending=True)]
    last = torch.tensor([11], dtype=torch.int32)
    assert torch.equal(draw(logits_RV, last, pack(known), known), draw(logits_RV, last, pack(pending), pending))


def test_bias_forces_and_forbids() -> None:
    logits_RV = logits(2)
    best = int(logits_RV[1].argmax())
    rows = [row(replace(WARM, logit_bias={5: 100.0})), row(replace(WARM, temperature=0, logit_bias={best: -100.0}))]
    assert drawn(logits_RV, rows) == [5, int(logits_RV[1].topk(2).indices[1])]


def test_draws_depend_on_seed_and_position_alone() -> None:
    one_V = logits(1)
    alone = drawn(one_V, [row(WARM, seed=5)])
    crowd_RV = torch.cat([logits(30, seed=9), one_V, logits(30, seed=8)])
    crowd = [row(replace(WARM, top_k=r % 3, temperature=0.1 * (r % 5)), seed=r) for r in range(61)]
    crowd[30] = row(WARM, seed=5)
    assert drawn(crowd_RV, crowd)[30] == alone[0]
    flat_RV = torch.zeros(200, VOCABULARY)
    by_seed = drawn(flat_RV, [row(WARM, seed=s) for s in range(200)])
    by_position = drawn(flat_RV, [row(WARM, position=p) for p in range(200)])
    assert len(set(by_seed)) > 30
    assert len(set(by_position)) > 30
    signed, unsigned = drawn(flat_RV[:2], [row(WARM, seed=-1), row(WARM, seed=(1 << 64) - 1)])
    assert signed == unsigned


@pytest.mark.parametrize("places", [lambda i: (i, 3), lambda i: (77, i)], ids=["over seeds", "over positions"])
def test_draws_follow_the_softmax(places: Any) -> None:
    """Chi-square over 40 tokens: its 99.9% quantile at 39 degrees of freedom is 72.1."""
    num = 20_000
    logits_V = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2))
    noise_RV = gumbel(noise_keys(places(i) for i in range(num)), VOCABULARY)
    counts_V = torch.bincount((logits_V + noise_RV).argmax(-1), minlength=VOCABULARY).double()
    expected_V = num * logits_V.double().softmax(-1)
    assert float(((counts_V - expected_V) ** 2 / expected_V).sum()) < 72.1


def test_noise_is_independent_between_neighbours() -> None:
    noise_RV = gumbel(noise_keys((1, i) for i in range(500)), 400)
    assert noise_RV.isfinite().all()
    assert float(noise_RV.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise_RV.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
    standard_RV = (noise_RV - noise_RV.mean()) / noise_RV.std()
    for other_RV in (standard_RV.roll(1, 0), standard_RV.roll(1, 1), standard_RV.roll((1, 1), (0, 1))):
        assert abs(float((standard_RV * other_RV).mean())) < 0.01
    with_neighbour_RV = gumbel(noise_keys((s, 3) for s in (1, 2)), 100_000)
    assert abs(float(torch.corrcoef(with_neighbour_RV)[0, 1])) < 0.02
    assert with_neighbour_RV.shape[1] - len(with_neighbour_RV[0].unique()) < 700  # 24 bits of noise collide this often


def test_noise_of_a_large_vocabulary_is_finite_everywhere() -> None:
    assert gumbel(noise_keys((7, i) for i in range(8)), 200_000).isfinite().all()


@pytest.mark.parametrize("settings", [ROOMY, replace(CRAMPED, prefix_cache=False)], ids=["roomy", "cramped"])
def test_seeded_requests_repeat_in_any_company(settings: Any) -> None:
    adapted = Adapted()
    seeded = [
        Request(
            id=f"seeded{i}",
            prompt_ids=prompt(9, i),
            sampling=Sampling(max_tokens=20, temperature=1.5, top_p=0.95, seed=11 * i),
            handle=i,
            generation=str(i),
        )
        for i in range(4)
    ]
    with running(adapted.engine(settings)) as engine:
        alone = [serve(engine, [request])[0] for request in seeded]
        assert serve(engine, [*seeded, *(greedy(str(i), 11 + i, i, new=20) for i in range(4))])[:4] == alone
        other = replace(seeded[0], sampling=replace(seeded[0].sampling, seed=1))
        free = replace(seeded[0], sampling=replace(seeded[0].sampling, seed=None))
        assert serve(engine, [other])[0] != alone[0]
        assert len({tuple(serve(engine, [free])[0]) for _ in range(3)}) == 3
