"""A task: questions with their right answers, how they are scored, and worked examples.

Files are jsonl, one row a line, of any of these columns (MeteoRA's own files, BIG-bench's, and what data sets use):

    prompt, response | prompt, completion | inputs, targets | question, answer | instruction, output (and input)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from molex.errors import ConfigError
from molex.evaluation.composite.metrics import metrics

COLUMNS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("inputs", "targets"),
    ("question", "answer"),
    ("instruction", "output"),
)
_SPLITS = ("train", "validation", "test")


class Pair(NamedTuple):
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """rows are asked, examples only shown. Raises ConfigError on no rows, blank answers and unknown metrics."""

    name: str
    rows: tuple[Pair, ...]
    metric: str = "exact"
    examples: tuple[Pair, ...] = ()

    def __post_init__(self) -> None:
        _ = metrics[self.metric]
        if not self.rows:
            raise ConfigError(f"task {self.name!r} has no rows")
        blank = [pair.question for pair in (*self.rows, *self.examples) if not pair.answer.strip()]
        if blank:
            raise ConfigError(
                f"task {self.name!r} has {len(blank)} blank answers, which cannot be told from missing ones; leave "
                f"such rows out, the first asks {blank[0]!r:.60}"
            )


def read_task(path: str | Path, metric: str = "exact", wrapped: str = "{question}") -> Task:
    """A task from a jsonl file, named after it, or from a folder with test.jsonl and, for examples, train.jsonl.

    wrapped: a template; a question that comes in it is taken out, as of MeteoRA's "[INST] {question} [/INST]\\n".
    Raises ConfigError on files that are missing or damaged, and on columns of no known kind.
    """
    path = Path(path)
    file = path / "test.jsonl" if path.is_dir() else path
    examples = path / "train.jsonl"
    name = file.resolve().parent.name if file.stem in _SPLITS else file.stem
    shown = read_pairs(examples, wrapped) if examples.is_file() else ()
    return Task(name=name, rows=read_pairs(file, wrapped), metric=metric, examples=shown)


def read_pairs(path: Path, wrapped: str = "{question}") -> tuple[Pair, ...]:
    """The questions and answers of one jsonl file; see `read_task`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a jsonl file, or a folder with test.jsonl") from error
    before, _, after = wrapped.partition("{question}")
    pairs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            question, answer = _pair(line, f"{path}, line {number}")
            if question.startswith(before) and question.endswith(after):
                question = question.removeprefix(before).removesuffix(after)
            pairs.append(Pair(question, answer))
    return tuple(pairs)


def _pair(line: str, place: str) -> Pair:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is no JSON: {error}") from error
    if not isinstance(row, Mapping):
        raise ConfigError(f"{place} holds a {type(row).__name__}, not an object with columns")
    columns = next((pair for pair in COLUMNS if set(pair) <= row.keys()), None)
    if columns is None:
        known = "; ".join(" + ".join(pair) for pair in COLUMNS)
        raise ConfigError(f"{place} has the columns {', '.join(row) or '(none)'}; rename them to one of: {known}")
    question, answer = (_text(row[column], f"{place}, {column}") for column in columns)
    more = row.get("input") if columns[0] == "instruction" else None
    return Pair(f"{question}\n{more}" if more else question, answer)


def _text(value: Any, place: str) -> str:
    """A text, or the first of several right ones, as BIG-bench lists them."""
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        value = value[0]
    if not isinstance(value, str):
        raise ConfigError(f"{place} is {value!r:.60}; give a text")
    return value
