"""Composite-n prompts: n numbered questions of several tasks, asked at once (MeteoRA, arXiv 2405.13053).

    [worked examples: k times n questions with their answers]   n questions   -> "1. ...\\n2. ...\\n...\\nn. ..."

The same tasks, settings and seed give the same prompts on every machine, and more prompts only append to them.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from molex.checks import check_choice, check_range
from molex.errors import ConfigError
from molex.evaluation.composite.parsing import join_answers
from molex.evaluation.composite.tasks import Pair, Task
from molex.registry import Registry


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """Templates. Answers are always numbered lines, "1. ...", which is what the parser reads.

    alone: {question}, one question on its own. question: {number} and {question}, one of several. asked: {questions},
    up to where the answers begin. example: {number}, {asked} and {answers}, a worked one. with_examples: {examples}
    and {asked}. between, between_in_examples: what joins questions. ends: strings that end the answers.
    """

    alone: str
    question: str
    asked: str
    example: str
    with_examples: str
    between: str
    between_in_examples: str
    ends: tuple[str, ...]

    def ask(self, questions: Sequence[str], worked: Sequence[Sequence[Pair]] = ()) -> str:
        """The prompt for these questions, after worked examples, each of as many questions."""
        asked = self._asked(questions, self.between)
        if not worked:
            return asked
        examples = "".join(self._example(number, pairs) for number, pairs in enumerate(worked, 1))
        return self.with_examples.format(examples=examples, asked=asked)

    def _asked(self, questions: Sequence[str], between: str) -> str:
        each = [self.question.format(number=i, question=question) for i, question in enumerate(questions, 1)]
        return self.asked.format(questions=between.join(each))

    def _example(self, number: int, pairs: Sequence[Pair]) -> str:
        asked = self._asked([pair.question for pair in pairs], self.between_in_examples)
        answers = join_answers([pair.answer for pair in pairs])
        return self.example.format(number=number, asked=asked, answers=answers)


formats: Registry[PromptFormat] = Registry("prompt format")

formats.register("numbered")(  # of the workbench, whose base was pretrained on such prompts without examples
    PromptFormat(
        alone="{question}\n= ",
        question="{number}. {question}",
        asked="{questions}\n= ",
        example="{asked}{answers}\n\n\n",
        with_examples="{examples}{asked}",
        between="\n",
        between_in_examples="\n",
        ends=("\n\n\n",),
    )
)
formats.register("meteora")(
    PromptFormat(
        alone="[INST] {question} [/INST]\n",
        question="[INST] {question} [/INST]\n",
        asked="{questions}\n",
        example="Example {number}:\n\n{asked}{answers}\n\n\n",
        with_examples="\n{examples}Following the example above, generate answers to the questions below:\n\n{asked}",
        between="\n\n",
        between_in_examples="\n",
        ends=("\n\n\n", "[INST]"),
    )
)


@dataclass(frozen=True, kw_only=True)
class CompositeSettings:
    """shots: worked examples before the questions. order: "shuffled", each prompt asks other tasks in another order,
    or "given", each asks the first n in the order they were given, as MeteoRA does. repeat: tasks may come twice in a
    prompt. max_new_tokens: by default 16 more than twice the longest right answer's."""

    num_prompts: int = 200
    seed: int = 0
    format: str = "numbered"
    shots: int = 0
    order: str = "shuffled"
    repeat: bool = False
    batch_size: int = 32
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        _ = formats[self.format]
        check_choice("order", self.order, ("shuffled", "given"))
        for name, least in (("num_prompts", 1), ("shots", 0), ("batch_size", 1), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if value is not None:
                check_range(name, value, least)
        if self.repeat and self.order == "given":
            raise ConfigError("repeat=True draws tasks at random; with order='given' leave it out")


@dataclass(frozen=True, kw_only=True)
class Composite:
    """One prompt: the tasks it asks, in order, their questions and right answers."""

    prompt: str
    tasks: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def compose(tasks: Sequence[Task], count: int, settings: CompositeSettings) -> list[Composite]:
    """Prompts of `count` questions each, of different tasks. No question is asked twice.

    Raises ConfigError where there are too few tasks, questions or worked examples.
    """
    by_name = {task.name: task for task in tasks}
    if len(by_name) < len(tasks):
        raise ConfigError(f"two tasks have one name: {', '.join(task.name for task in tasks)}")
    check_range("count", count, 1)
    if not tasks or (count > len(tasks) and not settings.repeat):
        raise ConfigError(
            f"composite-{count} of {len(tasks)} tasks; give at least {count} tasks, or repeat=True to ask some twice"
        )
    questions = {task.name: _shuffled(task, settings.seed) for task in tasks}
    rng = Random(f"{settings.seed} {count}")
    return [_prompt(_draw(tasks, count, settings, rng), questions, settings) for _ in range(settings.num_prompts)]


def write_prompts(path: Path, prompts: Sequence[Composite]) -> None:
    """One JSON object a line."""
    lines = [json.dumps(asdict(prompt), ensure_ascii=False) + "\n" for prompt in prompts]
    path.write_text("".join(lines), encoding="utf-8")


def _draw(tasks: Sequence[Task], count: int, settings: CompositeSettings, rng: Random) -> list[Task]:
    if settings.order == "given":
        return list(tasks[:count])
    return rng.choices(tasks, k=count) if settings.repeat else rng.sample(tasks, count)


def _shuffled(task: Task, seed: int) -> Iterator[Pair]:
    return iter(Random(f"{seed} {task.name}").sample(task.rows, len(task.rows)))


def _prompt(drawn: Sequence[Task], questions: dict[str, Iterator[Pair]], settings: CompositeSettings) -> Composite:
    pairs = []
    for task in drawn:
        pair = next(questions[task.name], None)
        if pair is None:
            raise ConfigError(
                f"task {task.name!r} has {len(task.rows)} questions, too few for {settings.num_prompts} prompts that "
                "ask none twice; give more rows or fewer prompts"
            )
        pairs.append(pair)
    return Composite(
        prompt=formats[settings.format].ask([pair.question for pair in pairs], _worked(drawn, settings.shots)),
        tasks=tuple(task.name for task in drawn),
        questions=tuple(pair.question for pair in pairs),
        answers=tuple(pair.answer for pair in pairs),
    )


def _worked(drawn: Sequence[Task], shots: int) -> list[list[Pair]]:
    """Worked examples of the same tasks in the same order: each task's examples, from the first on."""
    times = Counter(task.name for task in drawn)
    for task in drawn:
        needed = shots * times[task.name]
        if needed > len(task.examples):
            raise ConfigError(
                f"task {task.name!r} has {len(task.examples)} worked examples, {shots} shots need {needed}; give more, "
                "such as a train.jsonl beside its test.jsonl"
            )
    shown = {task.name: iter(task.examples) for task in drawn}
    return [[next(shown[task.name]) for task in drawn] for _ in range(shots)]
