"""Draws the next token of every row of logits, each row by its own settings, as scores of which the largest is it.

    penalties -> bias -> grammar -> temperature -> top-k -> top-p -> min-p -> draw

in the order of transformers' own processors. A row of temperature 0 stays as it is. What a row gets does not depend on
the other rows: where several tokens are equally likely at the edge of top-k or top-p, all of them stay.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molex_serve.engine.base import Sampling
from molex_serve.engine.grammar import Matcher
from molex_serve.engine.noise import gumbel, noise_keys

COLD = 1e-5  # temperatures below are 0
NUMBERS = 6  # int32 rows of `pack`: temperature, top-p, min-p, top-k and two of the noise's key

_NOTHING = float("-inf")


class Row(NamedTuple):
    """Whose logits a row has. position: of the token to draw, in its sequence. tokens: before it, as far as the host
    knows them, empty where `needs_tokens` is False. pending: the last of them is known on the device alone."""

    sampling: Sampling
    seed: int
    position: int
    tokens: Sequence[int]
    num_prompt: int
    pending: bool = False
    matcher: Matcher | None = None


def needs_tokens(sampling: Sampling) -> bool:
    """Whether the tokens before it matter to a draw."""
    return _penalised(sampling) or sampling.json_schema is not None


def pack(rows: Sequence[Row]) -> Tensor:
    """(NUMBERS, R) int32 on the host: all that a draw reads on the device, to be copied there at once."""
    settings = [(row.sampling.temperature, row.sampling.top_p, row.sampling.min_p) for row in rows]
    floats_3R = torch.tensor(settings, dtype=torch.float32).view(-1, 3).T.contiguous().view(torch.int32)
    top_k_1R = torch.tensor([[row.sampling.top_k for row in rows]], dtype=torch.int32)
    return torch.cat([floats_3R, top_k_1R, noise_keys((row.seed, row.position) for row in rows)])


def draw(logits_RV: Tensor, last_R: Tensor, numbers_NR: Tensor, rows: Sequence[Row]) -> Tensor:
    """(R, V) scores; each row's argmax is its next token. last_R: the tokens that these logits come after."""
    scores_RV = _adjusted(logits_RV, last_R, rows)
    warm = [r for r, row in enumerate(rows) if row.sampling.temperature >= COLD]
    if not warm:
        return scores_RV
    index_W = torch.tensor(warm, device=logits_RV.device)
    numbers_NW = numbers_NR[:, index_W]
    kept_WV = _narrowed(scores_RV[index_W], numbers_NW, [rows[r].sampling for r in warm])
    tokens_W = kept_WV.add_(gumbel(numbers_NW[4:6], kept_WV.shape[1])).argmax(dim=-1)
    drawn_RV = scores_RV.clone() if scores_RV is logits_RV else scores_RV
    drawn_RV[index_W, tokens_W] = float("inf")
    return drawn_RV


def _adjusted(logits_RV: Tensor, last_R: Tensor, rows: Sequence[Row]) -> Tensor:
    """A copy, where any row asks for one."""
    changed = [r for r, row in enumerate(rows) if row.sampling.logit_bias or needs_tokens(row.sampling)]
    if not changed:
        return logits_RV
    scores_RV = logits_RV.clone()
    for r in changed:
        _adjust(scores_RV[r], last_R[r : r + 1], rows[r])
    return scores_RV


def _adjust(scores_V: Tensor, last_1: Tensor, row: Row) -> None:
    """In place."""
    sampling, device = row.sampling, scores_V.device
    if _penalised(sampling):
        tokens_S = torch.tensor(row.tokens, device=device)
        _penalise(scores_V, torch.cat([tokens_S, last_1]) if row.pending else tokens_S, row)
    if sampling.logit_bias:
        biased = torch.tensor(list(sampling.logit_bias), device=device)
        scores_V[biased] += torch.tensor(list(sampling.logit_bias.values()), device=device, dtype=scores_V.dtype)
    if row.matcher is not None:
        answer = [*row.tokens[row.num_prompt :], *(last_1.tolist() if row.pending else ())]
        allowed_V = row.matcher.allowed(answer, len(scores_V)).to(device)
        scores_V.masked_fill_(~allowed_V, _NOTHING)


def _penalise(scores_V: Tensor, tokens_S: Tensor, row: Row) -> None:
    """Repetition counts the prompt too, once a token; presence and frequency count the answer alone."""
    sampling = row.sampling
    if sampling.repetition_penalty != 1:
        seen_S = scores_V[tokens_S]
        penalty = sampling.repetition_penalty
        scores_V[tokens_S] = torch.where(seen_S < 0, seen_S * penalty, seen_S / penalty)
    counts_V = torch.bincount(tokens_S[row.num_prompt :], minlength=len(scores_V))
    scores_V -= sampling.frequency_penalty * counts_V + sampling.presence_penalty * (counts_V > 0)


def _penalised(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def _narrowed(scores_WV: Tensor, numbers_NW: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """At its temperature, -inf where a row may not draw."""
    temperature_W1, top_p_W1, min_p_W1 = numbers_NW[:3].view(torch.float32).unsqueeze(-1).unbind(0)
    scores_WV = scores_WV / temperature_W1
    most = min(max(sampling.top_k for sampling in settings), scores_WV.shape[1])
    if most > 0:
        scores_WV = _drop_below(scores_WV, _top_k_edge(scores_WV, numbers_NW[3].long().unsqueeze(-1), most))
    if any(sampling.top_p < 1 for sampling in settings):
        scores_WV = _drop_below(scores_WV, _top_p_edge(scores_WV, top_p_W1))
    if any(sampling.min_p > 0 for sampling in settings):
        scores_WV = _drop_below(scores_WV, scores_WV.amax(dim=-1, keepdim=True) + min_p_W1.log())
    return scores_WV


def _drop_below(scores_WV: Tensor, edge_W1: Tensor) -> Tensor:
    return scores_WV.masked_fill(scores_WV < edge_W1, _NOTHING)


def _top_k_edge(scores_WV: Tensor, top_k_W1: Tensor, most: int) -> Tensor:
    """(W, 1) the k-th largest score; k = 0 is all. most: the largest k, V at most."""
    best_WK = scores_WV.topk(most, dim=-1).values
    edge_W1 = best_WK.gather(-1, (top_k_W1 - 1).clamp(0, most - 1))
    return edge_W1.masked_fill(top_k_W1 == 0, _NOTHING)


def _top_p_edge(scores_WV: Tensor, top_p_W1: Tensor) -> Tensor:
    """(W, 1) the last score, from the best on, that those before it leave some of the mass p to."""
    sorted_WV = scores_WV.sort(dim=-1, descending=True).values
    mass_WV = sorted_WV.softmax(dim=-1)
    before_WV = mass_WV.cumsum(dim=-1) - mass_WV
    number_W1 = (before_WV < top_p_W1).sum(dim=-1, keepdim=True)
    last_W1 = (number_W1 - 1).clamp(min=0)  # none is, where an adapter's logits are no numbers
    return sorted_WV.gather(-1, last_W1).masked_fill(top_p_W1 >= 1, _NOTHING)
