"""What the soak knows of the server, and what it has found: whether an answer is right, and what was wrong."""

from collections import Counter
from dataclasses import dataclass, field

from benchmarks.soak.asking import BASE, Answered, Asking
from benchmarks.soak.contents import Content
from benchmarks.soak.names import NOBODY, Names
from benchmarks.soak.questions import Answer, Question
from molex.workbench.tokenizer import SPECIALS

Answers = dict[Question, list[Answer]]


@dataclass
class Knowledge:
    """answers: of each content by its name, and of the base. contents: by generation. limits: how many tokens of a
    question's answers are certain, whoever gives them."""

    answers: dict[str, Answers]
    contents: dict[str, Content]
    names: Names = field(default_factory=Names)
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.limits = {
            question: min(_certain(answer) for own in self.answers.values() for answer in own.get(question, [NOTHING]))
            for question in self.answers[BASE]
        }
        self.questions = [question for question, limit in self.limits.items() if limit > 2]

    def fault(self, what: str) -> None:
        self.faults.append(what)

    def expect(self, what: str, status: int, *allowed: int) -> None:
        if status not in allowed:
            self.fault(f"{what}: status {status}, not {allowed}")

    def check(self, asking: Asking, found: Answered, seen: set[str], whole: bool = True) -> None:
        """seen: what the alias may have named. whole: otherwise the client left before the end."""
        self.counts[f"status {found.status}"] += 1
        if found.status == 429:
            if not found.retry_after:
                self.fault("429 without Retry-After")
        elif found.status == 404 and NOBODY in seen and found.error == "unknown_adapter":
            self.counts["gone"] += 1
        elif found.status != 200 or found.error:
            self.fault(f"{asking}: status {found.status}, error {found.error!r}")
        elif found.generation is not None or whole:
            self._check_answer(asking, found, seen, whole)

    def _check_answer(self, asking: Asking, found: Answered, seen: set[str], whole: bool) -> None:
        if asking.alias == BASE:
            name = BASE if found.generation is None else None
        else:
            name = self.contents[found.generation].name if found.generation in seen else None
        if name is None:
            self.fault(f"{asking}: generation {found.generation}, and it may have named {sorted(seen)}")
            return
        for index in range(asking.n):
            answers = self.answers[name][asking.question]
            answer = answers[index if asking.question.seeds else 0]
            self._check_choice(asking, name, answer, found, index, whole)

    def _check_choice(
        self, asking: Asking, name: str, answer: Answer, found: Answered, index: int, whole: bool
    ) -> None:
        text, finish = expected(answer, asking)
        choice = found.choices.get(index)
        if not whole:
            if choice is not None and not text.startswith(choice.text):
                self.fault(f"{asking}: {name} said {choice.text!r}, and alone {text!r}")
            return
        if choice is None or (choice.text, choice.finish) != (text, finish):
            self.fault(f"{asking}: {name} said {choice}, and alone {text!r}, {finish}")
            return
        labels = [label(token) for token in answer.tokens[: asking.num_tokens]]
        if asking.labels and choice.labels != labels:
            self.fault(f"{asking}: {name} said {choice.labels}, and alone {labels}")
        self.counts["tokens"] += len(labels)


NOTHING = Answer((), False)
BYTES = range(256)  # the tokens that are one; special ones follow


def _certain(answer: Answer) -> int:
    """Up to which max_tokens an answer is known."""
    return 1 << 30 if answer.ended else len(answer.tokens)


def expected(answer: Answer, asking: Asking) -> tuple[str, str]:
    text = answer.text(asking.num_tokens)
    if asking.stop and asking.stop in text:
        return text[: text.index(asking.stop)], "stop"
    return text, answer.finish(asking.num_tokens)


def label(token: int) -> str:
    """Its name among log-probabilities."""
    if token >= len(BYTES):
        return SPECIALS[token - len(BYTES)]
    return chr(token) if token < 128 else f"bytes:\\x{token:02x}"
