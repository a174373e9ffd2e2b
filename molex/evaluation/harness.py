"""lm-evaluation-harness on bases, mixtures and whatever was made of them, side by side.

The model object itself is evaluated, so what is measured is what runs: no export, no copy of the weights. Mixtures
need nothing special, since a converted model is still its own class. Models given as folders are loaded one after the
other, so that one at a time is in memory.

Two things to know. The harness runs requests that differ in their last token alone as one forward, and gives no
attention mask when it scores texts, so that routing recorded meanwhile counts some tokens not at all and padding as
tokens: `molex.evaluation.heat_map` counts properly. And it knows no task ids: tasks that have one run apart.
"""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molex.checks import near_and_known
from molex.errors import ConfigError
from molex.evaluation.opening import Subject, open_model, open_tokenizer
from molex.mixture import Mixture
from molex.modes import evaluating

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Task = str | Mapping[str, Any]  # a name the harness knows, or a task's configuration itself

BASE = "base"  # the column of a mixture with its experts off


@dataclass(frozen=True)
class Score:
    """One number of one model. stderr: None where the harness has no estimate for this metric. filter: what the
    answer went through before it was compared, "none" where nothing."""

    model: str
    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    num_samples: int | None


def evaluate(
    models: Mapping[str, Subject],
    tasks: Sequence[Task],
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    with_base: bool = True,
    task_ids: Mapping[str, int] | None = None,
    device: str | None = None,
) -> list[Score]:
    """Scores every model on every task; offline where the tasks' data are.

    models: by the name of their column. with_base: the first mixture is also evaluated with its experts off, as
    "base"; modules that it trained whole stay as trained. tokenizer: by default each model's own. include_path: a
    folder of task files. limit: how many samples of each task. task_ids: by a task's name, for
    mixtures that route by task. device: where models given as folders go.

    Raises ConfigError where lm_eval is not installed, on unknown tasks and on settings out of range; CheckpointError
    on folders without a model or tokenizer. Models come back in the mode they were in.
    """
    check_harness()
    if not models or not tasks:
        raise ConfigError("nothing to evaluate: give at least one model and one task")
    if batch_size < 1 or (limit is not None and limit < 2):
        raise ConfigError(f"batch_size={batch_size}, limit={limit}: give at least 1, and 2 samples for an error bar")
    scores: list[Score] = []
    with _seeds_kept():
        run = partial(
            _run,
            groups=_by_id(tasks, task_ids or {}),
            manager=_task_manager(tasks, include_path),
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=apply_chat_template,
        )
        for name, subject in models.items():
            base_wanted = with_base and BASE not in models and all(score.model != BASE for score in scores)
            scores += _of_model(name, subject, tokenizer, device, base_wanted, run)
    return scores


def _of_model(
    name: str,
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase | str | Path | None,
    device: str | None,
    with_base: bool,
    run: Callable[[str, PreTrainedModel, PreTrainedTokenizerBase], list[Score]],
) -> list[Score]:
    """One model's columns. What is loaded here is let go at the end."""
    model = open_model(subject, device)
    beside = open_tokenizer(tokenizer, model, subject)
    mixture: Mixture | None = getattr(model, "molex_mixture", None)
    scores: list[Score] = []
    with evaluating(model):
        if with_base and mixture is not None:
            with mixture.disabled():
                scores += run(BASE, model, beside)
        return scores + run(name, model, beside)


def side_by_side(scores: Sequence[Score]) -> list[dict[str, str]]:
    """A table's rows: one for each task and metric, a column for each model."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for score in scores:
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        row = rows.setdefault((score.task, metric), {"task": score.task, "metric": metric})
        row[score.model] = f"{score.value:.3f}" + ("" if score.stderr is None else f" ± {score.stderr:.3f}")
    return list(rows.values())


def check_harness() -> None:
    """Raises ConfigError, which says what to install, where there is no lm_eval."""
    if find_spec("lm_eval") is None:
        raise ConfigError("this evaluation needs lm-evaluation-harness: pip install 'molex[eval]'")


def _task_manager(tasks: Sequence[Task], include_path: str | Path | None) -> "TaskManager":
    """Knows the tasks of a folder, and the harness's own 14,000 only where one is asked for: reading them takes long.

    Raises ConfigError on a task that nobody knows, or whose data cannot be had.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"include_path={include_path} is no folder; give one that holds task files")
    path = None if include_path is None else str(include_path)
    named = [task for task in tasks if isinstance(task, str)]
    manager = TaskManager(include_path=path, include_defaults=False)
    if not set(named) <= set(manager.all_tasks):
        manager = TaskManager(include_path=path)
    for name in named:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists the harness's own"
            raise ConfigError(f"no task {name!r} among {len(manager.all_tasks)} known ones; {hint}")
    try:
        manager.load(cast(Any, list(tasks)))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the tasks cannot be read, or their data cannot be had here: {reason}") from error
    return manager


def _by_id(tasks: Sequence[Task], task_ids: Mapping[str, int]) -> dict[int | None, list[Task]]:
    """Tasks that run together. Raises ConfigError on an id for a task that is not among them."""
    names = [task if isinstance(task, str) else str(task.get("task")) for task in tasks]
    for name in task_ids:
        if name not in names:
            raise ConfigError(f"a task id is given for {name!r}{near_and_known(name, names)}")
    groups: dict[int | None, list[Task]] = {}
    for name, task in zip(names, tasks, strict=True):
        groups.setdefault(task_ids.get(name), []).append(task)
    return groups


def _run(
    column: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    groups: Mapping[int | None, list[Task]],
    manager: "TaskManager",
    limit: int | None,
    batch_size: int,
    apply_chat_template: bool,
) -> list[Score]:
    """One column. The tokenizer is copied: it would be given a padding token where it has none."""
    import lm_eval
    from lm_eval.models import huggingface

    harness, adapters = cast(Any, lm_eval), cast(Any, huggingface)  # decorators hide their signatures
    wrapped = adapters.HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    settings = {"task_manager": manager, "limit": limit, "apply_chat_template": apply_chat_template}
    mixture: Mixture | None = getattr(model, "molex_mixture", None)
    scores: list[Score] = []
    for task_id, tasks in groups.items():
        with nullcontext() if mixture is None or task_id is None else mixture.using(tasks=[task_id]):
            outcome = harness.simple_evaluate(model=wrapped, tasks=tasks, log_samples=False, **settings)
        scores += _scores(column, outcome)
    return scores


def _scores(column: str, outcome: Mapping[str, Any]) -> list[Score]:
    """The harness's nested dictionaries, flat; its keys are "metric,filter" and "metric_stderr,filter"."""
    scores = []
    for task, numbers in outcome["results"].items():
        better = outcome.get("higher_is_better", {}).get(task, {})
        samples = outcome.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in numbers.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            spread = numbers.get(f"{metric}_stderr,{kind}")
            error = float(spread) if isinstance(spread, int | float) else None
            scores.append(Score(column, task, metric, kind, float(value), error, better.get(metric), samples))
    return scores


@contextmanager
def _seeds_kept() -> Iterator[None]:
    """The harness seeds every random generator; a training run that evaluates now and then must not repeat itself."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
