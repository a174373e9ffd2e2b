"""The parser of numbered answers, against the rule as its text states it, by trying every way; and by hand."""

import re
from itertools import combinations
from random import Random

import pytest

from molex.evaluation.composite.parsing import cut_at, find_answers, join_answers, split_answers


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("1. a\n2. b\n3. c", ["a", "b", "c"]),
        ("Sure, here they are:\n\n1. a\n2. b\n3. c\n", ["a", "b", "c"]),
        (" \n 1. a\n2. b\n3. c", ["a", "b", "c"]),
        ("1. a\n3. c", ["a", None, "c"]),
        ("2. b", [None, "b", None]),
        ("", [None, None, None]),
        ("no labels at all, 1. not even here", [None, None, None]),
        ("1. a\n2. \n3. c", ["a", None, "c"]),
        ("1. first line\nsecond line\n\nthird\n2. b\n3. c", ["first line\nsecond line\n\nthird", "b", "c"]),
        ("1.\ndef f():\n    return 1\n2. b\n3. c", ["def f():\n    return 1", "b", "c"]),
        ("1. in 2. place\n2. 11. of\n3. 3.5", ["in 2. place", "11. of", "3.5"]),
        ("11. x\n1. a\n21. y\n2. b\n3.14 is pi\n3. c", ["a\n21. y", "b\n3.14 is pi", "c"]),
        ("1. a\n 2. indented\n2. b\n3. c", ["a\n 2. indented", "b", "c"]),
        ("1. a\n2. b\n3. c\n4. an invented question\n5. more", ["a", "b", "c"]),
        ("1. a\n2. b\n3. c\nAgain:\n1. x\n2. y\n3. z", ["a", "b", "c\nAgain:\n1. x\n2. y\n3. z"]),
        ("1. a\n2. Steps:\n1. mix\n2. bake\n3. eat\n3. c", ["a", "Steps:\n1. mix\n2. bake\n3. eat", "c"]),
        ("1. a\n2. 1. mix\n2. bake\n3. eat\n3. c", ["a", "1. mix\n2. bake\n3. eat", "c"]),
        ("1. a\n2. Steps:\n1. mix\n2. bake\n3. c", ["a", "Steps:\n1. mix\n2. bake", "c"]),
        ("1. a\n2. b\n3. 1. mix\n2. bake\n3. eat\n4. sleep", ["a", "b", "1. mix\n2. bake\n3. eat\n4. sleep"]),
        ("1. a\n3. c\n2. b", ["a", None, "c\n2. b"]),
        # a list that does not begin at 1 cannot be told from answers: it is cut
        ("1. see\n2. or that\n2. b\n3. c", ["see", "or that\n2. b", "c"]),
    ],
)
def test_by_hand(text: str, answers: list[str | None]) -> None:
    assert split_answers(text, 3) == answers


def test_two_digit_labels() -> None:
    answers = [f"answer {i} of 12." for i in range(1, 13)]
    assert split_answers(join_answers(answers), 12) == answers


def test_spans_are_the_answers_places() -> None:
    text = "Well:\n1.  a \n2. b\n"
    assert [text[span.start : span.end] for span in find_answers(text, 2) if span] == ["a", "b"]


def test_what_was_joined_comes_apart() -> None:
    """Random answers: several lines, numbers, sentences with "2. " inside, indented items, and one numbered list."""
    rng = Random(0)
    for _ in range(400):
        count = rng.randint(1, 12)
        answers = [_answer(rng, count) for _ in range(count)]
        answers[rng.randrange(count)] = _numbered_list(rng)
        assert split_answers(join_answers(answers), count) == answers, join_answers(answers)


def test_missing_answers_are_missing() -> None:
    rng = Random(1)
    for _ in range(200):
        count = rng.randint(2, 12)
        answers = [_answer(rng, count) if rng.random() < 0.7 else None for _ in range(count)]
        text = "\n".join(f"{i}. {answer}" for i, answer in enumerate(answers, 1) if answer is not None)
        assert split_answers(text, count) == answers, text


def test_any_text_is_taken_by_the_rule() -> None:
    """Random lines, many of them labels: what is found is what the three criteria choose among all ways."""
    rng = Random(2)
    for _ in range(400):
        count = rng.randint(1, 4)
        lines = [rng.choice(["x", f"{rng.randint(1, 5)}. {rng.choice('abc')}"]) for _ in range(rng.randint(0, 9))]
        text = "\n".join(lines)
        assert [span and text[: span.start].count("\n") for span in find_answers(text, count)] == _by_trying(
            lines, count
        ), text


def test_generations_are_cut_at_what_ends_them() -> None:
    assert cut_at("1. a\n\n\nExample [INST]", ("[INST]", "\n\n\n")) == "1. a"
    assert cut_at("1. a", ("\n\n\n",)) == "1. a"


def _by_trying(lines: list[str], count: int) -> list[int | None]:
    """The line of each answer: every increasing choice of labels, the best by attempts, strays, earliness."""
    labels = [(i, int(line.split(".")[0])) for i, line in enumerate(lines) if re.match(r"\d+\. ", line)]
    ways = []
    for size in range(min(count, len(labels)) + 1):
        for chosen in combinations(labels, size):
            numbers = [number for _, number in chosen]
            if numbers == sorted(set(numbers)) and all(number <= count for number in numbers):
                ways.append(chosen)
    best = min(ways, key=lambda way: (-len(way), _num_strays(labels, way), [line for line, _ in way]))
    return [next((line for line, number in best if number == wanted), None) for wanted in range(1, count + 1)]


def _num_strays(labels: list[tuple[int, int]], way: tuple[tuple[int, int], ...]) -> int:
    strays = item = 0
    for label in labels:
        if label in way:
            item = 0
        elif label[1] == 1 or label[1] == item + 1:
            item = label[1]
        else:
            strays += 1
    return strays


def _answer(rng: Random, count: int) -> str:
    number = rng.randint(1, count + 2)
    pieces = [
        "plain",
        f"take {number}. then go",
        f"{number}.5",
        f"1{number}. Mai 1848",
        f"on two lines,\n  {number}. the second indented",
        f"with a gap\n\n{number}) and a bracket",
        f"{number}",
        f"v{number}. x",
    ]
    first, *rest = rng.sample(pieces, rng.randint(1, 3))
    return " ".join([first, *rest])


def _numbered_list(rng: Random) -> str:
    head = rng.choice(["Steps:\n", "", "Two parts\nof it:\n"])
    return head + "\n".join(
        f"{i}. {rng.choice(['mix', 'bake', 'eat 2. helpings'])}" for i in range(1, rng.randint(2, 9))
    )
