"""Supervised data as users have it, turned into what SFTTrainer takes.

| format | columns | becomes |
|---|---|---|
| `messages` | messages: [{role, content}], or ShareGPT's conversations: [{from, value}] | as it is |
| `prompt-completion` | prompt, completion: strings or lists of messages | as it is |
| `alpaca` | instruction, output, and perhaps input | prompt and completion |
| `text` | text | as it is |

The loss covers completions where there are prompts, everything otherwise (assistant_only_loss changes that). Task ids
(`task_ids`, or `task_id`) stay; other columns go.
"""

from collections.abc import Iterable
from typing import Any

from datasets import Dataset, IterableDataset

from molex.checks import check_choice
from molex.errors import ConfigError
from molex.training.tasks import TASKS

AnyDataset = Dataset | IterableDataset
Row = dict[str, Any]

# in the order of detection: Alpaca's own release also has a `text` column
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",), ("conversations",)),
    "prompt-completion": (("prompt", "completion"),),
    "alpaca": (("instruction", "output"),),
    "text": (("text",),),
}
_EXTRAS = {"alpaca": ("input",), "messages": ("tools",)}

ALPACA_INPUT = "{instruction}\n\n{input}"
ALPACA_TEXT = "### Instruction:\n{question}\n\n### Response:\n"


def detect_format(columns: Iterable[str]) -> str:
    """The format that has all its columns, the first one of FORMATS. Raises ConfigError where none has."""
    found = list(columns)
    for name, alternatives in FORMATS.items():
        if any(set(needed) <= set(found) for needed in alternatives):
            return name
    known = "; ".join(f"{name}: {_spelt(alternatives)}" for name, alternatives in FORMATS.items())
    raise ConfigError(f"columns {', '.join(found) or '(none)'} are no known format; rename them to one of: {known}")


def supervised(dataset: AnyDataset, format: str | None = None, *, chat: bool, join: str = ALPACA_INPUT) -> AnyDataset:
    """Rows for SFTTrainer. format: one of FORMATS, by default detected from the columns.

    chat: whether alpaca rows become messages, for tokenizers with a chat template, or plain text. join: how an
    alpaca row's {instruction} and {input} become one question. Raises ConfigError where columns are missing.
    """
    columns = _columns(dataset)
    format = detect_format(columns) if format is None else format
    check_choice("format", format, tuple(FORMATS))
    needed = next((c for c in FORMATS[format] if set(c) <= set(columns)), None)
    if needed is None:
        raise ConfigError(f"format {format!r} needs {_spelt(FORMATS[format])}; the columns are {', '.join(columns)}")
    _check_row(format, next(iter(dataset), None))
    if TASKS not in columns and "task_id" in columns:
        dataset = dataset.rename_column("task_id", TASKS)
    kept = dataset.select_columns([c for c in (*needed, *_EXTRAS.get(format, ()), TASKS) if c in _columns(dataset)])
    if format != "alpaca":
        return kept
    given = [c for c in _columns(kept) if c != TASKS]
    return kept.map(_from_alpaca, remove_columns=given, fn_kwargs={"chat": chat, "join": join})


def _check_row(format: str, row: Row | None) -> None:
    """Raises ConfigError where the first row's values are of no kind that the format has: later it would say less."""
    if row is None:
        raise ConfigError("the data set has no rows")
    texts = {"alpaca": ("instruction", "output"), "text": ("text",), "prompt-completion": ("prompt", "completion")}
    for column in texts.get(format, ()):
        conversational = format == "prompt-completion" and isinstance(row[column], list)
        if not isinstance(row[column], str) and not conversational:
            raise ConfigError(f"{column}={row[column]!r:.60} in the first row; format {format!r} has texts there")
    if format == "messages":
        turns = row.get("messages", row.get("conversations"))
        keys = ({"role", "content"}, {"from", "value"})
        if not isinstance(turns, list) or not all(
            isinstance(t, dict) and any(k <= t.keys() for k in keys) for t in turns
        ):
            raise ConfigError(f"{turns!r:.60} in the first row; messages are a list of {{role, content}}")
    tasks = row.get(TASKS, row.get("task_id", 0))
    if not all(isinstance(task, int) for task in (tasks if isinstance(tasks, list) else [tasks])):
        raise ConfigError(f"task ids {tasks!r:.60} in the first row; they are whole numbers, one a row or one a token")


def _from_alpaca(row: Row, chat: bool, join: str) -> Row:
    question = join.format(**row) if row.get("input") else row["instruction"]
    if not chat:
        return {"prompt": ALPACA_TEXT.format(question=question), "completion": row["output"]}
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def _columns(dataset: AnyDataset) -> list[str]:
    """Column names; a stream that does not state them shows them in its first row."""
    return list(dataset.column_names or next(iter(dataset)))


def _spelt(alternatives: tuple[tuple[str, ...], ...]) -> str:
    return " or ".join(" + ".join(columns) for columns in alternatives)
