"""Metrics and scores against values worked out by hand and closed forms."""

import math
import sys

import pytest

from molex.errors import ConfigError
from molex.evaluation.composite.metrics import mean, metrics
from molex.evaluation.composite.prompts import Composite
from molex.evaluation.composite.scores import score_answers
from molex.evaluation.composite.tasks import Pair, Task


@pytest.mark.parametrize(
    ("metric", "given", "right", "is_right"),
    [
        ("exact", " Abc\n", "Abc", True),
        ("exact", "abc", "Abc", False),
        ("exact", "Abc.", "Abc", False),
        ("uncased", "ABC", "abc", True),
        ("contains", "It is The Falcon, surely", "the falcon", True),
        ("contains", "the", "the falcon", False),
        ("contains", "", "the falcon", False),
        ("yes_no", "Yes. Because", "Yes. Hulk is a physicist.", True),
        ("yes_no", '"No", I think', "no", True),
        ("yes_no", "I know", "No. It is wide.", False),
        ("yes_no", "Nothing", "No", False),
        ("yes_no", "", "No", False),
        ("number", "2 + 2 = 4", "4", True),
        ("number", "so 1,234.50 in all", "#### 1234.5", True),
        ("number", "The answer is 7, out of 9", "some 3 steps\n#### 7", True),
        ("number", "#### -5", "5", False),
        ("number", "none", "5", False),
        ("number", "", "5", False),
    ],
)
def test_right_and_wrong(metric: str, given: str, right: str, is_right: bool) -> None:
    assert metrics[metric].score([given], [right]).value == is_right


def test_bleu_takes_a_missing_answer_as_empty() -> None:
    """5 of 10 words, all right: precision 1, brevity penalty exp(1 - 10/5). Leaving the row out would give 100."""
    right = ["the cat sat down today", "a dog ran past it"]
    assert metrics["bleu"].score(right, right).value == pytest.approx(100)
    assert metrics["bleu"].score([right[0], ""], right).value == pytest.approx(100 * math.exp(1 - 10 / 5))


def test_rouge_takes_a_missing_answer_as_nothing() -> None:
    """Two of three words in common, in order: F1 2/3; the empty row counts 0."""
    score = metrics["rouge"].score(["one two four", ""], ["one two three", "five"])
    assert score.value == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize(("metric", "module"), [("bleu", "sacrebleu"), ("rouge", "rouge_score.rouge_scorer")])
def test_a_missing_library_is_named(metric: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'molex\[eval\]'"):
        metrics[metric].score(["a"], ["a"])


def test_mean_and_standard_error() -> None:
    """Of k right in n:  sqrt(p (1 - p) / (n - 1))."""
    score = mean([1.0] * 3 + [0.0] * 9)
    assert score.value == 0.25
    assert score.error == pytest.approx(math.sqrt(0.25 * 0.75 / 11))
    assert mean([1.0]).error is None


def test_unknown_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'exact'"):
        Task(name="a", rows=(Pair("q", "a"),), metric="exakt")


def test_scores_count_every_row() -> None:
    """Three prompts of two accuracies and a ROUGE, in different orders, some answers missing."""
    tasks = {
        "x": Task(name="x", rows=(Pair("q", "X"),)),
        "y": Task(name="y", rows=(Pair("q", "Y"),), metric="contains"),
        "z": Task(name="z", rows=(Pair("q", "Z"),), metric="rouge"),
    }
    prompts = [_asked("x", "y", "z"), _asked("z", "y", "x"), _asked("y", "x", "z")]
    answers = [["X", "say y", "Z"], ["Z", None, "X"], ["no", None, None]]
    scores = score_answers(prompts, answers, tasks)
    assert scores.attempted.value == (3 + 2 + 1) / 3
    assert scores.attempted.error == pytest.approx(1 / math.sqrt(3))
    assert {task: score.value for task, score in scores.by_task.items()} == pytest.approx(
        {"x": 2 / 3, "y": 1 / 3, "z": 2 / 3}
    )
    assert scores.correct.value == pytest.approx(2 / 3 + 1 / 3), "the sum of accuracies, where there is one"
    assert scores.all_right is not None
    assert scores.all_right.value == pytest.approx(1 / 3)


def test_without_an_accuracy_nothing_is_counted_right() -> None:
    tasks = {"z": Task(name="z", rows=(Pair("q", "Z"),), metric="rouge")}
    scores = score_answers([_asked("z")], [["Z"]], tasks)
    assert (scores.correct.value, scores.all_right) == (0, None)


def _asked(*names: str) -> Composite:
    return Composite(prompt="", tasks=names, questions=("q",) * len(names), answers=tuple(map(str.upper, names)))
