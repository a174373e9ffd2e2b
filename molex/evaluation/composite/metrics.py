"""How answers of one task are scored against the right ones; a metric is one more function or class here.

| metric | an answer is right where | value |
|---|---|---|
| `exact` | it is the right one, letter for letter | accuracy |
| `uncased` | the same in lower case | accuracy |
| `contains` | the right one is found in it, in lower case (MeteoRA's "fuzzy") | accuracy |
| `yes_no` | its first word is the same yes or no | accuracy |
| `number` | its number is the same: after ####, after "the answer is", else the last one | accuracy |
| `bleu` | corpus BLEU of sacrebleu | 0 to 100 |
| `rouge` | mean ROUGE-L F1 of rouge_score | 0 to 1 |

White space around answers does not count.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib import import_module
from statistics import fmean, stdev
from types import ModuleType
from typing import NamedTuple

from molex.errors import ConfigError
from molex.registry import Registry

_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


class Score(NamedTuple):
    """error: the standard error of the mean; None where there is none, as for one row and for corpus BLEU."""

    value: float
    error: float | None = None


def mean(values: Sequence[float]) -> Score:
    """The mean and its standard error, the sample's deviation over √n."""
    return Score(fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None)


class Metric(ABC):
    """Scores one task's answers together."""

    @abstractmethod
    def score(self, given: Sequence[str], right: Sequence[str]) -> Score:
        """All answers of one task, "" where one is missing, against the right ones."""


@dataclass(frozen=True)
class Accuracy(Metric):
    """The share of answers that are right; each one is right or wrong, so that they can be counted over tasks."""

    is_right: Callable[[str, str], bool]

    def score(self, given: Sequence[str], right: Sequence[str]) -> Score:
        pairs = zip(given, right, strict=True)
        return mean([float(self.is_right(mine.strip(), theirs.strip())) for mine, theirs in pairs])


metrics: Registry[Metric] = Registry("metric")


def accuracy(name: str) -> Callable[[Callable[[str, str], bool]], Callable[[str, str], bool]]:
    """Decorator: registers a function of (given, right) as an accuracy."""

    def add(is_right: Callable[[str, str], bool]) -> Callable[[str, str], bool]:
        metrics.register(name)(Accuracy(is_right))
        return is_right

    return add


@accuracy("exact")
def is_same(given: str, right: str) -> bool:
    return given == right


@accuracy("uncased")
def is_same_uncased(given: str, right: str) -> bool:
    return given.lower() == right.lower()


@accuracy("contains")
def contains(given: str, right: str) -> bool:
    return right.lower() in given.lower()


@accuracy("yes_no")
def is_same_verdict(given: str, right: str) -> bool:
    verdict = _verdict(given)
    return verdict is not None and verdict == _verdict(right)


@accuracy("number")
def is_same_number(given: str, right: str) -> bool:
    number = _number(given)
    return number is not None and number == _number(right)


class Bleu(Metric):
    """Over the corpus, not a mean of sentences; a missing answer shortens what was given and costs its words."""

    def score(self, given: Sequence[str], right: Sequence[str]) -> Score:
        return Score(float(_library("sacrebleu").corpus_bleu(list(given), [list(right)]).score))


class Rouge(Metric):
    """A missing answer scores 0."""

    def score(self, given: Sequence[str], right: Sequence[str]) -> Score:
        scorer = _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
        pairs = zip(given, right, strict=True)
        return mean([scorer.score(theirs, mine)["rougeL"].fmeasure for mine, theirs in pairs])


metrics.register("bleu")(Bleu())
metrics.register("rouge")(Rouge())


def _verdict(answer: str) -> str | None:
    word = re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE)
    return word[1].lower() if word else None


def _number(answer: str) -> Decimal | None:
    """The number an answer comes to."""
    marked = re.split(r"####|the answer is", answer, flags=re.IGNORECASE)
    found = _NUMBER.findall(marked[1] if len(marked) > 1 else answer)
    if not found:
        return None
    return Decimal((found[0] if len(marked) > 1 else found[-1]).replace(",", ""))


def _library(module: str) -> ModuleType:
    """Raises ConfigError, which says what to install, where it is not."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(f"this metric needs {package}: pip install 'molex[eval]'") from error
