"""The answers in one generation that answers several numbered questions: "1. ...\\n2. ...\\n3. ...".

A label is a number from 1 up with a dot and a space (or the line's end) at the very start of a line, so "1." inside
"11." or inside a sentence is none, and neither is an indented one. Answer i starts at a label i, answers come in order,
and an answer goes on, over several lines, until the next one starts.

An answer may be a numbered list itself, so a label may be an item of it. Among all ways to choose a label for each
answer, in order, the one is taken that

    1. attempts the most answers,
    2. leaves the fewest stray labels: those left inside an answer that continue no list 1., 2., 3., ... there,
    3. starts each answer as early as possible.

So "2. Steps:\\n1. mix\\n2. bake\\n3. eat\\n3. final" has its third answer in the last line: taking "3. eat" would
leave a stray 3. Without lists this is the plain rule, the first label i after answer i - 1 started. A list that does
not begin at 1 cannot be told from answers, and is cut at its first fitting number.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

_LABEL = re.compile(r"(?:\A\s*|^)([1-9][0-9]{0,3})\.(?:[ \t]+|$)", re.MULTILINE)
_FIRST_ITEM = re.compile(r"1\.[ \t]")


class Span(NamedTuple):
    """Where an answer's text lies in a generation, without its label and the white space around it."""

    start: int
    end: int


class _Label(NamedTuple):
    number: int
    start: int  # where its line begins
    content: int  # what follows it
    opens_list: bool  # "2. 1. mix": the answer's first item is on the label's own line


class _Chain(NamedTuple):
    """Labels chosen as starts of answers, by position among all labels, and the stray ones up to there."""

    starts: tuple[int, ...] = ()
    strays: int = 0

    def rank(self) -> tuple[int, int, tuple[int, ...]]:
        """Higher is better."""
        return len(self.starts), -self.strays, tuple(-start for start in self.starts)


def join_answers(answers: Sequence[str]) -> str:
    """Several answers as one text: what `split_answers` takes apart."""
    return "\n".join(f"{number}. {answer}" for number, answer in enumerate(answers, 1))


def split_answers(text: str, count: int) -> list[str | None]:
    """The texts of `count` answers; None where one was not attempted, or is blank."""
    return [span and text[span.start : span.end] for span in find_answers(text, count)]


def find_answers(text: str, count: int) -> list[Span | None]:
    """Where each of `count` answers is; None as in `split_answers`. Text before the first label belongs to none."""
    labels = [_label(match, text) for match in _LABEL.finditer(text)]
    starts = _best_chain(labels, count).starts
    found: dict[int, Span | None] = {}
    for position, start in enumerate(starts):
        last = position + 1 == len(starts)
        end = _end_of_last(labels, start, count, text) if last else labels[starts[position + 1]].start
        found[labels[start].number] = _stripped(text, labels[start].content, end)
    return [found.get(number) for number in range(1, count + 1)]


def cut_at(text: str, ends: Sequence[str]) -> str:
    """The text up to the first of these strings that it holds."""
    return text[: min((text.index(end) for end in ends if end in text), default=len(text))]


def _label(match: re.Match[str], text: str) -> _Label:
    return _Label(int(match[1]), match.start(), match.end(), _FIRST_ITEM.match(text, match.end()) is not None)


def _best_chain(labels: Sequence[_Label], count: int) -> _Chain:
    """Dynamic programming over labels: each can start only the answer of its own number."""
    best, ended = {-1: _Chain()}, []
    for chosen in range(-1, len(labels)):
        if chosen not in best:
            continue
        starts, strays = best[chosen]
        number, item = (labels[chosen].number, int(labels[chosen].opens_list)) if starts else (0, 0)
        for other in range(chosen + 1, len(labels)):
            label = labels[other]
            if number < label.number <= count:
                longer = _Chain((*starts, other), strays)
                best[other] = max(best.get(other, longer), longer, key=_Chain.rank)
            if label.number in (1, item + 1):
                item = label.number
            else:
                strays += 1
        ended.append(_Chain(starts, strays))
    return max(ended, key=_Chain.rank)


def _end_of_last(labels: Sequence[_Label], start: int, count: int, text: str) -> int:
    """The last answer ends where the model goes on to a question that nobody asked."""
    item = int(labels[start].opens_list)
    for label in labels[start + 1 :]:
        if label.number in (1, item + 1):
            item = label.number
        elif label.number > count:
            return label.start
    return len(text)


def _stripped(text: str, start: int, end: int) -> Span | None:
    content = text[start:end]
    left = len(content) - len(content.lstrip())
    return Span(start + left, start + left + len(content.strip())) if content.strip() else None
