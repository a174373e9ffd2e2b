"""Composite-n evaluation of a mixture: does routing hold up where several skills are needed in one generation?

| line | what answers |
|---|---|
| `base` | the base, with no expert at work |
| `mixture` | the routed mixture |
| `merged` | a merged model, where one is given |
| `own expert, alone` | the same questions one at a time, each by its task's own expert: what routing cannot beat |
| `mixture, alone` | the same questions one at a time: routing without composition |
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from molex.errors import ConfigError
from molex.evaluation.composite.attribution import Attribution, answer_gates, attribute
from molex.evaluation.composite.generation import Asker, Generation
from molex.evaluation.composite.metrics import Score
from molex.evaluation.composite.parsing import find_answers, join_answers, split_answers
from molex.evaluation.composite.prompts import Composite, CompositeSettings, compose, formats
from molex.evaluation.composite.scores import Scores, score_answers, score_by_task
from molex.evaluation.composite.tasks import Task
from molex.mixture import Mixture

OWN_ALONE, MIXTURE_ALONE = "own expert, alone", "mixture, alone"


@dataclass(frozen=True, kw_only=True)
class CompositeReport:
    """lines: who answered -> scores. alone: who answered one question at a time -> task -> score. generations: line ->
    the text for each prompt. attribution: of the mixture's answers, None where it recorded no routing."""

    count: int
    prompts: list[Composite]
    generations: dict[str, list[str]]
    lines: dict[str, Scores]
    alone: dict[str, dict[str, Score]]
    attribution: Attribution | None


def evaluate(
    model: Mixture | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    counts: Sequence[int] = (3, 5, 10),
    settings: CompositeSettings | None = None,
    *,
    merged: nn.Module | None = None,
    own: Mapping[str, str] | None = None,
    on_part: Callable[[str], None] = lambda part: None,
) -> list[CompositeReport]:
    """One report for each n of `counts`. A model that is no mixture has the one line `base`.

    own: task -> its own expert, by default the one of the task's name, if there is one. on_part is told what is being
    asked. Raises ConfigError where tasks do not suffice, a prompt is too long, or an expert is unknown.
    """
    settings = CompositeSettings() if settings is None else settings
    if not counts:
        raise ConfigError("counts is empty; give how many questions a prompt asks, such as 3 5 10")
    owners = _owners(model, tasks, own)
    prompts = {count: compose(tasks, count, settings) for count in counts}
    asker = Asker(tokenizer=tokenizer, batch_size=settings.batch_size, ends=formats[settings.format].ends)
    run = _Run({task.name: task for task in tasks}, settings, asker, owners, on_part)
    return [run.report(model, merged, count, composites) for count, composites in prompts.items()]


def _owners(model: Mixture | nn.Module, tasks: Sequence[Task], own: Mapping[str, str] | None) -> dict[str, str]:
    experts = model.experts if isinstance(model, Mixture) else []
    if own is None:
        return {task.name: task.name for task in tasks if task.name in experts}
    unknown = [*(set(own.values()) - set(experts)), *(set(own) - {task.name for task in tasks})]
    if unknown:
        known = f"experts: {', '.join(experts) or '(none)'}; tasks: {', '.join(task.name for task in tasks)}"
        raise ConfigError(f"own={dict(own)} names {', '.join(sorted(unknown))}, which is none of these. {known}")
    return dict(own)


@dataclass(frozen=True)
class _Run:
    """What stays the same over all prompts of one evaluation."""

    tasks: Mapping[str, Task]
    settings: CompositeSettings
    asker: Asker
    owners: Mapping[str, str]
    on_part: Callable[[str], None]

    def report(
        self, model: Mixture | nn.Module, merged: nn.Module | None, count: int, prompts: list[Composite]
    ) -> CompositeReport:
        given: dict[str, list[Generation]] = {}
        alone: dict[str, dict[str, Score]] = {}
        if isinstance(model, Mixture):
            with model.disabled():
                given["base"] = self._ask("base", model.model, prompts)
            given["mixture"] = self._ask("mixture", model.model, prompts, model)
            alone = {OWN_ALONE: self._own_alone(model, prompts), MIXTURE_ALONE: self._alone(model, prompts)}
        else:
            given["base"] = self._ask("base", model, prompts)
        if merged is not None:
            given["merged"] = self._ask("merged", merged, prompts)
        return CompositeReport(
            count=count,
            prompts=prompts,
            generations={who: [generation.text for generation in made] for who, made in given.items()},
            lines={who: self._score(prompts, made) for who, made in given.items()},
            alone={who: scores for who, scores in alone.items() if scores},
            attribution=self._attribute(model, prompts, given["mixture"]) if isinstance(model, Mixture) else None,
        )

    def _ask(
        self, who: str, model: nn.Module, prompts: Sequence[Composite], mixture: Mixture | None = None
    ) -> list[Generation]:
        self.on_part(f"composite-{len(prompts[0].tasks)}: {who}")
        room = self._room([join_answers(prompt.answers) for prompt in prompts])
        return self.asker.ask(model, [prompt.prompt for prompt in prompts], room, mixture)

    def _score(self, prompts: Sequence[Composite], given: Sequence[Generation]) -> Scores:
        pairs = zip(prompts, given, strict=True)
        answers = [split_answers(generation.text, len(prompt.tasks)) for prompt, generation in pairs]
        return score_answers(prompts, answers, self.tasks)

    def _attribute(
        self, mixture: Mixture, prompts: Sequence[Composite], given: Sequence[Generation]
    ) -> Attribution | None:
        answers = []
        for prompt, generation in zip(prompts, given, strict=True):
            spans = find_answers(generation.text, len(prompt.tasks))
            answers += zip(prompt.tasks, answer_gates(generation, spans, self.asker.tokenizer), strict=True)
        return attribute(answers, mixture.experts, self.owners)

    def _own_alone(self, mixture: Mixture, prompts: Sequence[Composite]) -> dict[str, Score]:
        """Each task that has an expert of its own, by that expert, one question at a time."""
        scores: dict[str, Score] = {}
        for task, expert in self.owners.items():
            with mixture.using(adapters=expert):
                scores |= self._one_at_a_time(f"{expert} alone", mixture.model, _only(prompts, task))
        return scores

    def _alone(self, mixture: Mixture, prompts: Sequence[Composite]) -> dict[str, Score]:
        return self._one_at_a_time(MIXTURE_ALONE, mixture.model, _split(prompts))

    def _one_at_a_time(self, who: str, model: nn.Module, singles: Sequence[Composite]) -> dict[str, Score]:
        if not singles:
            return {}
        self.on_part(who)
        asked = [formats[self.settings.format].alone.format(question=single.questions[0]) for single in singles]
        room = self._room([single.answers[0] for single in singles])
        answers = [[generation.text] for generation in self.asker.ask(model, asked, room)]
        return score_by_task(singles, answers, self.tasks)

    def _room(self, answers: Sequence[str]) -> int:
        """How many tokens a model may write."""
        longest = max(map(self.asker.num_tokens, answers))
        return self.settings.max_new_tokens or 2 * longest + 16


def _split(prompts: Sequence[Composite]) -> list[Composite]:
    """Every question as a prompt of its own."""
    return [
        Composite(prompt="", tasks=(task,), questions=(question,), answers=(answer,))
        for prompt in prompts
        for task, question, answer in zip(prompt.tasks, prompt.questions, prompt.answers, strict=True)
    ]


def _only(prompts: Sequence[Composite], task: str) -> list[Composite]:
    return [single for single in _split(prompts) if single.tasks == (task,)]
