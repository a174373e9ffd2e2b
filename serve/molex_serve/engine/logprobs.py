"""Log-probabilities of tokens and of the most likely others, by the model's own distribution: before penalties,
temperature and grammar."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from molex_serve.engine.base import TokenLogprob

_CHUNK = 256  # rows whose log-softmax is in memory at once


class Logprobs:
    """Of the tokens (R,) after logits (R, V), kept on their device until somebody reads them."""

    def __init__(self, logits_RV: Tensor, tokens_R: Tensor, num_top: int):
        self._tokens_R = tokens_R
        logprobs_RV = logits_RV.float().log_softmax(dim=-1)
        self._chosen_R = logprobs_RV.gather(-1, tokens_R.unsqueeze(-1)).squeeze(-1)
        self._top_RN, self._ids_RN = logprobs_RV.topk(min(num_top, logprobs_RV.shape[1]), dim=-1)

    def of_row(self, row: int, num_top: int) -> TokenLogprob:
        tokens, chosen, top, ids = self._read
        pairs = zip(ids[row][:num_top], top[row][:num_top], strict=True)
        return TokenLogprob(tokens[row], chosen[row], tuple(pairs))

    @cached_property
    def _read(self) -> tuple[list[int], list[float], list[list[float]], list[list[int]]]:
        return self._tokens_R.tolist(), self._chosen_R.tolist(), self._top_RN.tolist(), self._ids_RN.tolist()


def logprobs_of(logits_TV: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Of tokens 1 .. T-1, by the logits of those before them."""
    found: list[TokenLogprob] = []
    next_T = torch.tensor(tokens[1:], device=logits_TV.device)
    for start in range(0, len(next_T), _CHUNK):
        rows = Logprobs(logits_TV[:-1][start : start + _CHUNK], next_T[start : start + _CHUNK], num_top)
        found += [rows.of_row(row, num_top) for row in range(len(next_T[start : start + _CHUNK]))]
    return found
