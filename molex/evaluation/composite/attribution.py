"""Which expert answered: the mean gate weights while each answer of a composite prompt was generated.

    w_e(answer) = mean over the answer's tokens and over routed layers of the weight that expert e had there

Weights as the router gave them, nothing else: an expert's scale and the size of its update do not enter. The dominant
expert of an answer is the one of largest weight.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molex.evaluation.composite.generation import Generation, decode
from molex.evaluation.composite.metrics import Score, mean
from molex.evaluation.composite.parsing import Span


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """weights, dominant: task -> expert -> mean gate weight, and share of its answers that the expert dominated.
    own: task -> share of its answers dominated by the task's own expert, for tasks that have one; own_overall: the
    same over all their answers. Only attempted answers count."""

    weights: dict[str, dict[str, float]]
    dominant: dict[str, dict[str, float]]
    own: dict[str, Score]
    own_overall: Score | None


def tokens_of(span: Span, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> range:
    """The tokens that wrote a span of the decoded text: those whose own text overlaps it."""
    lengths = range(len(ids) + 1)
    written = lambda count: len(decode(tokenizer, ids[:count]))  # noqa: E731 (a key, used twice)
    first = bisect_right(lengths, span.start, key=written) - 1
    return range(max(first, 0), bisect_left(lengths, span.end, key=written))


def answer_gates(
    generation: Generation, spans: Sequence[Span | None], tokenizer: PreTrainedTokenizerBase
) -> list[Tensor | None]:
    """Mean gates (E,) of each answer; None where it was not attempted or nothing was recorded."""
    gates_SE, found = generation.gates, []
    for span in spans:
        tokens = range(0) if span is None else tokens_of(span, generation.ids, tokenizer)
        found.append(gates_SE[tokens.start : tokens.stop].mean(0) if gates_SE is not None and tokens else None)
    return found


def attribute(
    answers: Iterable[tuple[str, Tensor | None]], experts: Sequence[str], own: Mapping[str, str]
) -> Attribution | None:
    """answers: of each answer its task and its gates (E,). own: a task's expert. None where nothing is known."""
    gates_of: dict[str, list[Tensor]] = {}
    for task, gates_E in answers:
        if gates_E is not None:
            gates_of.setdefault(task, []).append(gates_E)
    if not gates_of:
        return None
    stacked = {task: torch.stack(gates) for task, gates in gates_of.items()}  # (answers, E) each
    winners = {task: gates.argmax(1).tolist() for task, gates in stacked.items()}
    hits = {task: [float(experts[winner] == own[task]) for winner in winners[task]] for task in winners if task in own}
    overall = [hit for task_hits in hits.values() for hit in task_hits]
    return Attribution(
        weights={task: _named(experts, gates.double().mean(0).tolist()) for task, gates in stacked.items()},
        dominant={task: _named(experts, _shares(won, len(experts))) for task, won in winners.items()},
        own={task: mean(task_hits) for task, task_hits in hits.items()},
        own_overall=mean(overall) if overall else None,
    )


def _named(experts: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return dict(zip(experts, values, strict=True))


def _shares(winners: Sequence[int], num_experts: int) -> list[float]:
    return [winners.count(expert) / len(winners) for expert in range(num_experts)]
