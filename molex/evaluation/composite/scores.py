"""What the answers to composite prompts are worth.

attempted   answers given, of n: mean over prompts
by_task     the task's metric over ALL its questions; a missing answer is an empty one, hence wrong, never left out
correct     right answers, of n: mean over prompts. Only tasks whose metric is an accuracy count, so it is at most
            their number, and where every prompt asks each task once it is MeteoRA's sum of accuracies
all_right   share of prompts whose countable answers are all right
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from molex.evaluation.composite.metrics import Accuracy, Score, mean, metrics
from molex.evaluation.composite.prompts import Composite
from molex.evaluation.composite.tasks import Task

Answers = Sequence[str | None]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """See the module's text. all_right is None where no task's metric is an accuracy."""

    attempted: Score
    correct: Score
    all_right: Score | None
    by_task: dict[str, Score]


def score_answers(prompts: Sequence[Composite], answers: Sequence[Answers], tasks: Mapping[str, Task]) -> Scores:
    """prompts and the answers to each, in order; tasks by name."""
    right = [_right_answers(prompt, given, tasks) for prompt, given in zip(prompts, answers, strict=True)]
    countable = [all(hits) for hits in right if hits]
    return Scores(
        attempted=mean([float(sum(answer is not None for answer in given)) for given in answers]),
        correct=mean([float(sum(hits)) for hits in right]),
        all_right=mean(list(map(float, countable))) if countable else None,
        by_task=score_by_task(prompts, answers, tasks),
    )


def score_by_task(
    prompts: Sequence[Composite], answers: Sequence[Answers], tasks: Mapping[str, Task]
) -> dict[str, Score]:
    """Each task's metric over all its questions, in the order of `tasks`; tasks that no prompt asks are left out."""
    pairs: dict[str, list[tuple[str, str]]] = {name: [] for name in tasks}
    for prompt, given in zip(prompts, answers, strict=True):
        for task, mine, theirs in zip(prompt.tasks, given, prompt.answers, strict=True):
            pairs[task].append((mine or "", theirs))
    return {task: metrics[tasks[task].metric].score(*zip(*rows, strict=True)) for task, rows in pairs.items() if rows}


def _right_answers(prompt: Composite, given: Answers, tasks: Mapping[str, Task]) -> list[bool]:
    """Whether each answer is right, of tasks where that can be said."""
    hits = []
    for task, mine, theirs in zip(prompt.tasks, given, prompt.answers, strict=True):
        metric = metrics[tasks[task].metric]
        if isinstance(metric, Accuracy):
            hits.append(metric.is_right((mine or "").strip(), theirs.strip()))
    return hits
