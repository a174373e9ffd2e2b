"""Exact match: the share of rows whose greedy answer is the right one, byte for byte."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from molex.modes import evaluating
from molex.workbench.data import question_and_answer


def exact_match(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 128,
) -> float:
    """Share of rows answered exactly, over all rows."""
    return fmean(_hits(model, tokenizer, rows, batch_size))


def exact_match_by_skill(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 128,
) -> dict[str, float]:
    """Share of rows answered exactly, for each skill, in the order in which skills first appear."""
    hits_of: dict[str, list[bool]] = {}
    for row, hit in zip(rows, _hits(model, tokenizer, rows, batch_size), strict=True):
        hits_of.setdefault(row["skill"], []).append(hit)
    return {skill: fmean(hits) for skill, hits in hits_of.items()}


def answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Greedy continuations of a left-padded batch of prompts, up to <eos>."""
    batch = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt").to(
        next(model.parameters()).device
    )
    with evaluating(model):
        ids_BS = cast(Any, model).generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    return tokenizer.batch_decode(ids_BS[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _hits(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int,
) -> list[bool]:
    hits: list[bool] = []
    for start in range(0, len(rows), batch_size):
        prompts, right = zip(*map(question_and_answer, rows[start : start + batch_size]), strict=True)
        longest = max(len(answer.encode()) for answer in right)
        given = answers(model, tokenizer, prompts, max_new_tokens=longest + 1)
        hits += [mine == theirs for mine, theirs in zip(given, right, strict=True)]
    return hits
